"""A conversion that is killed, raced or out of space leaves a complete folder or none; verify detects any change."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import killed
import mlx.core as mx
import numpy as np
import pytest
from lanes import slow

from mlx_zimage.convert import convert, convert_steps, layout, shards
from mlx_zimage.convert.verify import verify, verify_steps
from mlx_zimage.errors import LockedError, OutputError, RequestError
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.manifest import read_manifest


def run(program, *args):
    return subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_folder):
    return convert(tiny_folder, tmp_path_factory.mktemp("converted") / "out")


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [101, slow(1)])
def test_a_kill_at_any_moment_leaves_everything_or_nothing_and_the_next_run_succeeds(
    tiny_folder, tmp_path, step, record_property
):
    script = Path(killed.__file__)
    done = subprocess.run([sys.executable, script, tiny_folder, tmp_path, str(step)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changes = int(done.stdout.split()[0])
    assert changes > 500
    record_property("attacks", changes // step)


def test_the_next_run_resumes_from_the_finished_shards(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 60_000)
    expected = everything(convert(tiny_folder, tmp_path / "whole"))
    partial = abandoned(tiny_folder, tmp_path / "out", after=60)
    finished = {path for path in partial.rglob("*.safetensors") if path.name in (partial / ".journal").read_text()}
    assert len(finished) > 2
    inodes = {path.relative_to(partial): path.stat().st_ino for path in finished}
    read = []
    monkeypatch.setattr(
        shards, "read_rows", lambda *args, read_rows=shards.read_rows: read.append(1) or read_rows(*args)
    )
    out = convert(tiny_folder, tmp_path / "out")
    assert everything(out) == expected
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes
    assert len(read) < sum(len(part.entries) for part in open_checkpoint(out).components) - 50


def test_a_damaged_finished_shard_is_written_again(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 60_000)
    expected = everything(convert(tiny_folder, tmp_path / "whole"))
    partial = abandoned(tiny_folder, tmp_path / "out", after=60)
    flip(sorted(partial.rglob("*.safetensors"))[0], -1)
    assert everything(convert(tiny_folder, tmp_path / "out")) == expected


@pytest.mark.parametrize("change", ["options", slow("source")])
def test_a_different_job_does_not_resume_from_a_killed_one(tiny_folder, tmp_path, change, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 60_000)
    source = shutil.copytree(tiny_folder, tmp_path / "source")
    abandoned(source, tmp_path / "out", after=60)
    if change == "source":
        file = sorted((source / "transformer").glob("*.safetensors"))[0]
        flip(file, file.stat().st_size - 4)
    options = {"dtype": "float32"} if change == "options" else {}
    out = convert(source, tmp_path / "out", **options)
    assert everything(out) == everything(convert(source, tmp_path / "again", **options))


def abandoned(source, dest, after):
    """The hidden folder left by a conversion that is killed after so many tensors."""
    program = (
        "import os, sys\nfrom mlx_zimage.convert import convert_steps, layout\nlayout.SHARD_BYTES = 60_000\n"
        "for i, _ in enumerate(convert_steps(sys.argv[1], sys.argv[2])):\n"
        f"    if i == {after}: os.kill(os.getpid(), 9)\n"
    )
    assert run(program, source, dest).returncode == -signal.SIGKILL
    assert not os.path.lexists(dest)
    return dest.with_name(f".{dest.name}.partial")


def flip(path, position, mask=1):
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


def test_the_second_of_two_conversions_at_once_fails_and_names_the_first(tiny_folder, tmp_path):
    first = convert_steps(tiny_folder, tmp_path / "out")
    next(first)
    with pytest.raises(LockedError, match=f"is being written by process {os.getpid()}; wait"):
        convert(tiny_folder, tmp_path / "out")
    for _ in first:
        pass
    assert not verify(tmp_path / "out")
    with pytest.raises(RequestError, match="already exists"):
        convert(tiny_folder, tmp_path / "out")


@pytest.mark.parametrize(("count", "rounds"), [(3, 1), slow(8, 20)])
def test_one_of_several_conversions_at_once_succeeds(tiny_folder, tmp_path, count, rounds):
    program = (
        "import sys\nfrom mlx_zimage.convert import convert\nfrom mlx_zimage.errors import ZImageError\n"
        "sys.stdin.readline()\n"
        "try:\n    convert(*sys.argv[1:])\nexcept ZImageError as error:\n    sys.exit(error.exit_code)\n"
    )
    for i in range(rounds):
        dest = tmp_path / f"out{i}"
        command = [sys.executable, "-c", program, tiny_folder, dest]
        children = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
        for child in children:
            child.stdin.write(b"go\n")
            child.stdin.flush()
        codes = sorted(child.wait() for child in children)
        # those that start after the winner has finished find that the folder exists
        assert codes[0] == 0
        assert set(codes[1:]) <= {RequestError.exit_code, LockedError.exit_code}
        assert not verify(dest)
        assert os.listdir(tmp_path) == [dest.name]
        shutil.rmtree(dest)


@pytest.mark.skipif(os.getuid() == 0, reason="root can write anywhere")
def test_a_read_only_destination_is_reported(tiny_folder, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"could not write .*: Permission denied"):
        convert(tiny_folder, tmp_path / "out")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="only Linux has a folder that even root cannot write to")
def test_a_folder_that_nobody_can_write_to_is_reported(tiny_folder):
    with pytest.raises(OutputError, match="could not write /proc/self/out: "):
        convert(tiny_folder, "/proc/self/out")


def test_sha256sum_accepts_the_manifest(converted):
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=converted, capture_output=True)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(everything(converted)) - 1


def test_verify_finds_no_fault_in_an_intact_folder(converted, tiny_folder):
    assert verify(converted) == []
    assert verify(tiny_folder) == []
    assert verify("pocket") == []
    assert read_manifest(tiny_folder) == {}
    assert read_manifest(converted).keys() | {"SHA256SUMS"} == everything(converted).keys()
    last = list(verify_steps(converted))[-1]
    assert last.done_bytes <= last.total_bytes


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_verify_finds_every_flipped_byte(converted, tmp_path, count, record_property):
    record_property("attacks", count)
    folder = shutil.copytree(converted, tmp_path / "folder")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in paths])
    rng = np.random.default_rng(1)
    # half of the flips are anywhere, half in the small files
    small = [i for i, path in enumerate(paths) if path.suffix != ".safetensors"]
    for n in range(count):
        i = rng.choice(len(paths), p=sizes / sizes.sum()) if n % 2 else rng.choice(small)
        position, mask = int(rng.integers(sizes[i])), int(rng.integers(1, 256))
        flip(paths[i], position, mask)
        assert verify(folder), f"{paths[i]} byte {position} xor {mask}"
        flip(paths[i], position, mask)
    assert not verify(folder)


def test_verify_names_files_that_are_missing_added_truncated_or_damaged(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "folder")
    shard = folder / "vae" / "model-00001-of-00001.safetensors"
    (folder / "README.md").write_text("mine")
    assert verify(folder) == []
    (folder / "vae" / "second.safetensors.index.json").write_text("{}")
    assert "vae/second.safetensors.index.json: is not listed in SHA256SUMS, so it was added later; remove it" in verify(
        folder
    )
    (folder / "vae" / "second.safetensors.index.json").unlink()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert verify(folder)[0].startswith("vae/model-00001-of-00001.safetensors: has sha256 ")
    shard.unlink()
    assert verify(folder)[0].startswith("vae/model-00001-of-00001.safetensors: cannot be read")
    shard.write_bytes(whole)
    (folder / "SHA256SUMS").unlink()
    assert verify(folder)[0].startswith("SHA256SUMS: cannot be read")


def test_verify_checks_names_and_values_if_there_is_no_manifest(tmp_path):
    folder = shutil.copytree(POCKET, tmp_path / "folder")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = mx.load(str(file))
    mx.eval(arrays)
    bad = arrays["decoder.conv_in.bias"].astype(mx.float32) + mx.array(float("nan"))
    mx.save_safetensors(str(file), arrays | {"decoder.conv_in.bias": bad.astype(mx.bfloat16)})
    assert verify(folder) == [
        "vae decoder.conv_in.bias: decoder.conv_in.bias contains NaN or infinity; download the source model again"
    ]
    arrays.pop("decoder.conv_in.bias")
    mx.save_safetensors(str(file), arrays)
    assert "missing weights (1 of 180): decoder.conv_in.bias" in verify(folder)[0]
