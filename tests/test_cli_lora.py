"""LoRAs on the command line: generate --lora, lora info, lora convert and fuse."""

import json
import os
import re
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from hub import Hub, User
from lanes import slow
from PIL import Image

from mlx_zimage import ZImagePipeline
from mlx_zimage.cli import main
from mlx_zimage.cli.adapters import split_strengths
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.lora import read_lora

pytestmark = pytest.mark.usefixtures("light_pocket")


def configs() -> dict:
    model = open_checkpoint("pocket")
    return {name: model.networks[name].config for name in ("text_encoder", "transformer")}


def write(path: Path, seed: int = 0, factors: str = "lora_down lora_up", metadata: dict | None = None) -> Path:
    """A low-rank LoRA on the attention of all layers of pocket, or of what stands in for it."""
    down, up = factors.split()
    rng, tensors = np.random.default_rng(seed), {}
    shapes = {name: shape for name, shape in configs()["transformer"].shapes().items() if ".attention.to_" in name}
    for name, (rows, columns) in shapes.items():
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        tensors[f"{layer}.{down}.weight"] = mx.array(rng.standard_normal((4, columns), np.float32) * 0.1)
        tensors[f"{layer}.{up}.weight"] = mx.array(rng.standard_normal((rows, 4), np.float32) * 0.1)
        tensors[f"{layer}.alpha"] = mx.array(2.0)
    mx.save_safetensors(str(path), tensors, metadata or {})
    return path


@pytest.fixture
def style(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "style.safetensors", metadata={"modelspec.trigger_phrase": "zstyle"})


def run(*args: object, text: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=text)


def generate(*args: object, text: str | None = None, output: str = "a.png") -> np.ndarray:
    result = run("generate", "-m", "pocket", "--size", "48x48", "--steps", "2", "-q", "-o", output, *args, text=text)
    assert result.exit_code == 0, result.output
    return np.asarray(Image.open(result.stdout.strip()))


def test_a_strength_follows_the_path_if_it_is_a_number(style):
    model = generate("a red circle", "--seed", "1")
    full = generate("a red circle", "--seed", "1", "--lora", style)
    half = generate("--seed", "1", "--lora", style, "0.5", "a red circle")
    assert (model != full).any() and (full != half).any()
    assert (generate("a red circle", "--seed", "1", "--lora", style, "0") == model).all()
    mflux = generate("a red circle", "--seed", "1", "--lora-paths", style, "--lora-scales", "0.5")
    assert (mflux == half).all()


@pytest.mark.parametrize(
    "args, rest, strengths",
    [
        ("--lora a 0.5 --lora b prompt", "--lora a --lora b prompt", [0.5, None]),
        ("--lora=a 0.5 prompt", "--lora=a prompt", [0.5]),
        ("--lora a -1 p", "--lora a p", [-1.0]),
        ("--lora a nan", "--lora a nan", [None]),
        ("-- --lora a 1", "-- --lora a 1", []),
        ("p --lora-paths a b --lora-scales 1 0.5 --seed 3", "p --seed 3 --lora a --lora b", [1.0, 0.5]),
        ("--lora-paths a --lora b 2 -- 7", "--lora b --lora a -- 7", [2.0, None]),
        ("p --lora-paths=a b --lora-scales=1 0.5 --seed 3", "p --seed 3 --lora a --lora b", [1.0, 0.5]),
        ("p --lora-paths=a --lora-paths=b", "p --lora a --lora b", [None, None]),
    ],
)
def test_strengths_are_taken_out_of_the_arguments(args, rest, strengths):
    assert split_strengths(args.split()) == (rest.split(), strengths)


def test_json_requests_name_files_or_loras_given_with_the_command(style, tmp_path):
    other = write(tmp_path / "other.safetensors", 1)
    both = generate("a red circle", "--seed", "1", "--lora", style, "0.5", "--lora", other, "0.25")
    loras = [{"name": "style", "strength": 0.5}, {"path": str(other), "strength": 0.25}]
    request = json.dumps({"prompt": "a red circle", "seed": 1, "loras": loras})
    assert (generate("--requests", "-", "--lora", style, text=request) == both).all()


def test_an_image_names_its_loras_and_asks_for_their_files(style):
    image = generate("a red circle", "--seed", "1", "--lora", style, "0.75", output="old.png")
    (use,) = read_origin(Path("old.png")).request.loras
    assert (use.name, use.strength) == ("style", 0.75)
    result = run("generate", "--from", "old.png", "-m", "pocket", "-q")
    assert result.exit_code == 2 and f"LoRA 'style' (SHA-256 {use.sha256}); give its file with --lora" in result.stderr
    renamed = style.rename(style.with_stem("renamed"))
    assert (generate("--from", "old.png", "--lora", renamed) == image).all()
    assert (generate("--from", "old.png", "--lora", renamed, "0.1") != image).any()
    assert re.search(r'Lora hashes: "style: [0-9a-f]{12}", Lora weights: "style: 0.75"', run("info", "old.png").stdout)


@pytest.mark.parametrize("path", ["/home/me/style.safetensors", slow("someone/loras:style.safetensors")])
def test_an_image_of_mflux_names_its_loras_and_asks_for_their_files(style, path):
    stored = {"mflux_version": "0.24.0", "prompt": "a red circle", "seed": 1, "width": 48, "height": 48, "steps": 2}
    stored |= {"lora_paths": [path], "lora_scales": [0.75]}
    Path("old.json").write_text(json.dumps(stored))
    result = run("generate", "--from", "old.json", "-m", "pocket", "-q")
    assert result.exit_code == 2 and "was generated with LoRA 'style'; give its file with --lora FILE" in result.stderr
    image = generate("--from", "old.json", "--lora", style)
    assert (image == generate("a red circle", "--seed", "1", "--rng", "mlx", "--lora", style, "0.75")).all()
    assert (image != generate("--from", "old.json", "--lora", style, "0.1")).any()


@pytest.mark.parametrize(
    "args, message",
    [
        (["a <lora:style:0.8> cat"], "--lora style.safetensors 0.8"),
        (["a <LoRA:style> cat"], "--lora style.safetensors 1"),
        (["a <lyco:style:0.8> cat"], "--lora style.safetensors 0.8"),
        (["a cat", "--lora-paths", "--seed", "1"], "--lora-paths must be followed by a path, got --seed"),
        (
            ["a cat", "--lora-paths", "a", "--lora-scales", "high"],
            "--lora-scales must be followed by a number, got high",
        ),
        (["a cat", "--lora-paths=a", "--lora-scales=high"], "--lora-scales must be followed by a number, got high"),
        (["a cat", "--lora-paths="], "no LoRA at ''"),
        (["a cat", "--lora", "none.safetensors"], "no LoRA at none.safetensors"),
        (
            ["a cat", "--lora-paths", "a", "--lora-scales", "1", "2"],
            "one strength per file of --lora-paths, 1 in all, got 2",
        ),
        (["a cat", "--lora", "style.safetensors", "1e9"], "strength of LoRA style must be from -1000"),
        (["a cat", "--lora", "style.safetensors", "--lora", "copy.safetensors"], "already loaded as 'style'"),
        (["a cat", "--lora", "style.safetensors", "--lora", "style.safetensors", "0.5"], "was given 2 times"),
        (["a cat", "--lora", ""], "no LoRA at ''"),
    ],
)
def test_wrong_loras_are_refused_before_work(style, args, message):
    Path("copy.safetensors").write_bytes(style.read_bytes())
    result = run("generate", *args, "-m", "pocket")
    assert result.exit_code in (2, 3) and message in result.stderr


def test_two_files_of_one_name_are_both_used_and_numbered(style, tmp_path):
    (tmp_path / "sub").mkdir()
    other = write(tmp_path / "sub/style.safetensors", 1)
    generate("a red circle", "--seed", "1", "--lora", style, "--lora", other, "0.5", output="both.png")
    uses = read_origin(Path("both.png")).request.loras
    assert [(use.name, use.strength) for use in uses] == [("style", 1.0), ("style-2", 0.5)]


def wrong_files(folder: Path, style: Path) -> dict[str, str]:
    """Files that are not LoRAs, and what is said of each."""
    contents = {
        "page": (b"<!DOCTYPE html><title>404</title>", "may be truncated, a Git LFS pointer or an HTML page"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        "empty": (b"", "not a complete safetensors file"),
        "cut": (style.read_bytes()[:-100], "may be truncated"),
        "pickle": (b"\x80\x02}q\x00.", "PyTorch pickle"),
        "zip": (b"PK\x03\x04" + bytes(20), "PyTorch pickle"),
        "gguf": (b"GGUF" + bytes(50), "not a complete safetensors file"),
        "text": (b"a style of mine", "not a complete safetensors file"),
    }
    tensors = {
        "flux": ("single_blocks.0.linear1.lora_A.weight", "a LoRA for Flux"),
        "sdxl": ("lora_te1_text_model_encoder_layers_0.lora_down.weight", "a LoRA for SDXL"),
        "checkpoint": ("blocks.0.weight", "a full checkpoint"),
        "control": ("control_layers.0.after_proj.weight", "a ControlNet"),
        "half": ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "the file is incomplete"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    for name, (key, _) in tensors.items():
        mx.save_safetensors(str(folder / f"{name}.safetensors"), {key: mx.ones((2, 2))})
        (folder / f"{name}.safetensors").rename(folder / name)
    folders = {
        "nothing": ({}, "without adapter_config.json"),
        "no-weights": ({"adapter_config.json": "{}"}, "no LoRA at"),
        "no-object": ({"adapter_config.json": "[1]"}, "expected a JSON object but got list"),
    }
    for name, (files, _) in folders.items():
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text)
    os.mkfifo(folder / "pipe")
    rows = {**contents, **tensors, **folders}
    return {name: message for name, (_, message) in rows.items()} | {"pipe": "not a regular file", "none": "no LoRA at"}


def test_every_kind_of_wrong_file_has_its_message_and_no_image(style, tmp_path):
    (tmp_path / "wrong").mkdir()
    for name, message in wrong_files(tmp_path / "wrong", style).items():
        result = run("generate", "a cat", "--lora", tmp_path / "wrong" / name, "-m", "pocket", "-q", "-o", "out.png")
        assert result.exit_code in (3, 4) and message in result.stderr, (name, result.output)
        assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
        assert name in result.stderr and not Path("out.png").exists()


def test_a_path_is_completed_to_files_and_its_strength_to_nothing_else(style):
    def completions(*args: str, incomplete: str = "") -> list[str]:
        complete = ShellComplete(main, {}, "mlx-zimage", "_X")
        return [item.type for item in complete.get_completions(["generate", *args], incomplete)]

    assert "file" in completions("--lora")
    assert "file" in completions("a cat", "--lora", "style.safetensors", "0.5", "--lora", incomplete="sty")
    assert completions("--lora", "style.safetensors", incomplete="--lora-p")


def test_lora_info_shows_what_a_file_contains(style):
    shown = run("lora", "info", style, "--model", "pocket")
    assert shown.exit_code == 0
    assert "style.safetensors: ComfyUI" in shown.stdout and "zstyle" in shown.stdout
    found = json.loads(run("lora", "info", style, "--model", "pocket", "--json").stdout)
    layers = sum(".attention.to_" in name for name in configs()["transformer"].shapes())
    assert found["networks"] == {"transformer": {"LowRank": layers}}
    assert (found["ranks"], found["alphas"], found["scales"], found["unmatched"]) == ([4], [2.0], [0.5], [])
    assert len(found["targets"]) == layers and f"targets: {found['targets'][0]}, " in shown.stdout
    assert run("lora", "info", style).exit_code == 4, "it is not for the published architecture"


@pytest.mark.parametrize("to", ["comfyui", "diffusers"])
def test_a_converted_lora_has_the_same_differences(style, to):
    result = run("lora", "convert", style, "out.safetensors", "--to", to, "--model", "pocket")
    assert result.exit_code == 0 and result.stdout == "out.safetensors\n"
    old, new = (read_lora(path, configs()).deltas["transformer"] for path in (style, Path("out.safetensors")))
    assert old.keys() == new.keys()
    for name, delta in old.items():
        own = mx.zeros(delta.shape)
        # float32: scale times up is rounded once more
        np.testing.assert_allclose(new[name].difference(own), delta.difference(own), rtol=1e-5, atol=1e-7)
    assert run("lora", "convert", style, "out.safetensors", "--to", to, "--model", "pocket").exit_code == 2, "it exists"


def test_a_converted_lora_that_cannot_be_written_is_an_error_that_names_it(style):
    result = run("lora", "convert", style, "none/out.safetensors", "--to", "comfyui", "--model", "pocket")
    assert result.exit_code == 6
    assert result.stderr == "Error: could not write none/out.safetensors: No such file or directory\n"


def test_what_diffusers_cannot_read_is_not_converted_for_it(tmp_path):
    d = configs()["transformer"].dim
    path, name = tmp_path / "lokr.safetensors", "diffusion_model.layers.0.attention.to_q"
    mx.save_safetensors(str(path), {f"{name}.lokr_w1": mx.ones((8, 8)), f"{name}.lokr_w2": mx.ones((d // 8, d // 8))})
    result = run("lora", "convert", path, tmp_path / "out.safetensors", "--to", "diffusers", "--model", "pocket")
    assert result.exit_code == 2 and "diffusers cannot read layers.0.attention.to_q.weight" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()
    assert run("lora", "convert", path, tmp_path / "out.safetensors", "--to", "comfyui", "-h").exit_code == 0


FUSED = [
    (["--dtype", "float32"], 1e-5),
    slow(["--dtype", "float32", "--format", "diffusers"], 1e-5),
    slow(["--dtype", "float32", "--format", "comfyui"], 1e-5),
    (["--q-bits", "8"], 0.2),
    slow(["--q-bits", "8", "--q-mode", "mxfp8"], 0.5),
]


@pytest.mark.parametrize("options, tolerance", FUSED)
def test_fused_equals_attached(style, options, tolerance):
    comfyui = "comfyui" in options  # a file, without a tokenizer
    dest = "fused.safetensors" if comfyui else "fused"
    assert run("fuse", "pocket", "--lora", style, "0.8", dest, *options, "-q").exit_code == 0
    call = {"num_inference_steps": 2, "seed": 1, "height": 64, "width": 64, "output_type": "latent"}
    attached = ZImagePipeline.from_pretrained("pocket", dtype="float32")
    attached.load_lora(style, strength=0.8)
    expected = attached("a red circle", **call).images
    parts = {"transformer": dest} if comfyui else {}
    fused = ZImagePipeline.from_pretrained("pocket" if comfyui else dest, dtype="float32", **parts)
    found = fused("a red circle", **call).images
    # in float32 only the order of sums differs, measured 8e-7; 8 bits round every weight
    assert np.abs(found - expected).max() <= tolerance
    conversion = json.loads(run("info", dest, "--json").stdout)["conversion"]
    assert conversion["loras"][0]["name"] == "style" and conversion["loras"][0]["strength"] == 0.8
    assert conversion["source"] == "pocket" and "by mlx-zimage" in run("info", dest).stdout
    assert ", with 1 LoRA" in run("info", dest).stdout


def test_fuse_needs_a_lora_and_writes_nothing_for_a_wrong_one(style, tmp_path):
    assert "give at least one LoRA" in run("fuse", "pocket", "fused").stderr
    wrong = tmp_path / "wrong.safetensors"
    mx.save_safetensors(
        str(wrong), {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": mx.ones((2, 2))}
    )
    result = run("fuse", "pocket", "--lora", wrong, "fused", "-q")
    assert result.exit_code == 4 and "a LoRA for Flux" in result.stderr and not Path("fused").exists()


@pytest.fixture
def served(tmp_path):
    """Runs `lora info` with a hub that serves tmp_path / "served" as me/style."""
    (tmp_path / "served").mkdir()
    with Hub(tmp_path / "served", "me/style") as hub:
        user = User(tmp_path, hub)

        def info(source: str, online: bool = True) -> subprocess.CompletedProcess:
            hub.serve(tmp_path / "served")
            offline = {} if online else {"HF_HUB_OFFLINE": "1"}
            return user("lora", "info", source, "--model", "pocket", "--json", **offline)

        yield info


def test_an_id_with_one_file_is_enough_and_later_works_offline(served, tmp_path):
    write(tmp_path / "served/style.safetensors")
    for online in (True, False):
        assert json.loads(served("me/style", online).stdout)["file"] == "style.safetensors"


def test_an_id_with_several_files_is_refused_with_a_list_to_choose_from(served, tmp_path):
    (tmp_path / "served/more").mkdir()
    write(tmp_path / "served/style.safetensors")
    write(tmp_path / "served/more/other.safetensors", 1)
    several = served("me/style")
    assert several.returncode == 3 and several.stdout == ""
    assert "choose one: me/style:more/other.safetensors; me/style:style.safetensors" in several.stderr
    wrong = served("me/style:none.safetensors")
    assert wrong.returncode == 3
    assert "has no none.safetensors; it has more/other.safetensors, style.safetensors" in wrong.stderr
    for online in (True, False):
        assert json.loads(served("me/style:more/other.safetensors", online).stdout)["file"] == "other.safetensors"


def test_pefts_repository_comes_with_its_config(served, tmp_path):
    layer = "base_model.model.layers.0.attention.to_q"
    factors = {f"{layer}.lora_A.weight": mx.ones((4, 192)), f"{layer}.lora_B.weight": mx.ones((192, 4))}
    mx.save_safetensors(str(tmp_path / "served/adapter_model.safetensors"), factors)
    (tmp_path / "served/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 1}))
    for online in (True, False):
        found = json.loads(served("me/style", online).stdout)
        assert (found["dialect"], found["scales"]) == ("PEFT", [0.25])
