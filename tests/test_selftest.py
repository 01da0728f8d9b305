"""The self-test passes on this machine, and detects a wrong result from each of its operations."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_zimage import machine, selftest
from mlx_zimage.models import layers
from mlx_zimage.quantization import Quantization
from mlx_zimage.selftest import Samples, cases, every_quantization, self_test

pytestmark = pytest.mark.metal

CASES = cases(every_quantization())
LARGE = mx.default_device() == mx.gpu


def operations(name: str) -> list[tuple]:
    """What may compute a case, by backend, dtype and number of rows: modules, and the names of their functions."""
    if name.endswith("packing"):
        return [(mx, "quantize")]
    if "-bit" in name:
        return [(mx, "quantized_matmul"), (mx, "dequantize"), (layers, "unpack")]
    if "convolution" in name:
        return [(mx, "addmm"), (mx, "conv2d"), (mx, "conv_general")]
    if "attention" in name:
        return [(mx.fast, "scaled_dot_product_attention")]
    if name.startswith("product"):
        return [(mx, "addmm" if name.endswith("bias") else "matmul")]
    if name.startswith("hand-off"):
        return [(mx, "load")]
    return {
        "RMS norm": [(mx.fast, "rms_norm")],
        "layer norm": [(mx.fast, "layer_norm")],
        "norm and rotation": [(mx.fast, "rms_norm")],
        "rotation": [(mx.fast, "rope")],
        "scale, shift and SiLU": [(selftest, "affine_silu")],
        "moments": [(selftest, "row_moments")],
    }[name]


def spoilt(found, how: str):
    """An array with a fault; of several, the second: the scales that a weight was packed with."""
    if isinstance(found, dict):
        return {name: spoilt(array, how) for name, array in found.items()}
    if isinstance(found, list | tuple):
        return [found[0], spoilt(found[1], how), *found[2:]]
    if how == "one value":
        return found + (3 * (mx.arange(found.size).reshape(found.shape) == found.size // 3)).astype(found.dtype)
    return found * {"NaN": mx.nan, "zeros": 0, "scale": 1.01}[how]


def test_this_machine_passes():
    checks = list(self_test())
    assert len(checks) == 3 * len(CASES)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@pytest.mark.parametrize("how", ["one value", "NaN", "zeros", "scale"])
@pytest.mark.parametrize("name", CASES)
def test_an_operation_that_computes_wrongly_is_found(monkeypatch, name, how):
    if name.endswith("packing") and how in ("NaN", "scale"):
        how = "one value"  # scales may be integers, and a hundredth more may be right
    for module, function in operations(name):
        right = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *args, right=right, **options: spoilt(right(*args, **options), how)
        )
    trial = CASES[name](Samples(), large=False)
    error, problem = selftest.measure(trial, mx.float32)
    assert (problem is not None) if how == "NaN" else (problem is None and error > selftest.limit("float32"))


def test_an_operation_that_a_gpu_lacks_fails_and_the_others_still_run(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("[metal::Device] Unable to load kernel rmsbfloat16")

    monkeypatch.setattr(mx.fast, "layer_norm", missing)
    checks = list(self_test(["float32"], []))
    (failed,) = [check for check in checks if not check.passed]
    assert (failed.name, failed.error) == ("layer norm", None)
    assert failed.problem == "MLX raised [metal::Device] Unable to load kernel rmsbfloat16"


@pytest.mark.parametrize("q", every_quantization(), ids=str)
def test_packed_weights_are_read_as_mlx_packs_them(q):
    weight = mx.random.normal((8, 128), key=mx.random.key(0))
    parts = mx.quantize(weight, group_size=q.group_size, bits=q.bits, mode=q.mode)
    codes = selftest.unpack_bits(np.array(parts[0]), q.bits)
    assert np.array_equal(selftest.pack_bits(codes, q.bits), np.array(parts[0]))
    numbers = codes if q.mode == "affine" else selftest.every_number(q.bits)[codes]
    scales = selftest.scale_values(q, np.array(parts[1]))[..., None]
    biases = np.array(parts[2])[..., None] if q.mode == "affine" else 0
    unpacked = (numbers.reshape(*scales.shape[:2], -1) * scales + biases).reshape(8, 128)
    expected = mx.dequantize(*parts, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=mx.float32)
    # float32, |values| < 4: the product and the sum are rounded once each
    assert np.abs(unpacked - np.array(expected)).max() < 1e-6


def test_samples_are_the_same_numbers_in_every_dtype():
    x = Samples()(1000)
    for dtype in (mx.bfloat16, mx.float16):
        assert np.array_equal(np.array(mx.array(x).astype(dtype).astype(mx.float32)), x)


def test_only_the_chosen_dtypes_and_quantizations_are_checked():
    names = {(check.name, check.dtype) for check in self_test(["float16"], [Quantization(4, 32)])}
    assert {dtype for _, dtype in names} == {"float16"}
    assert {name for name, _ in names if "-bit" in name} == {
        f"4-bit affine in groups of 32 {kind}" for kind in ("product", "product, few rows", "packing")
    }


def test_float32_may_err_more_where_matrix_units_round_to_tf32(monkeypatch):
    assert selftest.limit("float32") == 1e-3 or machine.has_matrix_units()
    monkeypatch.setattr(selftest, "has_matrix_units", lambda: True)
    assert (selftest.limit("float32"), selftest.limit("float16")) == (3e-3, 4e-3)


@pytest.mark.skipif(LARGE, reason="a GPU runs them in the first test")
@pytest.mark.parametrize("name", ["attention", "convolution of stride 2", "RMS norm", "moments"])
@pytest.mark.slow
def test_the_large_shapes_pass_too(name):
    error, _ = selftest.measure(CASES[name](Samples(), True), mx.float32)
    assert error < 1e-5
