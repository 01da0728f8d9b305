"""Requests that cannot be served, and images that cannot be written: an error before any work, and no file."""

import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mlx_zimage import GenerateRequest, RequestError, ZImagePipeline, cli
from mlx_zimage.weights.hub import POCKET

SMALL = ["-m", str(POCKET), "--steps", "1", "--size", "32x32", "--seed", "1"]
COMMAND = [sys.executable, "-m", "mlx_zimage", "generate"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def refused(*args: str, code: int = 2, stdin: bytes = b"") -> str:
    ended = CliRunner().invoke(cli.main, ["generate", *args], input=stdin)
    assert isinstance(ended.exception, SystemExit) and ended.exit_code == code, (ended.output, ended.exception)
    assert len(ended.output) < 3000
    return ended.output


PROMPTS = {
    "nothing": "",
    "blanks": " \t\n",
    "half a pair": "a \ud800",
    "bytes that are not UTF-8": os.fsdecode(b"a \xff\xfe"),
    "32,001 characters": "a" * 32_001,
    "10 MB": "a cat " * 1_700_000,
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=list(PROMPTS))
def test_a_prompt_that_no_tokenizer_takes_is_refused(prompt):
    with pytest.raises(RequestError, match="prompt"):
        GenerateRequest(prompt, seed=1)
    assert "prompt" in refused(prompt, *SMALL)
    refused("-", *SMALL, stdin=prompt.encode(errors="surrogatepass"))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", True, float("nan"), [1]], ids=str)
def test_a_seed_is_a_whole_number_of_64_bits(seed):
    with pytest.raises(RequestError, match="seed"):
        GenerateRequest("a", seed=seed)


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1.0", "x", "", "nan", "1,,2", "0x10", "\uff11\uff12x"])
def test_a_seed_on_the_command_line_is_a_whole_number_of_64_bits(seed):
    refused("a", *SMALL[:-2], f"--seed={seed}")


@pytest.mark.parametrize("size", ["0x0", "17x32", "8208x8208", "-16x16", "32", "1e9x16", "32x32x32", "NaNxNaN"])
def test_a_size_is_refused_and_never_rounded(size):
    refused("a", "-m", "pocket", f"--size={size}")


@pytest.mark.parametrize(
    "name", ["{0}.png", "{seed.__class__}.png", "{seed!r}.png", "{prompt", "a.gif", "/proc/a.png", ""]
)
def test_a_name_is_a_template_of_known_words_only(name):
    refused("a", *SMALL, "-o", name, code=6 if name.startswith("/proc") else 2)


def test_images_that_do_not_fit_are_planned_once_per_size_before_any_is_generated(monkeypatch):
    planned, plan = [], ZImagePipeline.plan

    def counted(self, request, *inputs):
        planned.append(request.extent[:2])
        return plan(self, request, *inputs)

    monkeypatch.setattr(ZImagePipeline, "plan", counted)
    monkeypatch.setattr(ZImagePipeline, "stream", lambda *args, **options: pytest.fail("generated"))
    within = ["-m", str(POCKET), "--memory", "300MB"]
    refused("a cat", *within, "--count", "100000", "--size", "8192x8192", code=5)
    assert planned == [(8192, 8192)]
    planned.clear()
    sizes = [64, 128, 8192]
    lines = [f'{{"prompt": "a cat", "seed": {i}, "size": "{side}x{side}"}}' for i in range(100) for side in sizes]
    refused(*within, "--requests", "-", code=5, stdin="\n".join(lines).encode())
    assert planned == [(side, side) for side in sizes]


# ---- real processes

slow = pytest.mark.slow


def shell(command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["/bin/sh", "-c", command, *COMMAND, "a cat", *SMALL], capture_output=True, **options)


@slow
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS passes no such arguments")
def test_arguments_that_are_not_text_are_refused():
    done = subprocess.run([*COMMAND, b"a \xff\xfe cat", *SMALL], capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr


@slow
def test_a_full_disk_ends_with_exit_code_6():
    # without bytecode: Python would keep what it could write of it, and no other process could read that
    done = shell('export PYTHONDONTWRITEBYTECODE=1; ulimit -f 1; exec "$0" "$@"')
    assert (done.returncode, done.stdout) == (6, b""), done.stderr
    assert b"Traceback" not in done.stderr


@slow
def test_a_reader_that_has_gone_causes_no_traceback(here):
    done = shell('{ "$0" "$@"; echo $? > code; } | true')
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr
    assert (here / "code").read_text().strip() in ("0", "1", str(128 + signal.SIGPIPE))
    for path in here.iterdir():
        path.unlink()


@slow
def test_a_second_interrupt_ends_at_once(here):
    process = subprocess.Popen(
        [*COMMAND, "a cat", "-m", str(POCKET), "--steps", "1000", "--size", "256x256", "--preview"],
        stderr=subprocess.PIPE,
    )
    said = b""
    while b"Preview" not in said:
        line = process.stderr.readline()
        assert line, said  # it has ended
        said += line
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), errors
    assert b"Traceback" not in errors
    for path in here.iterdir():  # the second one does not wait for anything to be removed
        path.unlink()
