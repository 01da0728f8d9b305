"""Models named by a Hugging Face id: what is downloaded, and how it is used, against a local server."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from comfyui_files import mixed
from hub import GENERATE, HEADER_BYTES
from lanes import slow

from mlx_zimage.cli.generate import DEFAULT_MODEL
from mlx_zimage.convert import convert
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.weights import manifest, official
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.listing import is_hidden

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import mflux_folders


def test_an_explicit_id_is_downloaded_and_used_without_conversion(run):
    result = run.process(*GENERATE, "--model", DEFAULT_MODEL)
    assert (result.stdout, result.stderr) == ("image.png\n", "Seed: 1\n"), "no progress bars without a terminal"
    assert run(*GENERATE, "--model", DEFAULT_MODEL, HF_HUB_OFFLINE="1").stdout == "image-1.png\n"
    result = run.process(*GENERATE, "--model", DEFAULT_MODEL, HF_ENDPOINT="http://127.0.0.1:9")
    assert (result.stdout, result.stderr) == ("image-2.png\n", "Seed: 1\n"), "no retries either"


def test_a_repository_of_another_kind_is_refused_after_its_configs(run, hub, tmp_path):
    index = tmp_path / "repository/model_index.json"
    index.write_text(index.read_text().replace("ZImagePipeline", "FluxPipeline"))
    for args in (["generate", "a cat", "--model"], ["plan"], ["verify"], ["convert"]):
        result = run(*args, DEFAULT_MODEL, *(["out"] if args == ["convert"] else []))
        assert (result.returncode, result.stdout) == (4, ""), result.stderr
        assert "FluxPipeline" in result.stderr
    assert hub.sent and all(name.endswith(".json") and "tokenizer" not in name for name in hub.sent)


def test_a_repository_without_an_index_is_refused_after_its_configs(run, hub, tmp_path):
    (tmp_path / "repository/model_index.json").unlink()
    hub.serve(tmp_path / "repository")
    result = run(*GENERATE, "--model", DEFAULT_MODEL)
    assert result.returncode == 4 and "has no model_index.json" in result.stderr
    assert not any(name.endswith(".safetensors") for name in hub.sent)


def test_a_repository_of_another_architecture_is_refused_after_its_headers(run, hub, tmp_path):
    config = tmp_path / "repository/vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 3}))
    result = run(*GENERATE, "--model", DEFAULT_MODEL)
    assert result.returncode == 4 and "vae" in result.stderr, result.stderr
    assert all(sent <= HEADER_BYTES for name, sent in hub.sent.items() if name.endswith(".safetensors"))


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
        shutil.rmtree(run.cache, ignore_errors=True)
        options = ["--variant", variant] if variant else []
        result = run(*GENERATE, "--model", DEFAULT_MODEL, *options, MLX_ZIMAGE_EMBEDDINGS="off")
        assert result.returncode == 0, result.stderr
        assert hub.sent[f"vae/{read}"] > (vae / read).stat().st_size and f"vae/{left}" not in hub.sent
        assert not any(is_hidden(path) for path in hub.sent)
    result = run(*GENERATE, "--model", DEFAULT_MODEL, "--variant", "fp8")
    assert result.returncode == 2 and "(fp16); got 'fp8'" in result.stderr


def test_plan_and_info_of_an_id_fetch_configs_and_headers_only(run, hub):
    planned, local = run("plan", DEFAULT_MODEL), run("plan", "pocket")
    assert (planned.returncode, planned.stdout) == (0, local.stdout), planned.stderr
    shown, here = (json.loads(run("info", source, "--json").stdout) for source in (DEFAULT_MODEL, "pocket"))
    assert shown["networks"] == here["networks"] and shown["fingerprint"] is None
    weights = [name for name in hub.files if name.endswith(".safetensors") and "controlnet" not in name]
    assert shown["bytes_to_fetch"] == sum(hub.files[name].stat().st_size for name in weights)
    assert not any("tokenizer" in name or "controlnet" in name for name in hub.sent)
    assert all(hub.sent[name] == 2 * HEADER_BYTES for name in weights), "one header for each of two commands"


def test_a_repository_that_mflux_uploaded_is_used_as_it_is(run, hub, mflux, few_tokens, tmp_path, monkeypatch):
    folder = shutil.copytree(mflux / "mflux-4", tmp_path / "mflux")
    (folder / "tokenizer").mkdir()
    shutil.copy(few_tokens, folder / "tokenizer/tokenizer.json")
    hub.serve(folder, "someone/z-image-mflux-4bit")
    monkeypatch.setattr(official, "CONFIGS", mflux_folders.CONFIGS)
    shown = json.loads(run("info", "someone/z-image-mflux-4bit", "--json").stdout)
    assert "4-bit affine" in shown["networks"]["transformer"]["stored_as"][0]
    assert all(count <= HEADER_BYTES for name, count in hub.sent.items() if name.endswith(".safetensors"))
    result = run(*GENERATE, "--model", "someone/z-image-mflux-4bit")
    assert result.returncode == 0, result.stderr
    assert read_origin(run.work / "image.png").model == "someone/z-image-mflux-4bit"
    fetched = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix == ".safetensors")
    on_disk = [path for path in tmp_path.joinpath("home").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in on_disk) < fetched + 100_000, "no second copy"


def test_a_repository_with_only_quantized_files_is_converted_from_what_its_headers_show(run, hub, tmp_path):
    folder = tmp_path / "quantized/split_files/diffusion_models"
    folder.mkdir(parents=True)
    mixed(folder / "z_image_nvfp4.safetensors", forms=("nvfp4",))
    (folder / "another.safetensors").write_bytes((POCKET / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    hub.serve(tmp_path / "quantized", "someone/quantized")
    result = run("convert", "someone/quantized", "out", "--base", "pocket")
    assert result.returncode == 0, result.stderr
    sent = {name.rpartition("/")[2]: count for name, count in hub.sent.items()}
    assert sent["another.safetensors"] <= HEADER_BYTES < sent["z_image_nvfp4.safetensors"]


def test_a_model_in_a_folder_of_a_repository_is_used_as_it_is(run, hub, tmp_path, light_pocket):
    for bits in (4, 8):
        convert("pocket", tmp_path / f"several/{bits}bit", bits=bits)
    hub.serve(tmp_path / "several", "someone/several")
    result = run("info", "someone/several")
    assert result.returncode == 4 and "but these folders in it do: 4bit, 8bit; expected" in result.stderr
    result = run("info", "someone/several:4bit")
    assert "4-bit affine" in result.stdout and "has not been downloaded" in result.stdout, result.stderr
    assert run(*GENERATE, "--model", "someone/several:4bit").returncode == 0
    assert run(*GENERATE, "--model", tmp_path / "several/4bit").returncode == 0
    assert (run.work / "image.png").read_bytes()[-100:] == (run.work / "image-1.png").read_bytes()[-100:]
    assert not any(name.startswith("8bit/") and not name.endswith(".json") for name in hub.sent)
    (snapshot,) = run.cache.glob("hub/*/snapshots/*")
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


def test_verify_of_an_id_compares_every_file_with_its_checksums(run, hub, tmp_path, light_pocket):
    published = convert("pocket", tmp_path / "published", bits=4)
    (published / "README.md").write_text("# A model\n")
    sums = manifest.read_manifest(published) | {"README.md": manifest.sha256(published / "README.md")}
    (published / manifest.MANIFEST).write_bytes(manifest.render_manifest(sums))
    hub.serve(published)
    assert run(*GENERATE, "--model", DEFAULT_MODEL).returncode == 0
    (snapshot,) = run.cache.glob("hub/*/snapshots/*")
    assert not (snapshot / "README.md").exists()
    assert run("verify", snapshot).returncode == 0, "a model needs no README"
    result = run("verify", DEFAULT_MODEL)
    assert result.returncode == 0 and "all checksums match" in result.stdout, result.stderr
    (readme,) = run.cache.rglob("README.md")
    readme.resolve().write_text("# Another\n")
    result = run("verify", DEFAULT_MODEL)
    assert result.returncode == 4 and "README.md: has sha256" in result.stdout


@pytest.mark.parametrize("args", [["--yes"], slow(["--model", DEFAULT_MODEL])])
def test_being_offline_exits_with_3(run, args):
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        result = run.process(*GENERATE, *args, **variables)
        assert (result.returncode, result.stdout) == (3, "")
        assert "the hub cannot be reached; check the network and HF_HUB_OFFLINE" in result.stderr
        assert "Retrying" not in result.stderr and "Traceback" not in result.stderr


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
