"""Weights that comfy-kitchen quantizes are read as it dequantizes them itself, from a few rows to a full-size layer."""

import dataclasses
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_zimage.convert import convert
from mlx_zimage.convert.files import stored_weights
from mlx_zimage.weights.component import read_header

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from comfyui_layers import FORMATS, layer

torch = pytest.importorskip("torch")
kitchen = pytest.importorskip("comfy_kitchen")
ROTATED = ("int8-convrot", "w4a4", "w4a8", "w4a8-plain", "w6a8")
FULL = (3840, 10240)  # the transformer's feed_forward.w2


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_what_is_written_for_comfyui_is_what_comfy_kitchen_would_write(tmp_path, form):
    from safetensors.torch import load_file

    stored = load_file(convert("pocket", tmp_path / "all.safetensors", format=f"comfyui-{form}"))
    layer = "model.diffusion_model.layers.1.feed_forward.w2"  # 192 x 512, rotated in groups of 256
    dense = load_file(convert("pocket", tmp_path / "dense.safetensors", format="comfyui"))[f"{layer}.weight"].float()
    options = {"scale": float(dense.abs().max() / 448)}
    if form == "int8":
        options = {"per_channel": True, "convrot": True, "convrot_groupsize": 256}
    cls = getattr(kitchen.tensor, {"fp8": "TensorCoreFP8Layout", "int8": "TensorWiseINT8Layout"}[form])
    codes, params = cls.quantize(dense, **options)
    own = stored[f"{layer}.weight"]
    assert own.dtype == codes.dtype
    assert torch.allclose(stored[f"{layer}.weight_scale"], params.scale, rtol=1e-6)
    # sums are rounded in another order, which moves a few values across the midpoint between two codes
    assert (own.float() != codes.float()).float().mean() < 0.002
    mine = cls.dequantize(own, dataclasses.replace(params, scale=stored[f"{layer}.weight_scale"]))
    theirs = cls.dequantize(codes, params)
    assert (mine - dense).norm() < 1.001 * (theirs - dense).norm()


@pytest.mark.parametrize("shape", [(1, 256), (33, 512), (300, 1280), FULL], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_layers_have_the_values_that_comfy_kitchen_gives_them(tmp_path, name, shape):
    from safetensors.torch import save_file

    rows, columns = shape
    weight = np.random.default_rng(columns).standard_normal(shape, np.float32) / 50
    parts, expected = layer(name, torch.from_numpy(weight))
    save_file({f"x.{part}": tensor for part, tensor in parts.items()}, tmp_path / "x.safetensors")
    tensor = stored_weights(read_header(tmp_path / "x.safetensors"), [], "x")["x.weight"]
    # what is read has padding, to multiples of 16 or 32
    got = np.array(tensor.read(0, tensor.shape[0]).astype(mx.float32))[:rows, :columns]
    exact = expected[:rows, :columns].numpy()
    if name not in ROTATED:
        assert np.array_equal(got, exact)
    # comfy-kitchen sums a rotated group of up to 256 products in float32; here the sum is exact, and rounded once
    assert np.abs(got - exact).max() <= 2.0**-20 * np.abs(exact).max()
