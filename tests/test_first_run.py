"""First runs, from no model to an image, against a local server that speaks the Hugging Face protocol."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time

import mlx.core as mx
import pytest
from hub import COMMIT, GENERATE, HEADER_BYTES, HEADER_RANGE, PROGRAM
from lanes import slow
from PIL import Image

from mlx_zimage.cli.generate import DEFAULT_MODEL
from mlx_zimage.convert import convert
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.weights import manifest, official
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.hub import POCKET

DISK = r"disk: +([\d.]+) GB free now, ([\d.]+) GB afterwards, ([\d.]+) GB once the download is deleted\n"


def test_a_first_run_downloads_converts_and_generates_and_later_runs_need_no_network(run, hub):
    result = run.process(*GENERATE, "--yes")
    assert (result.returncode, result.stdout) == (0, "image.png\n"), result.stderr
    assert "Tongyi-MAI/Z-Image-Turbo is not set up on this machine yet. To set it up:\n" in result.stderr
    assert re.search(r"download: +1\d\.\d\d MB to .*/home/\.cache/huggingface/hub\n", result.stderr), result.stderr
    assert f"to {run.home / 'Z-Image-Turbo-bf16'},\n" in result.stderr
    assert "bfloat16, chosen for a memory budget of" in result.stderr
    free, left, later = map(float, re.search(DISK, result.stderr).groups())
    # in GB, rounded to 0.01; the download and the converted model take 14 MB each
    assert free >= later >= left > 0 and free - left < 0.06
    assert "to delete it:\n  mlx-zimage models rm Tongyi-MAI/Z-Image-Turbo\n" in result.stderr
    assert "Fetching" not in result.stderr and "%" not in result.stderr, "no progress bars without a terminal"
    assert Image.open(run.work / "image.png").size == (32, 32)
    assert read_origin(run.work / "image.png").model == "Z-Image-Turbo-bf16"
    assert not any("large.png" in path for _, path, _ in hub.seen), "only the needed files are downloaded"

    hub.seen.clear()
    result = run.process(*GENERATE)
    assert (result.returncode, result.stdout) == (0, "image-1.png\n"), result.stderr
    assert (run.work / "image-1.png").read_bytes() == (run.work / "image.png").read_bytes()
    assert hub.seen == []

    listed = run("models").stdout
    assert str(run.home / "Z-Image-Turbo-bf16") in listed
    assert "hub       Tongyi-MAI/Z-Image-Turbo\n" in listed
    assert {json.loads(line)["kind"] for line in run("models", "--json").stdout.splitlines()} == {
        "package", "converted", "hub",
    }  # fmt: skip
    assert re.fullmatch(r"Freed 1\d\.\d\d MB\n", run("models", "rm", "Z-Image-Turbo-bf16").stdout)
    assert run("models", "rm", DEFAULT_MODEL).returncode == 0
    assert run("models").stdout.endswith("package   pocket\n")
    assert run("models", "rm", "Z-Image-Turbo-bf16").returncode == 3


def test_nothing_is_downloaded_unasked_without_a_terminal(run, hub):
    result = run(*GENERATE)
    assert (result.returncode, result.stdout) == (3, "")
    assert (
        "Tongyi-MAI/Z-Image-Turbo is not set up on this machine yet; --yes downloads it (about 21 GB)" in result.stderr
    )
    assert hub.seen == []


@pytest.mark.parametrize(("answer", "code"), [slow(b"n\n", 3), (b"\n", 0)])
def test_a_first_run_on_a_terminal_asks(run, answer, code):
    master, slave = pty.openpty()
    try:
        os.write(master, answer)
        result = run.process(*GENERATE, stdin=slave)
        assert result.returncode == code, result.stderr
        assert "Continue? [Y/n]" in result.stderr
        assert ("nothing was downloaded" in result.stderr) == bool(code)
        assert (run.work / "image.png").exists() == (not code)
    finally:
        os.close(master)
        os.close(slave)


def test_a_first_run_of_train_chooses_the_bits_for_its_memory(run):
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(run.work / f"{name}.png")
        (run.work / f"{name}.txt").write_text("black")
    master, slave = pty.openpty()
    try:
        os.write(master, b"n\n")
        result = run.process("train", str(run.work), "-o", "lora.safetensors", "--memory", "1MB", stdin=slave)
        assert "4-bit, chosen for a memory budget of 1.00 MB" in result.stderr
        assert result.returncode == 3
    finally:
        os.close(master)
        os.close(slave)


def test_a_first_run_with_stdin_closed_does_not_ask(run, hub):
    result = run.process(*GENERATE, program=f"import sys; sys.stdin = None\n{PROGRAM}")
    assert (result.returncode, result.stdout) == (3, "")
    assert "--yes downloads" in result.stderr and hub.seen == []


def test_ctrl_c_at_the_prompt_exits_with_130(run):
    master, slave = pty.openpty()
    process = run.process(*GENERATE, stdin=slave, start=subprocess.Popen)
    while "download the rest" not in (line := process.stderr.readline()):
        assert line, "the process exited"
    assert process.stderr.read(9) == "Continue?"
    time.sleep(0.2)  # a signal that arrives just before a read is only handled after it
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130 and stderr.endswith("Stopped.\n")
    os.close(master)
    os.close(slave)


def test_a_download_can_be_stopped_in_the_middle_of_a_file(run, hub):
    weights = "transformer/diffusion_pytorch_model.safetensors"
    hub.held = {weights}
    process = run.process(*GENERATE, "--model", DEFAULT_MODEL, start=subprocess.Popen)
    end = time.monotonic() + 20
    while not any(
        method == "GET" and path.endswith(weights) and part != HEADER_RANGE for method, path, part in hub.seen
    ):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=20)  # the server stalls, so waiting for the client would time out
    assert (process.returncode, stdout, stderr) == (143, "", "\nStopped.\n")
    assert list(run.work.iterdir()) == []
    (blobs,) = run.cache.glob("hub/*/blobs")
    # early clients give the file the same name in each process, and resume it
    assert not [path for path in blobs.glob("*.incomplete") if path.name.count(".") > 1]


def test_values_are_checked_before_anything_is_downloaded(run, hub):
    assert run(*GENERATE, "--yes", "--steps", "0").returncode == 2
    assert hub.seen == []


def test_an_interrupted_download_resumes_where_it_stopped(run, hub, tmp_path):
    # in float32, to be larger than the 10 MB that the Hugging Face client writes at a time
    convert("pocket", tmp_path / "large", dtype="float32")
    hub.serve(tmp_path / "large")
    weights = "transformer/model-00001-of-00001.safetensors"
    hub.cut[weights] = 15_000_000
    result = run(*GENERATE, "--yes")
    if result.returncode == 3:  # early clients give up, and resume when run again
        result = run(*GENERATE, "--yes")
    assert result.returncode == 0, result.stderr
    ranges = [sent for method, path, sent in hub.seen if method == "GET" and path.endswith(weights)]
    ranges = [sent for sent in ranges if sent != HEADER_RANGE]
    assert ranges[0] is None
    assert [int(sent.removeprefix("bytes=").partition("-")[0]) > 10**7 for sent in ranges[1:]] == [True]
    (downloaded,) = run.cache.rglob(f"snapshots/*/{weights}")
    assert downloaded.read_bytes() == (tmp_path / "large" / weights).read_bytes()


COMFY_FILE = "split_files/diffusion_models/z_image_turbo_bf16.safetensors"


@pytest.fixture
def comfy(hub, tmp_path, monkeypatch):
    """ComfyUI's transformer in bfloat16 beside the official model in float32."""
    whole = shutil.copytree(POCKET, tmp_path / "float32")
    exported = convert("pocket", tmp_path / "export", dtype="float32", format="diffusers")
    shutil.rmtree(whole / "transformer")
    shutil.copytree(exported / "transformer", whole / "transformer")
    hub.serve(whole)
    arrays = mx.load(str(convert("pocket", tmp_path / "all.safetensors", format="comfyui")))
    prefix = "model.diffusion_model."
    file = tmp_path / "comfy" / COMFY_FILE
    file.parent.mkdir(parents=True)
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    mx.save_safetensors(str(file), own)
    (tmp_path / "comfy/README.md").write_text("ComfyUI's files\n")
    hub.serve(tmp_path / "comfy", "Comfy-Org/z_image_turbo")
    monkeypatch.setattr(official, "BF16_TRANSFORMER", f"Comfy-Org/z_image_turbo@{COMMIT}:{COMFY_FILE}")
    monkeypatch.setattr(official, "BF16_BYTES", file.stat().st_size)
    monkeypatch.setattr(official, "BF16_SHA256", manifest.sha256(file))
    return file


def weights_sent(hub, beginning):
    """The bytes of weights that were sent, headers aside."""
    sent = {name: count for name, count in hub.sent.items() if name.endswith(".safetensors") and count > HEADER_BYTES}
    return sum(count for name, count in sent.items() if name.startswith(beginning))


def test_a_first_run_downloads_half_the_transformer(run, hub, comfy, tmp_path):
    result = run(*GENERATE, "--yes")
    assert (result.returncode, result.stdout) == (0, "image.png\n"), result.stderr
    assert "the transformer in bfloat16 from Comfy-Org/z_image_turbo\n" in result.stderr
    assert weights_sent(hub, "transformer/") == 0
    extra = weights_sent(hub, COMFY_FILE) - comfy.stat().st_size
    assert 0 <= extra <= 3 * HEADER_BYTES
    record = json.loads((run.home / "Z-Image-Turbo-bf16/conversion.json").read_text())
    assert record["source"] == DEFAULT_MODEL and record["parts"]["transformer"].startswith("Comfy-Org/z_image_turbo@")
    plain = convert("pocket", tmp_path / "plain")
    for path in plain.glob("*/*.safetensors"):
        assert path.read_bytes() == (run.home / "Z-Image-Turbo-bf16" / path.relative_to(plain)).read_bytes()
    for name in ("Tongyi-MAI/Z-Image-Turbo", "Comfy-Org/z_image_turbo"):
        assert f"  mlx-zimage models rm {name}\n" in result.stderr
        assert run("models", "rm", name).returncode == 0
    assert "hub" not in run("models").stdout


@pytest.mark.parametrize("listed", [True, slow(False)])
def test_a_transformer_that_is_not_the_published_one_is_not_used(run, hub, comfy, listed):
    published = manifest.sha256(comfy)
    content = bytearray(comfy.read_bytes())
    content[-1] ^= 1
    comfy.write_bytes(content)
    if not listed:
        hub.listed[comfy.name] = published  # the listing does not show it
    result = run(*GENERATE, "--yes", "--model", "z-image-turbo")
    assert result.returncode == 0, result.stderr
    assert "Comfy-Org/z_image_turbo" in result.stderr and "is not the file that was published" in result.stderr
    assert weights_sent(hub, COMFY_FILE) == 0 or not listed
    assert weights_sent(hub, "transformer/") > 0
    assert "parts" not in json.loads((run.home / "Z-Image-Turbo-bf16/conversion.json").read_text())
    if not listed:
        assert "downloading the transformer of Tongyi-MAI/Z-Image-Turbo instead" in result.stderr
        assert not list(run.cache.rglob(comfy.name))


def test_a_file_in_a_repository_is_used_as_it_is(run, hub, comfy, monkeypatch):
    result = run(*GENERATE, "--model", "z-image-turbo", "--yes")
    assert result.returncode == 0, result.stderr
    source = f"Comfy-Org/z_image_turbo:{COMFY_FILE}"
    # the architecture of a bare file is the official one, which is pocket's here
    pocket = open_checkpoint("pocket")
    monkeypatch.setattr(official, "CONFIGS", {part.name: part.raw_config for part in pocket.components})
    before = dict(hub.sent)
    result = run(*GENERATE, "--model", source)
    assert result.returncode == 0, result.stderr
    assert "contains no text_encoder or vae or tokenizer; using Tongyi-MAI/Z-Image-Turbo" in result.stderr
    assert Image.open(run.work / "image-1.png").tobytes() == Image.open(run.work / "image.png").tobytes()
    assert sum(hub.sent.values()) - sum(before.values()) < 100_000, "all of it was here already"


def test_after_a_first_run_an_alias_stands_for_what_was_converted(run, hub):
    assert run(*GENERATE, "--yes").returncode == 0
    hub.seen.clear()
    folder = run.home / "Z-Image-Turbo-bf16"
    assert run("info", "turbo").stdout.startswith(f"{folder}\n")
    assert run("plan", "turbo").stdout == run("plan", folder).stdout != ""
    assert run("verify", "turbo").stdout == f"{folder} is intact (all checksums match)\n"
    assert hub.seen == []


@pytest.mark.parametrize("command", ["fuse", pytest.param("convert", marks=pytest.mark.slow)])
def test_an_alias_takes_the_smaller_transformer_in_all_conversions(run, hub, comfy, tmp_path, command):
    lora = tmp_path / "style.safetensors"
    key = "diffusion_model.layers.0.attention.to_q.lora"
    width = mx.load(str(comfy))["layers.0.attention.out.weight"].shape[0]
    mx.save_safetensors(str(lora), {f"{key}_A.weight": mx.ones((1, width)), f"{key}_B.weight": mx.ones((width, 1))})
    options = ["--lora", lora] if command == "fuse" else ["--report"]
    refused = run(command, "z-image-turbo", "out", "--q-bits", "99", *options)
    assert refused.returncode == 2 and not weights_sent(hub, ""), refused.stderr
    result = run(command, "z-image-turbo", "out", "--q-bits", "4", *options)
    assert result.returncode == 0, result.stderr
    assert weights_sent(hub, "transformer/") == 0 < weights_sent(hub, COMFY_FILE)


def test_a_disk_that_fills_up_exits_with_6(run):
    result = run.process(*GENERATE, "--yes", program=FULL_DISK)
    assert (result.returncode, result.stdout) == (6, ""), result.stderr
    assert "Traceback" not in result.stderr
    assert not list(run.home.glob("Z-Image*"))


FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
from mlx_zimage.cli import main
main()
"""
