"""Models as other programs keep them, read where they are."""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_zimage import ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.errors import CheckpointError, RequestError
from mlx_zimage.models import NETWORKS
from mlx_zimage.weights import checkpoint, official
from mlx_zimage.weights.checkpoint import BorrowedFromHub, open_checkpoint
from mlx_zimage.weights.hub import POCKET

sys.path.insert(0, str(tiny.GOLDEN))
import mflux_folders

PROMPT = "a red circle on a blue background"


class FromPocket:
    """In place of the official repository: everything that it has is here."""

    def __init__(self, _):
        self.folder = POCKET
        self.sizes: dict = {}

    def names(self, folder):
        return [path.name for path in folder.iterdir()]

    def matching(self, *_):
        return []

    def own(self, files):
        return [file for file in files if file.is_relative_to(self.folder)]

    def to_fetch(self, _):
        return 0

    def fetch(self, _):
        pass


@pytest.fixture
def pocket_is_official(monkeypatch):
    configs = {name: getattr(open_checkpoint("pocket"), name).raw_config for name in NETWORKS}
    monkeypatch.setattr(official, "CONFIGS", configs)
    monkeypatch.setattr(checkpoint, "Repository", FromPocket)


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory) -> Path:
    """Pocket as ComfyUI keeps it: models/ with a file for each network."""
    folder = tmp_path_factory.mktemp("comfyui")
    convert("pocket", folder / "all.safetensors", format="comfyui")
    whole = mx.load(str(folder / "all.safetensors"))
    for network, place, prefix in (
        ("transformer", "diffusion_models/dit", "model.diffusion_model."),
        ("text_encoder", "text_encoders/qwen", "text_encoders.qwen3_4b.transformer."),
        ("vae", "vae/ae", "vae."),
    ):
        file = folder / f"models/{place}.safetensors"
        file.parent.mkdir(parents=True)
        arrays = {name.removeprefix(prefix): array for name, array in whole.items() if name.startswith(prefix)}
        assert arrays, network
        mx.save_safetensors(str(file), arrays)
    return folder


def pixels(source, **parts) -> np.ndarray:
    pipe = ZImagePipeline.from_pretrained(source, dtype="float32", **parts)
    return np.asarray(pipe(PROMPT, num_inference_steps=2, width=64, height=64, seed=1).images[0])


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return pixels("pocket")


@pytest.mark.parametrize("source", ["all.safetensors", ".", "models"])
def test_comfyuis_files_generate_the_same_image(comfyui, pocket_is_official, expected, source):
    with pytest.warns(BorrowedFromHub, match="contains no tokenizer; using Tongyi-MAI/Z-Image-Turbo"):
        got = pixels(comfyui / source)
    assert (got == expected).all()


def test_what_a_file_lacks_comes_from_the_official_model(comfyui, pocket_is_official, expected):
    with pytest.warns(BorrowedFromHub, match="contains no text_encoder or vae or tokenizer"):
        got = pixels(comfyui / "models/diffusion_models/dit.safetensors")
    assert (got == expected).all()


def test_a_network_comes_from_its_own_folder_file_or_model(comfyui, expected, tmp_path, monkeypatch):
    configs = {name: getattr(open_checkpoint("pocket"), name).raw_config for name in NETWORKS}
    monkeypatch.setattr(official, "CONFIGS", configs)
    model = shutil.copytree(POCKET, tmp_path / "model")
    for name in NETWORKS:
        shutil.rmtree(model / name)
    parts = {
        "transformer": comfyui / "models/diffusion_models/dit.safetensors",
        "text_encoder": POCKET / "text_encoder",
        "vae": "pocket",
    }
    assert (pixels(model, **parts) == expected).all()
    assert (pixels(model, **parts | {"transformer": POCKET / "transformer", "vae": POCKET / "vae"}) == expected).all()
    with pytest.raises(RequestError, match="vae contains no text_encoder, only vae"):
        open_checkpoint(model, parts=parts | {"text_encoder": POCKET / "vae"})
    with pytest.raises(RequestError, match="contains no transformer, only text_encoder"):
        open_checkpoint(POCKET / "text_encoder")


def test_converting_takes_the_same_sources(comfyui, pocket_is_official, tmp_path):
    whole = convert("pocket", tmp_path / "whole")
    kinds = {
        "tree": {"source": comfyui},
        "parts": {"source": POCKET, "transformer": comfyui / "models", "vae": POCKET / "vae"},
    }
    for name, options in kinds.items():
        out = convert(dest=tmp_path / name, tokenizer="pocket", **options)
        for network in NETWORKS:
            for file in (whole / network).glob("*.safetensors"):
                assert file.read_bytes() == (out / network / file.name).read_bytes(), (name, file)


def test_one_of_several_files_must_be_named(comfyui, pocket_is_official, tmp_path):
    models = shutil.copytree(comfyui / "models", tmp_path / "models")
    vae = models / "vae/ae.safetensors"
    shutil.copy(models / "text_encoders/qwen.safetensors", models / "vae/not-a-vae.safetensors")
    with pytest.warns(BorrowedFromHub):
        assert open_checkpoint(models).vae.folder == vae, "the other is not a VAE"
    shutil.copy(vae, models / "vae/other.safetensors")
    with pytest.raises(RequestError, match=r"several files can be used as the vae: .*ae\.safetensors, .*other\.safe"):
        open_checkpoint(models)
    with pytest.warns(BorrowedFromHub):
        assert open_checkpoint(models, parts={"vae": vae}).vae.folder == vae


def test_what_only_the_converter_reads_is_refused_with_advice(comfyui, pocket_is_official, tmp_path):
    (tmp_path / "my models").mkdir()
    file = tmp_path / "my models/z-image.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=f"convert it first: mlx-zimage convert '{file}' DEST$"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    "bits", [4, *(pytest.param(bits, marks=pytest.mark.slow) for bits in mflux_folders.BITS if bits != 4)]
)
def test_folders_that_mflux_saved_are_used_as_they_are(mflux, few_tokens, monkeypatch, tmp_path, bits):
    monkeypatch.setattr(official, "CONFIGS", mflux_folders.CONFIGS)
    folder = shutil.copytree(mflux / f"mflux-{bits or 'dense'}", tmp_path / "mflux")
    (folder / "tokenizer").mkdir()
    shutil.copy(few_tokens, folder / "tokenizer/tokenizer.json")
    out = convert(folder, tmp_path / "out", dtype="float32", tokenizer=few_tokens)  # dequantized
    here, there = open_checkpoint(folder), open_checkpoint(out)
    for name in NETWORKS:
        direct, converted = here.networks[name], there.networks[name]
        assert set(direct.config.shapes()) == {key.replace(".scales", ".weight") for key in converted.entries}
        assert bool(direct.quantizations) == bool(bits)
        assert all((q.bits, q.group_size, q.mode) == (bits, 64, "affine") for q in direct.quantizations.values())
    images = []
    for source in (folder, out):
        pipe = ZImagePipeline.from_pretrained(source, dtype="float32")
        steps = list(pipe.denoise(tiny_request(), None))
        images.append(np.array(pipe.decode(steps[-1].latents[0])))
    # packed weights are multiplied in float32 either way; rounding of sums only
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1


MLX_VLM = {  # its names for diffusers' where they differ
    "t_embedder.mlp.0.": "t_embedder.linear1.",
    "t_embedder.mlp.2.": "t_embedder.linear2.",
    "all_x_embedder.2-1.": "x_embedder.",
    "all_final_layer.2-1.linear.": "final_layer.linear.",
    "all_final_layer.2-1.adaLN_modulation.1.": "final_layer.adaLN_modulation.0.",
    ".attentions.0.to_out.0.": ".attentions.0.to_out.",
}


def test_folders_in_the_form_of_mlx_vlm_are_used_as_they_are(expected, tmp_path):
    folder = shutil.copytree(POCKET, tmp_path / "mlx-vlm")
    for name in NETWORKS:
        (file,) = (folder / name).glob("*.safetensors")
        arrays = mx.load(str(file))
        file.unlink()
        for ours, theirs in MLX_VLM.items():
            arrays = {key.replace(ours, theirs): array for key, array in arrays.items()}
        arrays = {key: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for key, x in arrays.items()}
        mx.save_safetensors(str(folder / name / "model.safetensors"), arrays)
    assert (pixels(folder) == expected).all()
    assert (pixels("pocket", transformer=folder / "transformer", vae=folder) == expected).all()
    whole, out = convert("pocket", tmp_path / "whole"), convert(folder, tmp_path / "out")
    for file in whole.glob("*/*.safetensors"):
        assert file.read_bytes() == (out / file.relative_to(whole)).read_bytes()


def tiny_request():
    from mlx_zimage import GenerateRequest

    return GenerateRequest("a fox", width=32, height=32, steps=2, seed=1)


def test_quantized_folders_need_no_block_in_their_configs(tmp_path, expected):
    folder = convert("pocket", tmp_path / "4bit", bits=4)
    before = {name: network.quantizations for name, network in open_checkpoint(folder).networks.items()}
    for name in NETWORKS:
        file = folder / name / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in config.items() if "quantization" not in key}))
    assert {name: network.quantizations for name, network in open_checkpoint(folder).networks.items()} == before


def test_a_folder_of_gguf_files_is_refused_with_advice(tmp_path):
    (tmp_path / "z-image-Q4_K.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=f"GGUF files: .* mlx-zimage convert {tmp_path}/z-image-Q4_K.gguf DEST"):
        open_checkpoint(tmp_path)
