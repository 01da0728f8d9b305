"""Check that this machine computes the networks' operations correctly, by comparing them with NumPy in float64.

A broken backend generates noise or black images without any error; these checks distinguish that from a bad prompt.
Each operation takes the same code path as in the networks on this backend, except that it is not compiled together with
its neighbours. On a GPU the shapes are those of the real transformer, at which faults of some chips have been reported;
a CPU gets small ones.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .machine import machine_budget, mlx_version, unpack_from
from .models.layers import linear
from .models.transformer import norm_and_rotate
from .models.vae import Rows, conv
from .version import __version__
from .weights.library import CHOICES, DOWNLOAD, WEIGHTS_SHARE, choose_bits, home, planned

# Relative errors (largest deviation over largest value) that only a wrong result exceeds. bfloat16 keeps 8 bits: one
# rounding errs by up to 2**-9, and rounded operands and output add up to a few of those. float16 keeps three bits more.
# float32 on a GPU may multiply in TF32, which keeps 11.
LIMITS = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 4e-3}

MACOS = 14  # the oldest version that MLX's wheels are built for


@dataclass(frozen=True)
class Check:
    """One operation in one dtype: its relative error against NumPy, and the largest error accepted."""

    name: str
    error: float
    limit: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN fails


def self_test(large: bool | None = None) -> Iterator[Check]:
    """Run every check on MLX's default device; large=None uses large shapes on a GPU only."""
    large = mx.default_device() == mx.gpu if large is None else large
    for dtype, limit in LIMITS.items():
        for name, case in CASES.items():
            begin = time.perf_counter()
            found, expected = case(Samples(getattr(mx, dtype)), large)
            found = np.array(found.astype(mx.float32), dtype=np.float64)
            error = float(np.abs(found - expected).max() / np.abs(expected).max())
            yield Check(f"{name} in {dtype}", error, limit, time.perf_counter() - begin)


class Samples:
    """Standard normal arrays, the same on every machine: in an MLX dtype, and the same rounded values in float64."""

    def __init__(self, dtype: mx.Dtype):
        self.dtype = dtype
        self.generator = np.random.default_rng(0)

    def __call__(self, *shape: int) -> tuple[mx.array, np.ndarray]:
        array = mx.array(self.generator.standard_normal(shape, dtype=np.float32)).astype(self.dtype)
        return array, np.array(array.astype(mx.float32), dtype=np.float64)


def matmul(samples: Samples, large: bool):
    # The feed-forward's second product has the longest sums in the transformer.
    rows, width, out = (2048, 10240, 3840) if large else (64, 1024, 96)
    x, x64 = samples(rows, width)
    w, w64 = samples(out, width)
    return x @ w.T, _product(x64, w64)


def quantized(bits: int, rows: int) -> Callable:
    def case(samples: Samples, large: bool):
        width, out = (3840, 3840) if large else (256, 96)
        x, x64 = samples(rows if large else rows // 32, width)
        weight, scales, biases = mx.quantize(samples(out, width)[0], group_size=64, bits=bits)
        dense = integers(np.array(weight), bits).reshape(out, -1, 64)
        scales64, biases64 = (
            np.array(part.astype(mx.float32), dtype=np.float64)[..., None] for part in (scales, biases)
        )
        packing = {"group_size": 64, "bits": bits, "mode": "affine"}
        layer = {"weight": weight, "scales": scales, "biases": biases, "packing": packing}
        found = linear(x, layer, unpack_from())  # takes the same path as the networks on this machine
        return found, _product(x64, (dense * scales64 + biases64).reshape(out, width))

    return case


def integers(words: np.ndarray, bits: int) -> np.ndarray:
    """The integers of `bits` bits (a power of two) that each uint32 holds, lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words[..., None] >> shifts) & (2**bits - 1)).reshape(*words.shape[:-1], -1).astype(np.float64)


def attention(samples: Samples, large: bool):
    heads, length, dim = (30, 1088, 128) if large else (4, 96, 128)
    (q, q64), (k, k64), (v, v64) = (samples(1, heads, length, dim) for _ in range(3))
    scores = q64 @ k64.swapaxes(-1, -2) / np.sqrt(dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v64
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5), expected


def convolution(samples: Samples, large: bool):
    side, channels = (64, 512) if large else (16, 32)
    x, x64 = samples(1, side, side, channels)
    w, w64 = samples(channels, 3, 3, channels)
    padded = np.pad(x64, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    expected = _product(np.concatenate(windows, axis=-1), w64.reshape(channels, -1))
    return conv(Rows.of(x), {"weight": w, "bias": mx.zeros(channels, x.dtype)}).get(0, side), expected


def norm(samples: Samples, large: bool):
    x, x64 = samples(64, 3840 if large else 256)
    w, w64 = samples(x.shape[-1])
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * w64
    return mx.fast.rms_norm(x, w, 1e-5), expected


def norm_and_rotation(samples: Samples, large: bool):
    length, heads, dim = (1088, 30, 128) if large else (96, 4, 128)
    x, x64 = samples(1, length, heads, dim)
    w, w64 = samples(dim)
    angles = samples.generator.standard_normal((length, dim // 2))
    left, right = np.split(x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * w64, 2, axis=-1)
    rotated = (left + 1j * right) * np.exp(1j * angles)[:, None]
    table = (mx.array(part.astype(np.float32)) for part in (np.cos(angles), np.sin(angles)))
    return norm_and_rotate(x, {"weight": w}, *table), np.concatenate([rotated.real, rotated.imag], axis=-1)


def _product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x @ w.T


CASES = {
    "matrix product": matmul,
    "8-bit product": quantized(8, rows=2048),
    "4-bit product": quantized(4, rows=2048),
    "4-bit product, few rows": quantized(4, rows=64),  # like a prompt's: some backends multiply it in packed form
    "attention": attention,
    "convolution": convolution,
    "RMS norm": norm,
    "norm and rotation": norm_and_rotation,
}


@dataclass(frozen=True)
class Verdict:
    """Whether one aspect of this machine is good enough for the full model, and why."""

    name: str
    will_do: bool
    told: str


def verdicts() -> list[Verdict]:
    """The verdicts on this machine: system, MLX build, memory and disk."""
    system = platform.system(), platform.mac_ver()[0], platform.machine()
    place = next(path for path in (home(), *home().absolute().parents) if path.exists())
    return judge(*system, mx.default_device() == mx.gpu, machine_budget(), shutil.disk_usage(place).free)


def judge(system: str, macos: str, cpu: str, has_gpu: bool, budget: int, free: int) -> list[Verdict]:
    """The verdicts on a machine with this memory budget and free disk space, in bytes."""
    if system == "Darwin" and cpu != "arm64":
        on_system = Verdict("system", False, "MLX needs Apple Silicon, and a native Python (not one under Rosetta)")
    elif system == "Darwin" and int(macos.partition(".")[0]) < MACOS:
        on_system = Verdict("system", False, f"MLX needs macOS {MACOS} or newer; this is macOS {macos}")
    else:
        on_system = Verdict("system", system in ("Darwin", "Linux"), f"{system} on {cpu}")
    build = "computes on the GPU" if has_gpu else "computes on the CPU: correct, but minutes per step at 1024x1024"
    sizes = {bits: planned(bits).nbytes for bits in CHOICES}
    bits = choose_bits(sizes, budget)
    kind = "bfloat16" if bits is None else f"{bits} bits"
    stays = sizes[bits] <= WEIGHTS_SHARE * budget
    how = "stays in memory" if stays else "is streamed from disk, which is slower"
    needed = DOWNLOAD + sizes[bits]
    return [
        on_system,
        Verdict("MLX build", has_gpu, build),
        Verdict("memory", stays, f"the model in {kind} ({sizes[bits] / 1e9:.1f} GB) {how}"),
        Verdict("disk", free >= needed, f"a first run needs {needed / 1e9:.0f} GB; {free / 1e9:.0f} GB are free"),
    ]


def machine() -> dict[str, str]:
    """This machine and its software versions, as text."""
    device = mx.device_info()
    facts = {
        "mlx-zimage": __version__,
        "MLX": mlx_version(),
        "Python": platform.python_version(),
        "system": f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.platform(),
        "device": f"{device.get('device_name', platform.machine())} ({mx.default_device().type.name})",
    }
    facts["memory to use"] = f"{machine_budget() / 1e9:.0f} GB"
    return facts
