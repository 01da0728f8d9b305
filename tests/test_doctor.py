import mlx.core as mx
import numpy as np
import pytest

from mlx_zimage import doctor
from mlx_zimage.doctor import integers, self_test
from mlx_zimage.machine import backend


def test_this_machine_passes():
    checks = list(self_test())
    assert len(checks) >= len(doctor.CASES)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@pytest.mark.parametrize(
    ("machine", "will_do", "verdict"),
    [
        (("Darwin", "15.1", "arm64", True, 24e9, 100e9), [True] * 4, "in bfloat16 (20.5 GB) stays in memory"),
        (("Darwin", "14.0", "arm64", True, 5e9, 30e9), [True, True, False, False], "in 4 bits (6.7 GB) is streamed"),
        (("Darwin", "13.7.1", "arm64", True, 12e9, 100e9), [False, True, True, True], "macOS 14 or newer; this is"),
        (("Darwin", "15.1", "x86_64", True, 13e9, 44e9), [False, True, True, False], "needs 44 GB; 44 GB are free"),
        (("Linux", "", "x86_64", False, 24e9, 100e9), [True, False, True, True], "on the CPU: correct, but minutes"),
    ],
)
def test_machines_are_judged_by_what_the_full_model_needs(machine, will_do, verdict):
    verdicts = doctor.judge(*machine)
    assert [verdict.will_do for verdict in verdicts] == will_do
    assert any(verdict in each.told for each in verdicts), verdicts


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_weights_are_unpacked_as_mlx_packs_them(bits):
    weight = mx.random.normal((8, 128), key=mx.random.key(0))
    packed, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
    expected = np.array(mx.dequantize(packed, scales, biases, group_size=64, bits=bits))
    unpacked = integers(np.array(packed), bits).reshape(8, 2, 64) * np.array(scales)[..., None]
    # float32, |values| < 4: the product and the sum are rounded once each
    assert np.abs((unpacked + np.array(biases)[..., None]).reshape(8, 128) - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("module", "name", "case"),
    [
        (mx, "dequantize", "8-bit product"),
        (mx, {"cpu": "addmm", "cuda": "conv2d", "metal": "conv_general"}[backend()], "convolution"),
        (mx.fast, "scaled_dot_product_attention", "attention"),
        (mx.fast, "rms_norm", "RMS norm"),
    ],
)
@pytest.mark.parametrize("broken", ["one value", "NaN", "zeros", "scale"])
@pytest.mark.parametrize("alone", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["alone", "among all"])
def test_a_broken_operation_is_detected(monkeypatch, module, name, case, broken, alone):
    right = getattr(module, name)

    def wrong(*args, **options):
        result = right(*args, **options)
        if broken == "one value":
            index = mx.arange(result.size).reshape(result.shape) == result.size // 3
            return result + 3 * index
        return result * {"NaN": mx.nan, "zeros": 0.0, "scale": 1.01}[broken]

    monkeypatch.setattr(module, name, wrong)
    if alone:
        monkeypatch.setattr(doctor, "CASES", {case: doctor.CASES[case]})
    assert f"{case} in float32" in {check.name for check in self_test() if not check.passed}


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="a GPU runs them in the first test")
@pytest.mark.parametrize("name", ["attention", "convolution", "RMS norm"])  # a single product takes minutes on a CPU
@pytest.mark.slow
def test_the_large_shapes_pass_too(name):
    found, expected = doctor.CASES[name](doctor.Samples(mx.float32), large=True)
    assert np.abs(np.array(found) - expected).max() / np.abs(expected).max() < 1e-5
