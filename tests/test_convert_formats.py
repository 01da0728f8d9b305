"""Exporting: diffusers and ComfyUI can read what the converter writes for them."""

import json

import mlx.core as mx
import numpy as np
import pytest
from lanes import slow

from mlx_zimage.convert import convert, layout
from mlx_zimage.convert.sources import open_source
from mlx_zimage.convert.verify import verify
from mlx_zimage.errors import RequestError
from mlx_zimage.models import NETWORKS
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.names import COMFYUI_PREFIXES, comfyui_name, places


def read(source, component):
    tensors = open_source(source, base="pocket").components[component].tensors
    return {tensor.name: tensor.read(0, tensor.shape[0]) for tensor in tensors}


def assert_equal(a, b):
    for component in NETWORKS:
        ours, theirs = read(a, component), read(b, component)
        assert list(ours) == list(theirs)
        assert all(mx.array_equal(ours[name].astype(mx.float32), theirs[name].astype(mx.float32)) for name in ours)


@pytest.mark.parametrize(
    ("component", "config"),
    [("transformer", TransformerConfig()), ("text_encoder", TextEncoderConfig()), ("vae", VAEConfig())],
)
def test_comfyui_names_map_back_to_those_of_diffusers(component, config):
    fused = set()
    for name in config.shapes():
        there = comfyui_name(component, name)
        back = places(COMFYUI_PREFIXES[component] + there)
        assert (component, name) in {(place.component, place.name) for place in back}
        fused.add(there)
    # the published transformer has 453 tensors: two fewer in each of 34 blocks
    assert len(fused) == {"transformer": 453, "text_encoder": 398, "vae": 244}[component]


def test_a_comfyui_file_contains_the_whole_model(tmp_path):
    file = convert("pocket", tmp_path / "all.safetensors", format="comfyui")
    assert [path.name for path in tmp_path.iterdir()] == ["all.safetensors"]
    stored = mx.load(str(file))
    assert stored["model.diffusion_model.layers.0.attention.qkv.weight"].shape == (576, 192)
    assert stored["vae.decoder.mid.attn_1.q.weight"].ndim == 4
    assert_equal(file, "pocket")
    with pytest.raises(RequestError, match="already exists"):
        convert("pocket", file, format="comfyui")


def test_a_diffusers_folder_has_the_files_that_diffusers_looks_for(tmp_path, monkeypatch):
    out = convert("pocket", tmp_path / "single", format="diffusers", dtype="float32")
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert (out / "text_encoder" / "model.safetensors").is_file()
    assert not list(out.rglob("*.index.json"))
    assert_equal(out, "pocket")
    assert not verify(out)
    monkeypatch.setattr(layout, "SHARD_BYTES", 4_000_000)
    out = convert("pocket", tmp_path / "sharded", format="diffusers")
    index = json.loads((out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(p.name for p in out.glob("transformer/*.safetensors"))
    assert all(mx.load(str(p), return_metadata=True)[1] == {"format": "pt"} for p in out.rglob("*.safetensors"))
    assert_equal(out, "pocket")


def test_a_quantized_folder_is_exported_dense(tmp_path):
    packed = convert("pocket", tmp_path / "packed", bits=4)
    out = convert(packed, tmp_path / "out", format="diffusers", dtype="float32")
    assert not any(part.quantizations for part in open_checkpoint(out).components)
    assert_equal(out, packed)


@pytest.mark.slow
def test_diffusers_loads_an_exported_folder(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(layout, "SHARD_BYTES", 4_000_000)
    out = convert("pocket", tmp_path / "out", format="diffusers")
    theirs = diffusers.ZImagePipeline.from_pretrained(out)
    for component in NETWORKS:
        state, ours = getattr(theirs, component).state_dict(), read("pocket", component)
        for name, array in ours.items():
            name = name.removeprefix("model.") if component == "text_encoder" else name
            assert np.array_equal(state[name].float().numpy(), np.array(array.astype(mx.float32)))


@pytest.mark.parametrize("form", [slow("fp8"), "int8"])
def test_a_file_for_comfyui_may_be_quantized_as_comfyui_quantizes(tmp_path, form):
    file = convert("pocket", tmp_path / "all.safetensors", format=f"comfyui-{form}")
    assert file.stat().st_size < 0.75 * convert("pocket", tmp_path / "x.safetensors", format="comfyui").stat().st_size
    stored = mx.load(str(file))
    layer = "model.diffusion_model.layers.0.attention.qkv"
    mark = json.loads(bytes(stored[f"{layer}.comfy_quant"]))
    assert stored[f"{layer}.weight"].shape == (576, 192)
    if form == "fp8":
        assert mark == {"format": "float8_e4m3fn"} and stored[f"{layer}.weight_scale"].shape == ()
    else:
        assert mark == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
        assert stored[f"{layer}.weight"].dtype == mx.int8 and stored[f"{layer}.weight_scale"].shape == (576, 1)
    for component in NETWORKS:
        ours, theirs = read("pocket", component), read(file, component)
        assert list(ours) == list(theirs)
        for name, exact in ours.items():
            exact, error = exact.astype(mx.float32), theirs[name].astype(mx.float32) - exact.astype(mx.float32)
            if exact.ndim != 2 or not mx.any(error != 0):
                assert not mx.any(error != 0), name
            elif form == "fp8":  # half a unit in the last of 3 bits, or of the smallest number
                bound = mx.maximum(mx.abs(exact) / 16, 2.0**-10 * mx.abs(exact).max() / 448 * 4)
                assert (mx.abs(error) <= bound).all(), name
            else:  # a rotation keeps lengths: half a step per value, of a row's largest after rotation
                most = mx.sqrt(mx.square(exact).sum(1))
                assert (mx.sqrt(mx.square(error).mean(1)) <= most / 127 / 2).all(), name


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "comfyui-int8"])
def test_quantization_is_refused_for_formats_that_cannot_store_it(tmp_path, form):
    with pytest.raises(RequestError, match=f"format {form} cannot hold MLX's quantized weights"):
        convert("pocket", tmp_path / "out", format=form, bits=4)
    with pytest.raises(
        RequestError, match="format must be one of mlx, diffusers, comfyui, comfyui-fp8, comfyui-int8, got 'gguf'"
    ):
        convert("pocket", tmp_path / "out", format="gguf")
