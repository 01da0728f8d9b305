"""A process under limits, without descriptors, or stopped at the worst moment: a ZImageError, and nothing left."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from mlx_zimage import MemoryBudgetError, ZImagePipeline, atomic, machine
from mlx_zimage.convert import writer
from mlx_zimage.weights.hub import POCKET

pytestmark = pytest.mark.slow  # many processes, or many inputs

SMALL = ["generate", "a red circle", "-m", str(POCKET), "--steps", "1", "--size", "32x32"]
COMMAND = [sys.executable, "-m", "mlx_zimage"]


def shell(command: str, tmp_path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["/bin/sh", "-c", command, *COMMAND, *SMALL], cwd=tmp_path, capture_output=True, **options)


# ---- descriptors


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-", ">&-", "2>&-"])
def test_images_are_written_with_standard_descriptors_closed(tmp_path, closed):
    done = shell(f'exec "$0" "$@" {closed}', tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG") and done.stderr.count(b"Error") == 0


# ---- limits


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce these limits")
@pytest.mark.parametrize("kilobytes", [850_000, 1_000_000])
def test_exceeding_a_limit_on_the_address_space_is_a_memory_error_and_not_a_crash(tmp_path, kilobytes):
    done = shell(f'ulimit -v {kilobytes}; exec "$0" "$@" --size 2048x2048', tmp_path)
    assert done.returncode == 5, (done.returncode, done.stderr)
    assert b"cannot be generated within" in done.stderr


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_the_budget_is_what_a_limit_leaves(monkeypatch, on_cpu, kind):
    limit = 3 * 10**9
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (limit if asked == kind else resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr(machine.Path, "read_text", lambda path: "250000 1 1 1 0 250000 0")  # pages
    used = 250_000 * os.sysconf("SC_PAGE_SIZE")
    left = (limit - used - machine.OVERHEAD) // 3
    assert abs(machine.process_limit() - left) <= 1
    assert machine.check_budget(left - 1) == left - 1
    with pytest.raises(MemoryBudgetError, match="`ulimit` leaves this process only 4"):
        ZImagePipeline.from_pretrained("pocket", memory=left + 10)
    assert machine.machine_budget() <= left


def test_without_limits_any_budget_is_accepted(on_cpu):
    assert machine.check_budget(10**15) == 10**15


# ---- stops


class Stop(BaseException):
    pass


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_stop_at_any_line_of_writing_leaves_a_whole_file_or_none(tmp_path, monkeypatch, overwrite, links):
    def no_links(*_):
        raise PermissionError("no links here, as on exFAT")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "image.png").write_bytes(b"mine")
    left, last = set(), 0
    for last in range(1, 200):
        count = 0

        def trace(frame, event, arg, last=last):
            nonlocal count
            if frame.f_code.co_filename != atomic.__file__:
                return None
            count += 1
            if count == last:
                raise Stop
            return trace

        sys.settrace(trace)
        try:
            atomic.write(tmp_path / "image.png", lambda file: file.write_bytes(b"new"), overwrite, lasting=False)
            break
        except Stop:
            pass
        finally:
            sys.settrace(None)
            for path in tmp_path.iterdir():
                left.add((path.name.startswith(atomic.ASIDE), path.read_bytes()))
                if path.name != "image.png":
                    path.unlink()
    assert 10 < last < 199
    assert {content for aside, content in left if not aside} <= {b"mine", b"new"}
    # a stop inside the clean-up itself may leave the temporary file, whose name says so
    assert (tmp_path / "image.png").read_bytes() == (b"new" if overwrite else b"mine")


def test_files_get_free_names_without_links_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    save = lambda file: file.write_bytes(b"new")  # noqa: E731
    names = [atomic.write(tmp_path / "a.png", save, overwrite=False, lasting=False).name for _ in range(3)]
    assert names == ["a.png", "a-1.png", "a-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_conversion_leaves_nothing(tmp_path, number):
    process = subprocess.Popen([*COMMAND, "convert", POCKET, tmp_path / "out"], stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / ".out.partial").exists():
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode in (0, 128 + number), errors
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if process.returncode == 0 else [])


def test_a_stop_before_the_lock_is_held_leaves_no_files(tmp_path, monkeypatch):
    def stopped(self):
        raise KeyboardInterrupt

    folder = writer.OutputFolder(tmp_path / "out", {}, 0)
    monkeypatch.setattr(writer.OutputFolder, "_resume", stopped)
    with pytest.raises(KeyboardInterrupt), folder:
        pass
    assert not list(tmp_path.iterdir())
