"""First runs, from no model to an image, against a local server that speaks the Hugging Face protocol."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from hub import Hub
from PIL import Image

from mlx_zimage.cli.generate import DEFAULT_MODEL
from mlx_zimage.convert import convert
from mlx_zimage.errors import ModelNotFoundError, OutputError
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.weights import library, manifest
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.hub import name_of as hub_name
from mlx_zimage.weights.library import Disk, FirstRun, check_space, choose_bits, disks
from mlx_zimage.weights.listing import is_hidden

DISK = r"disk: +([\d.]+) GB free now, ([\d.]+) GB afterwards, ([\d.]+) GB once the download is deleted\n"
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
from mlx_zimage.cli import main
main()
"""
HEADER_BYTES = 100_001  # what the client asks for to see the header of a safetensors file
GENERATE = ["generate", "a red circle", "--steps", "1", "--width", "32", "--height", "32", "--seed", "1"]


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "repository").mkdir()
    shutil.copytree(POCKET, tmp_path / "repository", dirs_exist_ok=True)
    (tmp_path / "repository/assets").mkdir()
    (tmp_path / "repository/assets/large.png").write_bytes(bytes(1000))
    with Hub(tmp_path / "repository", DEFAULT_MODEL) as hub:
        yield hub


@pytest.fixture
def run(tmp_path, hub):
    """Run mlx-zimage in a process with a home, caches and a hub of its own."""
    work = tmp_path / "work"
    work.mkdir()

    def run(*args, program=PROGRAM, stdin=subprocess.DEVNULL, start=subprocess.run, **variables):
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING", "XDG_", "MLX_ZIMAGE_HOME"))
        }
        environment = {
            **kept,
            "HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **variables,
        }
        return start(
            [sys.executable, "-c", program, *map(str, args)],
            cwd=work, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    run.work, run.home = work, tmp_path / "home/.cache/mlx-zimage"
    return run


def test_a_first_run_downloads_converts_and_generates_and_later_runs_need_no_network(run, hub):
    result = run(*GENERATE, "--yes")
    assert (result.returncode, result.stdout) == (0, "image.png\n"), result.stderr
    assert "No model on this machine yet. To set up Tongyi-MAI/Z-Image-Turbo:\n" in result.stderr
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
    result = run(*GENERATE)
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
    assert "no model on this machine yet; --yes downloads Tongyi-MAI/Z-Image-Turbo (about 21 GB)" in result.stderr
    assert hub.seen == []


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 3), (b"\n", 0)])
def test_a_first_run_on_a_terminal_asks(run, answer, code):
    master, slave = pty.openpty()
    try:
        os.write(master, answer)
        result = run(*GENERATE, stdin=slave)
        assert result.returncode == code, result.stderr
        assert "Continue? [Y/n]" in result.stderr
        assert ("nothing was downloaded" in result.stderr) == bool(code)
        assert (run.work / "image.png").exists() == (not code)
    finally:
        os.close(master)
        os.close(slave)


def test_a_first_run_with_stdin_closed_does_not_ask(run, hub):
    result = run(*GENERATE, program=f"import sys; sys.stdin = None\n{PROGRAM}")
    assert (result.returncode, result.stdout) == (3, "")
    assert "--yes downloads" in result.stderr and hub.seen == []


def test_ctrl_c_at_the_prompt_exits_with_130(run):
    master, slave = pty.openpty()
    process = run(*GENERATE, stdin=slave, start=subprocess.Popen)
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
    process = run(*GENERATE, "--model", DEFAULT_MODEL, start=subprocess.Popen)
    end = time.monotonic() + 20
    while not any(method == "GET" and path.endswith(weights) for method, path, _ in hub.seen):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=20)  # the server stalls, so waiting for the client would time out
    assert (process.returncode, stdout, stderr) == (143, "", "\nStopped.\n")
    assert list(run.work.iterdir()) == []
    (blobs,) = run.home.with_name("huggingface").glob("hub/*/blobs")
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
    ranges = [sent for sent in ranges if sent != f"bytes=0-{HEADER_BYTES - 1}"]
    assert ranges[0] is None
    assert [int(sent.removeprefix("bytes=").partition("-")[0]) > 10**7 for sent in ranges[1:]] == [True]
    (downloaded,) = run.home.with_name("huggingface").rglob(f"snapshots/*/{weights}")
    assert downloaded.read_bytes() == (tmp_path / "large" / weights).read_bytes()


def test_an_explicit_id_is_downloaded_and_used_without_conversion(run):
    result = run(*GENERATE, "--model", DEFAULT_MODEL)
    assert (result.stdout, result.stderr) == ("image.png\n", "Seed: 1\n"), "no progress bars without a terminal"
    for n, offline in enumerate(({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}), 1):
        result = run(*GENERATE, "--model", DEFAULT_MODEL, **offline)
        assert (result.stdout, result.stderr) == (f"image-{n}.png\n", "Seed: 1\n"), "no retries either"


def test_a_repository_of_another_kind_is_refused_after_its_configs(run, hub, tmp_path):
    weights = {name for name in hub.files if name.endswith(".safetensors")}
    index, vae = tmp_path / "repository/model_index.json", tmp_path / "repository/vae/config.json"
    was = index.read_text(), vae.read_text()
    index.write_text(was[0].replace("ZImagePipeline", "FluxPipeline"))
    for args in (["generate", "a cat", "--model"], ["plan"], ["verify"], ["convert"]):
        result = run(*args, DEFAULT_MODEL, *(["out"] if args == ["convert"] else []))
        assert (result.returncode, result.stdout) == (4, ""), result.stderr
        assert "FluxPipeline" in result.stderr
    assert hub.sent and all(name.endswith(".json") and "tokenizer" not in name for name in hub.sent)

    index.unlink()
    hub.serve(tmp_path / "repository")
    shutil.rmtree(run.home.with_name("huggingface"))
    result = run(*GENERATE, "--model", DEFAULT_MODEL)
    assert result.returncode == 4 and "has no model_index.json" in result.stderr
    assert not weights & hub.sent.keys()

    # of the right kind, but with headers of another architecture
    index.write_text(was[0])
    vae.write_text(json.dumps(json.loads(was[1]) | {"layers_per_block": 3}))
    hub.serve(tmp_path / "repository")
    shutil.rmtree(run.home.with_name("huggingface"))
    result = run(*GENERATE, "--model", DEFAULT_MODEL)
    assert result.returncode == 4 and "vae" in result.stderr, result.stderr
    assert all(hub.sent.get(name, 0) <= HEADER_BYTES for name in weights)


def test_only_the_files_that_are_read_are_downloaded(run, hub, tmp_path):
    vae = tmp_path / "repository" / "vae"
    name, fp16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(vae / name, vae / fp16)
    (vae / f"{name}.index.json").write_text(
        '{"weight_map": {"stale": "diffusion_pytorch_model-00001-of-00002.safetensors"}}'
    )
    tiny.litter(tmp_path / "repository")
    hub.serve(tmp_path / "repository")
    for variant, read, left in ((None, name, fp16), ("fp16", fp16, name)):
        hub.sent.clear()
        shutil.rmtree(run.home.with_name("huggingface"), ignore_errors=True)
        options = ["--variant", variant] if variant else []
        result = run(*GENERATE, "--model", DEFAULT_MODEL, *options, MLX_ZIMAGE_EMBEDDINGS="off")
        assert result.returncode == 0, result.stderr
        assert hub.sent[f"vae/{read}"] > (vae / read).stat().st_size and f"vae/{left}" not in hub.sent
        assert not any(is_hidden(path) for path in hub.sent)
    result = run(*GENERATE, "--model", DEFAULT_MODEL, "--variant", "fp8")
    assert result.returncode == 2 and "which has fp16; got 'fp8'" in result.stderr


def test_plan_and_info_of_an_id_fetch_configs_and_headers_only(run, hub):
    planned, local = run("plan", DEFAULT_MODEL), run("plan", "pocket")
    assert (planned.returncode, planned.stdout) == (0, local.stdout), planned.stderr
    shown, here = (json.loads(run("info", source, "--json").stdout) for source in (DEFAULT_MODEL, "pocket"))
    assert shown["networks"] == here["networks"] and shown["fingerprint"] is None
    weights = [name for name in hub.files if name.endswith(".safetensors")]
    assert shown["bytes_to_fetch"] == sum(hub.files[name].stat().st_size for name in weights)
    assert not any("tokenizer" in name for name in hub.sent)
    assert all(hub.sent[name] == 2 * HEADER_BYTES for name in weights), "one header for each of two commands"


def test_plan_without_a_model_needs_no_network(run, hub):
    result = run("plan", "--memory", "12GB", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    rows = {line[:8].strip(): line for line in result.stdout.splitlines()}
    assert "20.52 GB" in rows["bfloat16"] and "11.48 GB" in rows["8 bits"] and "6.65 GB" in rows["4 bits"]
    assert "blocks streamed from disk in each step" in rows["bfloat16"]
    assert "kept in memory between images" in rows["4 bits"] and "converts to 6 bits" in result.stdout
    assert hub.seen == []


COMFY_FILE = "split_files/diffusion_models/z_image_turbo_bf16.safetensors"
PINNED = """
import os
from mlx_zimage.weights import official
official.BF16_TRANSFORMER = "Comfy-Org/z_image_turbo@" + "c" * 40 + ":{file}"
official.BF16_BYTES, official.BF16_SHA256 = {size}, "{sha256}"
"""


@pytest.fixture
def comfy(hub, tmp_path):
    """ComfyUI's transformer in bfloat16 beside the official model in float32; returns the program that knows it."""
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
    program = PINNED.format(file=COMFY_FILE, size=file.stat().st_size, sha256=manifest.sha256(file)) + PROGRAM
    return program, file


def weights_sent(hub, beginning):
    """The bytes of weights that were sent, headers aside."""
    sent = {name: count for name, count in hub.sent.items() if name.endswith(".safetensors") and count > HEADER_BYTES}
    return sum(count for name, count in sent.items() if name.startswith(beginning))


def test_a_first_run_downloads_half_the_transformer(run, hub, comfy, tmp_path):
    program, file = comfy
    result = run(*GENERATE, "--yes", program=program)
    assert (result.returncode, result.stdout) == (0, "image.png\n"), result.stderr
    assert "the transformer in bfloat16 from Comfy-Org/z_image_turbo\n" in result.stderr
    assert weights_sent(hub, "transformer/") == 0
    extra = weights_sent(hub, COMFY_FILE) - file.stat().st_size
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


@pytest.mark.parametrize("listed", [True, False])
def test_a_transformer_that_is_not_the_published_one_is_not_used(run, hub, comfy, listed):
    program, file = comfy
    published = manifest.sha256(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if not listed:
        hub.listed[file.name] = published  # the listing does not show it
    result = run(*GENERATE, "--yes", "--model", "z-image-turbo", program=program)
    assert result.returncode == 0, result.stderr
    assert "Comfy-Org/z_image_turbo" in result.stderr and "is not the file that was published" in result.stderr
    assert weights_sent(hub, COMFY_FILE) == 0 or not listed
    assert weights_sent(hub, "transformer/") > 0
    assert "parts" not in json.loads((run.home / "Z-Image-Turbo-bf16/conversion.json").read_text())
    if not listed:
        assert "downloading the transformer of Tongyi-MAI/Z-Image-Turbo instead" in result.stderr
        assert not list(run.home.with_name("huggingface").rglob(file.name))


def test_a_file_in_a_repository_is_used_as_it_is(run, hub, comfy):
    program, _ = comfy
    result = run(*GENERATE, "--model", "z-image-turbo", "--yes", program=program)
    assert result.returncode == 0, result.stderr
    source = f"Comfy-Org/z_image_turbo:{COMFY_FILE}"
    # the architecture of a bare file is the official one, which is pocket's here
    tiny_official = """
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.models import NETWORKS
official.CONFIGS = {name: getattr(open_checkpoint("pocket"), name).raw_config for name in NETWORKS}
"""
    before = dict(hub.sent)
    result = run(*GENERATE, "--model", source, program=program.replace(PROGRAM, tiny_official + PROGRAM))
    assert result.returncode == 0, result.stderr
    assert "contains no text_encoder or vae or tokenizer; using that of Tongyi-MAI/Z-Image-Turbo" in result.stderr
    assert Image.open(run.work / "image-1.png").tobytes() == Image.open(run.work / "image.png").tobytes()
    assert sum(hub.sent.values()) - sum(before.values()) < 100_000, "all of it was here already"


def test_a_repository_that_mflux_uploaded_is_used_as_it_is(run, hub, mflux, few_tokens, tmp_path):
    folder = shutil.copytree(mflux / "mflux-4", tmp_path / "mflux")
    (folder / "tokenizer").mkdir()
    shutil.copy(few_tokens, folder / "tokenizer/tokenizer.json")
    hub.serve(folder, "someone/z-image-mflux-4bit")
    program = f"""
import sys
sys.path.insert(0, {str(tiny.GOLDEN)!r})
sys.path.insert(0, {str(tiny.GOLDEN.parent)!r})
import mflux_folders
from mlx_zimage.weights import official
official.CONFIGS = mflux_folders.CONFIGS
"""
    program += PROGRAM
    shown = json.loads(run("info", "someone/z-image-mflux-4bit", "--json", program=program).stdout)
    assert "4-bit affine" in shown["networks"]["transformer"]["stored_as"][0]
    assert all(count <= HEADER_BYTES for name, count in hub.sent.items() if name.endswith(".safetensors"))
    result = run(*GENERATE, "--model", "someone/z-image-mflux-4bit", program=program)
    assert result.returncode == 0, result.stderr
    assert read_origin(run.work / "image.png").model == "someone/z-image-mflux-4bit"
    fetched = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix == ".safetensors")
    on_disk = [path for path in tmp_path.joinpath("home").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in on_disk) < fetched + 100_000, "no second copy"


def test_a_model_in_a_folder_of_a_repository_is_used_as_it_is(run, hub, tmp_path):
    for bits in (4, 8):
        convert("pocket", tmp_path / f"several/{bits}bit", bits=bits)
    hub.serve(tmp_path / "several", "someone/several")
    result = run("info", "someone/several")
    assert result.returncode == 4 and "but these folders in it do: 4bit, 8bit; expected" in result.stderr
    result = run("info", "someone/several:4bit")
    assert "4-bit affine" in result.stdout and "not downloaded" in result.stdout, result.stderr
    assert run(*GENERATE, "--model", "someone/several:4bit").returncode == 0
    assert run(*GENERATE, "--model", tmp_path / "several/4bit").returncode == 0
    assert (run.work / "image.png").read_bytes()[-100:] == (run.work / "image-1.png").read_bytes()[-100:]
    assert not any(name.startswith("8bit/") and not name.endswith(".json") for name in hub.sent)
    (snapshot,) = run.home.with_name("huggingface").glob("hub/*/snapshots/*")
    assert run(*GENERATE, "--model", snapshot / "4bit", "-o", "path.png").returncode == 0
    assert read_origin(run.work / "path.png").model == "someone/several:4bit"
    listed = run("models").stdout
    assert listed.endswith("hub       someone/several\n") and "snapshots" not in listed

    part = {"--vae": "someone/several:8bit/vae", "--text-encoder": "someone/several:4bit"}
    assert run(*GENERATE, "--model", "pocket", *(word for option in part.items() for word in option)).returncode == 0
    assert run("convert", "pocket", "out", "--tokenizer", "someone/several:8bit/tokenizer").returncode == 0


def test_a_tokenizer_comes_from_a_repository_of_transformers(run, hub, tmp_path):
    plain = shutil.copytree(POCKET / "text_encoder", tmp_path / "plain")
    shutil.copytree(POCKET / "tokenizer", plain, dirs_exist_ok=True)
    hub.serve(plain, "Qwen/Qwen3-4B")
    result = run("convert", "pocket", "out", "--tokenizer", "Qwen/Qwen3-4B", "--text-encoder", "Qwen/Qwen3-4B")
    assert result.returncode == 0, result.stderr
    whole = convert("pocket", tmp_path / "whole")
    for name in ("tokenizer/tokenizer.json", "text_encoder/model-00001-of-00001.safetensors"):
        assert (run.work / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_an_alias_can_have_a_revision_and_a_path(run):
    assert run("info", "z-image-turbo@main").returncode == 0
    assert "turbo:vae contains no transformer, only vae" in run("info", "turbo:vae").stderr


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
    program, file = comfy
    lora = tmp_path / "style.safetensors"
    key = "diffusion_model.layers.0.attention.to_q.lora"
    width = mx.load(str(file))["layers.0.attention.out.weight"].shape[0]
    mx.save_safetensors(str(lora), {f"{key}_A.weight": mx.ones((1, width)), f"{key}_B.weight": mx.ones((width, 1))})
    options = ["--lora", lora] if command == "fuse" else ["--report"]
    refused = run(command, "z-image-turbo", "out", "--q-bits", "99", *options, program=program)
    assert refused.returncode == 2 and not weights_sent(hub, ""), refused.stderr
    result = run(command, "z-image-turbo", "out", "--q-bits", "4", *options, program=program)
    assert result.returncode == 0, result.stderr
    assert weights_sent(hub, "transformer/") == 0 < weights_sent(hub, COMFY_FILE)


def test_models_lists_what_an_id_can_be_used_for_and_frees_the_rest(run):
    hub = run.home.with_name("huggingface") / "hub"
    assert run(*GENERATE, "--model", DEFAULT_MODEL).returncode == 0
    (repository,) = hub.glob("models--*")
    (snapshot,) = repository.glob("snapshots/*")
    assert run(*GENERATE, "--model", snapshot, "-o", "path.png").returncode == 0
    assert read_origin(run.work / "path.png").model == DEFAULT_MODEL, "not its commit"
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert hub_name(snapshot / file) == f"{DEFAULT_MODEL}:{file}", "not its checksum"

    (repository / "refs/main").unlink()  # as the client leaves it after fetching one commit
    listed = json.loads(run("models", "--json").stdout.splitlines()[1])
    assert (listed["name"], listed["complete"]) == (DEFAULT_MODEL, True)
    assert run(*GENERATE, "--model", DEFAULT_MODEL, HF_HUB_OFFLINE="1").returncode == 0, "the only snapshot"

    weights = snapshot / "transformer/diffusion_pytorch_model.safetensors"
    freed = weights.resolve().stat().st_size
    weights.resolve().unlink()  # leaves a link to nothing
    assert run("models").stdout.endswith(f"hub       {DEFAULT_MODEL}  (incomplete)\n")
    left = sum(path.stat().st_size for path in repository.rglob("*") if path.is_file() and not path.is_symlink())
    assert freed > 9e6 and left > 3e6
    assert run("models", "rm", DEFAULT_MODEL).stdout == f"Freed {left / 1e6:.2f} MB\n"
    assert not repository.exists() and run("models").stdout.endswith("package   pocket\n")


def test_models_lists_the_folders_that_convert_wrote(run):
    assert run("convert", "pocket", "beside", "--q-bits", "4").returncode == 0
    here, moved = run.work / "beside", run.work / "moved"
    assert f"converted {here}\n" in run("models").stdout
    here.rename(moved)
    assert "converted" not in run("models").stdout
    assert run(*GENERATE, "--model", "moved").returncode == 0
    assert f"converted {moved}\n" in run("models").stdout, "since it was used there"

    (moved / "mine.txt").write_text("mine")
    elsewhere = shutil.copytree(moved, run.work / "elsewhere/moved")
    assert run(*GENERATE, "--model", elsewhere).returncode == 0
    freed = run("models", "rm", "moved")  # the one in this folder, not the other of that name
    assert re.fullmatch(r"Freed 7\.\d\d MB\n", freed.stdout), freed.stderr
    assert [path.name for path in moved.rglob("*")] == ["mine.txt"] and (elsewhere / "model_index.json").is_file()
    shutil.copytree(elsewhere, run.work / "third/moved")
    assert run(*GENERATE, "--model", "third/moved").returncode == 0
    refused = run("models", "rm", "moved")
    assert refused.returncode == 2 and "elsewhere/moved and of" in refused.stderr
    assert run("models", "rm", "third/moved").returncode == 0


def test_verify_of_an_id_compares_every_file_with_its_checksums(run, hub, tmp_path):
    published = convert("pocket", tmp_path / "published", bits=4)
    (published / "README.md").write_text("# A model\n")
    sums = manifest.read_manifest(published) | {"README.md": manifest.sha256(published / "README.md")}
    (published / manifest.MANIFEST).write_bytes(manifest.render_manifest(sums))
    hub.serve(published)
    assert run(*GENERATE, "--model", DEFAULT_MODEL).returncode == 0
    (snapshot,) = run.home.with_name("huggingface").glob("hub/*/snapshots/*")
    assert not (snapshot / "README.md").exists()
    assert run("verify", snapshot).returncode == 0, "a model needs no README"
    result = run("verify", DEFAULT_MODEL)
    assert result.returncode == 0 and "all checksums match" in result.stdout, result.stderr
    (readme,) = run.home.with_name("huggingface").rglob("README.md")
    readme.resolve().write_text("# Another\n")
    result = run("verify", DEFAULT_MODEL)
    assert result.returncode == 4 and "README.md: has sha256" in result.stdout


@pytest.mark.parametrize("args", [["--yes"], ["--model", DEFAULT_MODEL]])
def test_being_offline_exits_with_3(run, args):
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        result = run(*GENERATE, *args, **variables)
        assert (result.returncode, result.stdout) == (3, "")
        assert "the hub cannot be reached; check the network and HF_HUB_OFFLINE" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_missing_token_is_reported_and_a_given_one_is_used(run, hub):
    hub.token = "hf_test"
    result = run(*GENERATE, "--yes")
    assert (result.returncode, result.stdout) == (3, "")
    assert "downloading it from the Hugging Face hub failed" in result.stderr
    assert run(*GENERATE, "--yes", HF_TOKEN="hf_test").returncode == 0


def test_an_unknown_repository_is_reported(run):
    result = run(*GENERATE, "--model", "nobody/nothing")
    assert (result.returncode, result.stdout) == (3, "")
    assert "nobody/nothing" in result.stderr


def test_disks_without_room_are_refused_before_downloading(tmp_path, monkeypatch):
    plan = FirstRun("a/b", 33 * 10**9, 4, 7 * 10**9, tmp_path / "hub", tmp_path / "home/b-4bit")
    usage = type("usage", (), {"free": 40 * 10**9})
    monkeypatch.setattr(library.shutil, "disk_usage", lambda _: usage)
    assert disks(plan) == [Disk(40 * 10**9, 33 * 10**9, 7 * 10**9)]
    check_space(disks(plan))
    usage.free -= 1
    with pytest.raises(OutputError, match=r"40\.0 GB of disk space are needed, but only 40\.0 GB are free"):
        check_space(disks(plan))
    if os.path.ismount("/proc"):  # another disk
        assert disks(replace(plan, dest=Path("/proc/b-4bit"))) == [
            Disk(usage.free, download=33 * 10**9), Disk(usage.free, converted=7 * 10**9),
        ]  # fmt: skip


def test_a_disk_that_fills_up_exits_with_6(run):
    result = run(*GENERATE, "--yes", program=FULL_DISK)
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


@pytest.mark.parametrize(("budget_gb", "bits"), [(96, None), (24, None), (16, 8), (10.7, 6), (8, 4), (5, 4)])
def test_bits_are_chosen_to_leave_room_in_memory(budget_gb, bits):
    sizes = {None: 20_522_393_030, 8: 11_475_967_430, 6: 9_063_000_000, 4: 6_651_207_110}
    assert choose_bits(sizes, budget_gb * 10**9) == bits


def test_without_a_home_the_user_is_asked_to_set_a_folder(monkeypatch):
    monkeypatch.delenv("MLX_ZIMAGE_EMBEDDINGS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")
    for given in ("~nobody-of-this-name/models", ""):
        monkeypatch.setenv("MLX_ZIMAGE_HOME", given)
        with pytest.raises(ModelNotFoundError, match="set MLX_ZIMAGE_HOME to a folder"):
            library.home()
        assert library.embeddings_folder() is None


def test_values_in_the_environment_mean_what_they_say(monkeypatch):
    monkeypatch.delenv("MLX_ZIMAGE_HOME", raising=False)
    for off in ("off", "OFF", " Off ", "0", "no", "False"):
        monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", off)
        assert library.embeddings_folder() is None
    for relative in ("cache", ".", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert library.home() == Path("~/.cache/mlx-zimage").expanduser(), "to be ignored, says the specification"


def test_pocket_cannot_be_removed():
    with pytest.raises(ModelNotFoundError, match="part of the package"):
        library.remove("pocket")


def test_the_predicted_size_is_the_size_that_is_written(tmp_path):
    from mlx_zimage.convert import convert

    for bits in (None, 8, 4):
        folder = convert("pocket", tmp_path / str(bits), bits=bits)
        written = sum(component.nbytes for component in open_checkpoint(folder).components)
        configs = {part.name: part.raw_config for part in open_checkpoint("pocket").components}
        assert library.planned(bits, configs).nbytes == written
