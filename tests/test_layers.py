"""The linear layer, which selects its product, and SiLU: every path gives the same numbers."""

import mlx.core as mx
import pytest

from mlx_zimage import machine
from mlx_zimage.models import layers
from mlx_zimage.models.layers import linear, silu

pytestmark = pytest.mark.metal


def packed(mode: str, bits: int, group_size: int) -> dict:
    parts = mx.quantize(mx.random.normal((96, 128), key=mx.random.key(0)), group_size=group_size, bits=bits, mode=mode)
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    return dict(zip(("weight", "scales", "biases"), parts, strict=False)) | {"packing": packing}


@pytest.mark.parametrize("bias", [{}, {"bias": mx.arange(96, dtype=mx.float32)}], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    "packing", [("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_the_number_of_rows_selects_the_product_without_changing_the_result(monkeypatch, watch, packing, bias):
    weights = packed(*packing) | bias
    x = mx.random.normal((2, 3, 128), key=mx.random.key(1))
    monkeypatch.setenv("MLX_ZIMAGE_UNPACK_FROM", "6")
    found = watch(layers, "dequantize")
    dense = linear(x, weights, machine.unpack_from())
    assert len(found) == 1
    as_it_is = linear(x[:, :2], weights, machine.unpack_from())
    assert len(found) == 1, "four rows are too few"
    # float32: sums of 128 products of order 1, in another order
    assert mx.abs(dense[:, :2] - as_it_is).max() < 1e-4


@pytest.mark.parametrize(("backend", "rows"), [("cpu", 0), ("metal", 512), ("cuda", 0)])
def test_each_backend_has_its_own_threshold(monkeypatch, backend, rows):
    monkeypatch.delenv("MLX_ZIMAGE_UNPACK_FROM", raising=False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: backend == "metal")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu if backend == "cpu" else mx.gpu))
    assert machine.unpack_from() == rows
    monkeypatch.setenv("MLX_ZIMAGE_UNPACK_FROM", "7")
    assert machine.unpack_from() == 7


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_8_bit_unpacking_on_cuda_matches_mlx_bit_for_bit(monkeypatch, watch, dtype, group_size):
    weights = {
        name: part.astype(dtype) if name in ("scales", "biases") else part
        for name, part in packed("affine", 8, group_size).items()
    }
    expected = layers.dequantize(weights, dtype)
    monkeypatch.setattr(layers, "backend", lambda: "cuda")
    found = watch(layers, "unpack")
    assert mx.array_equal(layers.dequantize(weights, dtype), expected)
    layers.dequantize(packed("affine", 4, group_size), dtype)
    layers.dequantize(packed("mxfp8", 8, 32), dtype)
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_silu_is_x_times_its_sigmoid_over_the_whole_range(dtype):
    largest = mx.finfo(dtype).max
    x = mx.concatenate([mx.linspace(-100, 100, 2001), mx.array([-largest, largest, 0.0])]).astype(dtype)
    expected = x.astype(mx.float32) * mx.sigmoid(x.astype(mx.float32))
    found = silu(x)
    assert found.dtype == dtype and mx.isfinite(found).all()
    # at most three roundings of the dtype, and the spacing of its smallest numbers
    assert mx.allclose(found.astype(mx.float32), expected, rtol=3 * mx.finfo(dtype).eps, atol=1e-6)
