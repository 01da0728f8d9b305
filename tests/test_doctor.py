"""What doctor says about machines: this one, and others described by given facts."""

import json
import math
import platform
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_zimage import doctor, machine, selftest
from mlx_zimage.doctor import Speeds
from mlx_zimage.selftest import Check
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.hub import POCKET

RIGHT = Check("attention", "float32", 1e-6, 1e-3, 0.1)
WRONG = Check("attention", "float32", 0.2, 1e-3, 0.1)
FACTS = {"matrix_units": False, "metal_wheel": "macosx_15_0_arm64", "macos": "26.4", "fast_synch": False}


@pytest.mark.parametrize(
    ("system", "ok", "message"),
    [
        (("Darwin", "15.1", "arm64"), True, "Darwin on arm64"),
        (("Darwin", "13.7.1", "arm64"), False, "macOS 14 or newer; this is macOS 13.7.1"),
        (("Darwin", "15.1", "x86_64"), False, "needs Apple silicon"),
        (("Linux", "", "x86_64"), True, "Linux on x86_64"),
        (("Windows", "", "AMD64"), False, "Windows"),
    ],
)
def test_systems_are_judged_by_what_mlx_is_built_for(system, ok, message):
    verdict = doctor.judge_system(*system)
    assert verdict.ok == ok and message in verdict.message


@pytest.mark.parametrize(
    ("backend", "virtual", "ok"),
    [("metal", False, True), ("metal", True, False), ("cuda", False, True), ("cpu", False, False)],
)
def test_a_cpu_and_a_virtual_gpu_are_limits(backend, virtual, ok):
    verdict = doctor.judge_gpu(backend, virtual)
    assert verdict.ok == ok and bool(verdict.advice) != ok


@pytest.mark.parametrize(
    ("budget", "free", "ok", "message"),
    [
        (24e9, 100e9, [True, True], "the bfloat16 model (20.5 GB) stays in memory"),
        (5e9, 20e9, [False, False], "the 4-bit model (6.7 GB) is read from disk for each image"),
        (13e9, 31.9e9, [True, False], "needs 32 GB; 32 GB is free"),
    ],
)
def test_memory_and_disk_are_judged_by_what_the_full_model_needs(budget, free, ok, message):
    verdicts = doctor.judge_room(budget, free)
    assert [verdict.ok for verdict in verdicts] == ok
    assert [bool(verdict.advice) for verdict in verdicts] == [not good for good in ok]
    assert any(message in verdict.message for verdict in verdicts), verdicts


def test_an_older_wheel_or_system_on_a_gpu_with_matrix_units_is_a_limit():
    assert doctor.judge_build(FACTS, supports_matrix_units=False) == []
    (slow,) = doctor.judge_build(FACTS, supports_matrix_units=True)
    assert not slow.ok and "macosx_15_0_arm64" in slow.message and "--force-reinstall" in slow.advice
    (fast,) = doctor.judge_build(FACTS | {"matrix_units": True}, supports_matrix_units=True)
    assert fast.ok and not fast.advice


def test_an_environment_in_which_mlx_hangs_is_a_limit(monkeypatch):
    monkeypatch.setenv("MLX_METAL_FAST_SYNCH", "1")
    (found,) = doctor.judge_build(doctor.facts() | {"matrix_units": False}, supports_matrix_units=False)
    assert not found.ok and "MLX_METAL_FAST_SYNCH" in found.message


def test_a_disk_that_takes_more_than_two_seconds_per_block_is_a_limit():
    assert doctor.judge_disk(Speeds(1e12)) == []
    (fast,) = doctor.judge_disk(Speeds(1e12, None, 3e9, 360_000_000))
    (slow,) = doctor.judge_disk(Speeds(1e12, None, 7e7, 360_000_000))
    assert fast.ok and "3.00 GB/s, 0.12 s per block" in fast.message
    assert not slow.ok and "5.14 s per block" in slow.message and "internal disk" in slow.advice


def test_the_disk_of_a_model_is_measured_by_its_largest_file(monkeypatch):
    monkeypatch.setattr(doctor, "remember_product_rate", lambda rate: None)
    model = open_checkpoint(POCKET)
    found = doctor.speeds(1024, 1024, model)
    assert math.isfinite(found.product_rate) and found.product_rate > 0
    assert found.disk_rate > 0
    sizes = {
        block: sum(e.nbytes for name, e in model.transformer.entries.items() if name.startswith(f"{block}."))
        for block in model.transformer.config.blocks
    }
    assert found.block_bytes == max(sizes.values()) > 10_000


def test_the_rate_of_products_is_remembered_on_metal_only(monkeypatch):
    remembered = []
    monkeypatch.setattr(doctor, "remember_product_rate", remembered.append)
    for backend, expected in (("cpu", 0), ("cuda", 0), ("metal", 1)):
        monkeypatch.setattr(doctor, "backend", lambda backend=backend: backend)
        monkeypatch.setattr(doctor, "time_products", lambda *_, **__: 1e12)
        doctor.speeds(1024, 1024)
        assert remembered == [1e12] * expected


@pytest.mark.parametrize("side", [512, 1024, 2048])
@pytest.mark.parametrize("chip", ["Apple M1", "Apple M2 Max", "Apple Paravirtual device"])
def test_kernels_are_split_to_less_than_a_second(monkeypatch, chip, side):
    rate = machine.rate_of(chip)
    split = doctor.longest_kernel(side, side, machine.KERNEL_S * rate)
    assert 2 * split / rate <= doctor.LONG_KERNEL
    assert doctor.judge_kernels(Speeds(rate, 2 * split / rate))[0].ok
    whole = doctor.longest_kernel(side, side, math.inf)
    assert whole >= split


def test_an_unsplit_kernel_of_a_large_image_is_a_limit():
    # attention takes 4 FLOP per feature for each pair of the 16384 + 512 tokens; the last upsampling takes even more
    assert doctor.longest_kernel(2048, 2048, math.inf) == max(4 * 16896**2 * 3840, 2048**2 * 2 * 9 * 256**2)
    (long,) = doctor.judge_kernels(Speeds(1e12, 2 * doctor.longest_kernel(2048, 2048, math.inf) / 1e12))
    assert not long.ok and "about 9.9 s" in long.message and "smaller images" in long.advice
    assert doctor.judge_kernels(Speeds(1e12)) == []


@pytest.mark.parametrize(
    ("architecture", "macos", "wheel", "supports", "has"),
    [
        ("applegpu_g17s", "26.2", "macosx_26_0_arm64", True, True),
        ("applegpu_g17s", "26.1", "macosx_26_0_arm64", True, False),
        ("applegpu_g17s", "26.4", "macosx_15_0_arm64", True, False),
        ("applegpu_g17s", "26.4", None, True, True),
        ("applegpu_g17p", "26.4", "macosx_26_0_arm64", False, False),
        ("applegpu_g18p", "26.4", "macosx_26_0_arm64", True, True),
        ("applegpu_g16s", "26.4", "macosx_26_0_arm64", False, False),
        ("applegpu_g13g", "15.1", "macosx_15_0_arm64", False, False),
        (None, "15.1", None, False, False),
    ],
)
def test_matrix_units_need_a_new_chip_system_and_wheel(monkeypatch, architecture, macos, wheel, supports, has):
    """As MLX decides in metal/device.cpp; its wheels have them only if built for a macOS that supports them."""
    monkeypatch.setattr(machine, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    monkeypatch.setattr(machine, "metal_wheel", lambda: wheel)
    assert (machine.supports_matrix_units(), machine.has_matrix_units()) == (supports, has)


def test_the_wheels_platform_is_read_from_what_pip_installed(monkeypatch):
    text = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-macosx_26_0_arm64\n"
    monkeypatch.setattr(machine, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    assert machine.metal_wheel() == "macosx_26_0_arm64"

    def missing(name):
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "distribution", missing)
    assert machine.metal_wheel() is None


def test_wrong_numbers_are_reported_with_advice():
    assert doctor.judge_numbers([RIGHT]).ok
    alone = doctor.judge_numbers([RIGHT, WRONG], None)
    assert not alone.ok and "attention" in alone.message and alone.advice.startswith("try another version of MLX")
    assert doctor.judge_numbers([WRONG], [WRONG]).advice == alone.advice == doctor.judge_numbers([WRONG], []).advice
    helped = doctor.judge_numbers([WRONG], [RIGHT]).advice
    assert helped.startswith("set MLX_METAL_GPU_ARCH=applegpu_g16s: all checks passed")


def test_the_checks_without_matrix_units_run_in_a_process_of_their_own(monkeypatch):
    ran = []

    def run(command, env, **_):
        ran.append((command, env["MLX_METAL_GPU_ARCH"]))
        return SimpleNamespace(stdout=json.dumps({"checks": [vars(RIGHT)]}))

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.without_matrix_units(["float32"], "pocket") == [RIGHT]
    ((command, architecture),) = ran
    assert command[1:] == ["-m", "mlx_zimage", "doctor", "--json", "--dtype", "float32", "--model", "pocket"]
    assert architecture == "applegpu_g16s"
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))
    assert doctor.without_matrix_units(["float32"], None) == []


def test_packing_on_any_device_gives_the_bits_of_packing_on_a_cpu(on_cpu):
    assert doctor.packed_otherwise(selftest.every_quantization()) == []
