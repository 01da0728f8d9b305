"""Check that this machine computes the networks' operations correctly, by comparing them with NumPy in float64.

A broken backend generates noise or black images without any error; these checks distinguish that from a bad prompt.
Each case calls the networks' own functions, or the MLX operation that they call, on inputs that every dtype represents
exactly, so that one float64 reference serves all dtypes. On a GPU the shapes select the kernels that the real model
uses (unaligned attention, split sums, heads of 512), and operations that run compiled in the networks are also checked
compiled. A CPU gets small shapes.

On a GPU the references take 0.17 TFLOP in float64, the cases 0.9 TFLOP in three dtypes, most of them twice, and 80
million random numbers are generated. At 0.1 TFLOP/s in NumPy and 1 TFLOP/s in MLX, as estimated for an M1, that is
about 5 s; compiling some 30 small kernels at 0.1 to 0.2 s each adds as much again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from .dtypes import FLOATS
from .machine import backend, has_matrix_units, unpack_from
from .models.layers import linear, pack
from .models.text_encoder import TextEncoderConfig
from .models.transformer import norm_and_rotate
from .models.vae import Rows, VAEConfig, affine_silu, conv, convolve, downsample, row_moments, upsample
from .quantization import MODES, Quantization
from .weights.blocks import READS_AHEAD
from .weights.checkpoint import Checkpoint

# Relative errors (largest deviation over largest value) that only a wrong result exceeds. bfloat16 keeps 8 bits: one
# rounding errs by up to 2**-9, and rounded operands and output add up to a few of those. float16 keeps three bits more.
# float32 on a GPU may multiply in TF32, which keeps 11; for an M5's matrix units errors of up to 9e-4 were reported.
LIMITS = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 4e-3}
MATRIX_UNITS_LIMIT = 3e-3
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # magnitudes of 4-bit floats; the highest bit is the sign


@dataclass(frozen=True)
class Check:
    """One operation in one dtype: its relative error against NumPy, and the largest error accepted.

    The error is None if there were no finite numbers to compare; problem then says why.
    """

    name: str
    dtype: str
    error: float | None
    limit: float
    seconds: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.limit


@dataclass(frozen=True)
class Trial:
    """run(*arrays, *fixed) and its expected result. arrays are float32, and are cast to the dtype being checked.

    compiled: the networks run it inside a compiled function.
    """

    run: Callable[..., mx.array]
    arrays: Sequence[np.ndarray]
    expected: np.ndarray
    fixed: Sequence[np.ndarray] = ()
    compiled: bool = True


def self_test(dtypes: Iterable[str] = FLOATS, quantizations: Iterable[Quantization] | None = None) -> Iterator[Check]:
    """Run every case on MLX's default device in each dtype, with large shapes on a GPU.

    quantizations=None checks every mode with every number of bits.
    """
    large = mx.default_device() == mx.gpu
    for name, case in cases(every_quantization() if quantizations is None else quantizations).items():
        begin, trial = time.perf_counter(), case(Samples(), large)
        for dtype in dtypes:
            error, problem = measure(trial, getattr(mx, dtype))
            now = time.perf_counter()
            yield Check(name, dtype, error, limit(dtype), now - begin, problem)
            begin = now


def limit(dtype: str) -> float:
    """The largest relative error accepted in dtype on this machine."""
    return MATRIX_UNITS_LIMIT if dtype == "float32" and has_matrix_units() else LIMITS[dtype]


def measure(trial: Trial, dtype: mx.Dtype) -> tuple[float | None, str | None]:
    """The largest relative error of a trial, plain and compiled; or None and the reason."""
    inputs = [mx.array(array).astype(dtype) for array in trial.arrays] + [mx.array(array) for array in trial.fixed]
    # the networks are not compiled on a CPU, where MLX would need a C++ compiler
    ways = [trial.run, mx.compile(trial.run)] if trial.compiled and mx.default_device() == mx.gpu else [trial.run]
    try:
        found = [np.array(way(*inputs).astype(mx.float32), dtype=np.float64) for way in ways]
    except (RuntimeError, ValueError) as raised:  # for example, this GPU lacks a kernel
        return None, f"MLX raised {raised}"
    error = max(float(np.abs(array - trial.expected).max() / np.abs(trial.expected).max()) for array in found)
    return (error, None) if np.isfinite(error) else (None, "the result is not finite")


class Samples:
    """Random float32 arrays, the same on every machine, of values that bfloat16 and float16 represent exactly."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, *shape: int) -> np.ndarray:
        """Standard normal, rounded."""
        return self.rounded(self.generator.standard_normal(shape, dtype=np.float32))

    @staticmethod
    def rounded(x: np.ndarray) -> np.ndarray:
        """Rounded to 8 bits of precision; values that are subnormal in float16 become 0."""
        rounded = ((x.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
        rounded[np.abs(rounded) < 2**-14] = 0
        return rounded

    def between(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Uniformly distributed multiples of high / 64."""
        return (self.generator.integers(round(64 * low / high), 65, shape) / 64 * high).astype(np.float32)


def matrix_product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ w.astype(np.float64).T


# ---- products


def product(rows: int, width: int, out: int, bias: bool = False) -> Callable[[Samples, bool], Trial]:
    def case(samples: Samples, large: bool) -> Trial:
        shape = (rows, width, out) if large else (rows // 32, width // 10, out // 20)
        x, w = samples(*shape[:2]), samples(shape[2], shape[1])
        arrays = (x, w, *([samples(shape[2])] if bias else []))
        expected = matrix_product(x, w) + (arrays[2] if bias else 0)
        return Trial(lambda x, w, *b: linear(x, {"weight": w, **({"bias": b[0]} if b else {})}), arrays, expected)

    return case


def packed_product(q: Quantization, rows: int) -> Callable[[Samples, bool], Trial]:
    """A product with random packed weights, by the same path as the networks take on this machine."""

    def case(samples: Samples, large: bool) -> Trial:
        width, out = (2560, 512) if large else (256, 96)
        x = samples(rows if large else rows // 32, width)
        codes = samples.generator.integers(0, 2**q.bits, (out, width), dtype=np.uint32)
        if q.mode == "mxfp8":
            codes[codes & 127 == 127] = 0  # NaN
        groups = (out, width // q.group_size)
        scales, biases, values = _numbers(q, codes, groups, samples)
        dense = (values.reshape(*groups, -1) * scale_values(q, scales)[..., None] + biases[..., None]).reshape(out, -1)
        packing = {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}

        def run(x: mx.array, *parts: mx.array) -> mx.array:
            if q.mode == "affine":
                scales, biases, weight = parts
                layer = {"weight": weight, "scales": scales, "biases": biases, "packing": packing}
            else:
                layer = {"weight": parts[0], "scales": parts[1], "packing": packing}
            return linear(x, layer, unpack_from())

        words = pack_bits(codes, q.bits)
        if q.mode == "affine":
            return Trial(run, (x, scales, biases), matrix_product(x, dense), (words,))
        return Trial(run, (x,), matrix_product(x, dense), (words, scales))

    return case


def _numbers(q: Quantization, codes: np.ndarray, groups: tuple[int, int], samples: Samples) -> tuple:
    """Scales and biases of groups, such that weights are about 1, and the numbers that the codes represent."""
    none = np.zeros(groups)
    if q.mode == "affine":
        scales = samples.between(1 / 4, 1, *groups) * np.float32(4 / 2**q.bits)
        return scales, -samples.between(1, 2, *groups), codes
    # 4-bit floats go up to 6, 8-bit floats up to 448; scales are 8-bit floats for nvfp4, exponents for the others
    low, high = {"nvfp4": (0x20, 0x38), "mxfp4": (124, 127), "mxfp8": (118, 120)}[q.mode]
    return samples.generator.integers(low, high, groups, dtype=np.uint8), none, every_number(q.bits)[codes]


def scale_values(q: Quantization, scales: np.ndarray) -> np.ndarray:
    """The numbers that stored scales represent."""
    if q.mode == "affine":
        return scales.astype(np.float64)
    return e4m3(scales) if q.mode == "nvfp4" else np.ldexp(1.0, scales.astype(int) - 127)


def every_number(bits: int) -> np.ndarray:
    """The number of each code of 4 bits (e2m1) or 8 bits (e4m3: no infinities, two NaNs)."""
    magnitudes = E2M1 if bits == 4 else np.append(e4m3(np.arange(127)), np.nan)
    return np.concatenate([magnitudes, -magnitudes])


def e4m3(codes: np.ndarray) -> np.ndarray:
    """The values of positive 8-bit floats: 4 bits of exponent, 3 of mantissa."""
    exponent, mantissa = codes.astype(int) >> 3, codes & 7
    return np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers (rows, width) of `bits` bits as uint32 (rows, width * bits / 32): a stream of bits, lowest first."""
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint32) & 1).astype(np.uint8)
    return np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little").view(np.uint32)


def unpack_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of pack_bits."""
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").reshape(len(words), -1, bits)
    return (stream.astype(np.uint32) << np.arange(bits, dtype=np.uint32)).sum(-1)


def packing(q: Quantization) -> Callable[[Samples, bool], Trial]:
    """mx.quantize: each weight must be rounded to the nearest value that its group can represent."""

    def case(samples: Samples, large: bool) -> Trial:
        w = samples(*((256, 2560) if large else (64, 256)))

        def run(w: mx.array) -> mx.array:
            low, high = bounds_of_packed(q, list(pack("w.weight", w, q).values()))
            return mx.array(np.clip(np.array(w.astype(mx.float32)), low, high).astype(np.float32))

        return Trial(run, (w,), w.astype(np.float64), compiled=False)

    return case


def bounds_of_packed(q: Quantization, parts: Sequence[mx.array]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest weights (out, in) that round to these parts: halfway to the neighbouring values.

    Since scales are rounded, the ends of a group's range may represent weights further out: by one step (affine), or by
    half of the end value (the other modes).
    """
    codes = unpack_bits(np.array(parts[0]), q.bits)
    if q.mode == "affine":
        scales, biases = (np.array(part.astype(mx.float32), dtype=np.float64) for part in parts[1:])
        levels, ends = np.arange(2.0**q.bits), (-1.0, 2.0**q.bits)
        places = codes
    else:
        scales = np.array(parts[1])
        biases, numbers = np.zeros(scales.shape), every_number(q.bits)
        levels = np.unique(numbers[~np.isnan(numbers)])
        ends = 1.5 * levels[0], 1.5 * levels[-1]
        places = np.searchsorted(levels, numbers[codes])
    edges = np.concatenate([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
    groups, scales = (*scales.shape, -1), scale_values(q, scales)[..., None]
    sides = [(edges[places + i].reshape(groups) * scales + biases[..., None]).reshape(codes.shape) for i in range(2)]
    return np.minimum(*sides), np.maximum(*sides)


# ---- attention


def attention(
    heads: int, rows: int, keys: int, dim: int, kv_heads: int | None = None, causal: bool = False
) -> Callable[[Samples, bool], Trial]:
    def case(samples: Samples, large: bool) -> Trial:
        shrink = 1 if large else 8
        L, K = rows // shrink, keys // shrink
        q, k, v = samples(1, heads, L, dim), *(samples(1, kv_heads or heads, K, dim) for _ in range(2))
        shared = heads // (kv_heads or heads)
        q64, k64, v64 = q.astype(np.float64), *(np.repeat(x.astype(np.float64), shared, axis=1) for x in (k, v))
        scores = q64 @ k64.swapaxes(-1, -2) / np.sqrt(dim)
        if causal:
            scores += np.where(np.tri(L, K, K - L), 0, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))

        def run(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            mask = "causal" if causal else None
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5, mask=mask)

        return Trial(run, (q, k, v), weights / weights.sum(-1, keepdims=True) @ v64)

    return case


# ---- convolutions


def convolution(
    side: int, channels: int, out: int, kernel: int = 3, stride: int = 1, scale: int = 1
) -> Callable[[Samples, bool], Trial]:
    """The VAE's convolutions, with its layout, flip and padding: plain, of stride 2, or after upsampling (scale 2)."""

    def case(samples: Samples, large: bool) -> Trial:
        L, C, filters = (side, channels, out) if large else (side // 4, min(channels, 32), min(out, 32))
        x, w, b = samples(1, L, L, C), samples(filters, C, kernel, kernel), samples(filters)
        pads = {3: (0, 1) if stride == 2 else (1, 1), 1: (0, 0)}[kernel]
        source = np.repeat(np.repeat(x, scale, axis=1), scale, axis=2).astype(np.float64)
        padded = np.pad(source, ((0, 0), pads, pads, (0, 0)))
        count = L * scale // stride
        windows = [
            padded[:, i : i + stride * count : stride, j : j + stride * count : stride]
            for i in range(kernel)
            for j in range(kernel)
        ]
        weights = w.transpose(0, 2, 3, 1).reshape(filters, -1)
        expected = matrix_product(np.concatenate(windows, axis=-1), weights) + b

        def run(x: mx.array, w: mx.array, b: mx.array) -> mx.array:
            weights = {"weight": VAEConfig().sanitize("conv.weight", w), "bias": b}
            if kernel == 1:
                return convolve(x, weights)
            if stride == 2:
                return downsample(Rows.of(x), {"conv": weights}).get(0, L // 2)
            if scale == 2:
                return upsample(Rows.of(x), {"conv": weights}).get(0, 2 * L)
            return conv(Rows.of(x), weights).get(0, L)

        return Trial(run, (x, w, b), expected, compiled=False)

    return case


# ---- norms and the like


def rms(samples: Samples, large: bool) -> Trial:
    x, w = samples(64, 3840 if large else 256), samples(3840 if large else 256)
    return Trial(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), (x, w), normed(x) * w)


def layer(samples: Samples, large: bool) -> Trial:
    x = samples(64, 3840 if large else 256)
    x64 = x.astype(np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6)
    return Trial(lambda x: mx.fast.layer_norm(x, None, None, 1e-6), (x,), expected)


def norm_and_rotation(samples: Samples, large: bool) -> Trial:
    length, heads, dim = (1120, 30, 128) if large else (96, 4, 128)
    x, w = samples(1, length, heads, dim), samples(dim)
    angles = samples.generator.standard_normal((length, dim // 2))
    table = [part.astype(np.float32) for part in (np.cos(angles), np.sin(angles))]

    def run(x: mx.array, w: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        return norm_and_rotate(x, {"weight": w}, cos, sin)

    return Trial(run, (x, w), rotated(normed(x) * w, angles[:, None]), table)


def rotation(samples: Samples, large: bool) -> Trial:
    """The text encoder's rotary embedding."""
    config = TextEncoderConfig()
    length, dim, theta = 96, config.head_dim, config.rope_theta
    x = samples(1, config.num_attention_heads if large else 4, length, dim)
    angles = np.arange(length)[:, None] / theta ** (np.arange(0, dim, 2) / dim)

    def run(x: mx.array) -> mx.array:
        return mx.fast.rope(x, dim, traditional=False, base=theta, scale=1.0, offset=0)

    return Trial(run, (x,), rotated(x.astype(np.float64), angles))


def normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)


def rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The pairs (x[i], x[D / 2 + i]) rotated by angles."""
    left, right = np.split(x, 2, axis=-1)
    turned = (left + 1j * right) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def group_norm_silu(samples: Samples, large: bool) -> Trial:
    rows, scale, shift = samples(1, 64 if large else 16, 64, 128), *(samples(1, 1, 1, 128) for _ in range(2))
    y = rows.astype(np.float64) * scale + shift
    return Trial(affine_silu, (rows, scale, shift), y / (1 + np.exp(-y)), compiled=False)  # affine_silu compiles itself


def moments(samples: Samples, large: bool) -> Trial:
    """For rows far from zero, where a variance loses the most digits."""
    rows, groups = samples(1, 64 if large else 16, 64, 128) + 8, 32
    rows = Samples.rounded(rows)
    by_group = rows.astype(np.float64).reshape(1, len(rows[0]), 64, groups, -1)
    expected = np.stack([by_group.mean((2, 4)) - 8, by_group.var((2, 4))])[..., None]

    def run(rows: mx.array) -> mx.array:
        mean, variance = row_moments(rows, groups)
        return mx.stack([mean - 8, variance])

    return Trial(run, (rows,), expected, compiled=False)


# ---- from the disk to the device


def hand_off(threads: int) -> Callable[[Samples, bool], Trial]:
    """Computing on what another stream reads from a file, in this thread or in a new one."""

    def case(samples: Samples, large: bool) -> Trial:
        x = samples(2048 if large else 64, 1024)

        def run(x: mx.array) -> mx.array:
            with TemporaryDirectory() as folder, ThreadPoolExecutor(1) as other:
                file = Path(folder) / "x.safetensors"
                mx.save_safetensors(str(file), {"x": x})
                return read_and_double(file) if threads == 1 else other.submit(read_and_double, file).result()

        return Trial(run, (x,), 2 * x.astype(np.float64), compiled=False)

    return case


def read_and_double(file: Path) -> mx.array:
    stream = mx.new_thread_local_stream(mx.cpu) if READS_AHEAD[backend()] else None
    arrays: Any = mx.load(str(file), stream=stream)
    mx.async_eval(arrays["x"])
    doubled = arrays["x"] + arrays["x"]
    mx.eval(doubled)
    return doubled


def every_quantization() -> list[Quantization]:
    """Every mode with every number of bits, in the mode's default groups."""
    return [Quantization(bits, groups[0], mode) for mode, (choices, groups) in MODES.items() for bits in choices]


def quantizations_of(model: Checkpoint) -> list[Quantization]:
    """The quantizations that a model's layers use; empty if it is dense."""
    found = (component.quantizations.values() for component in model.networks.values())
    return list(dict.fromkeys(q for values in found for q in values))


def cases(quantizations: Iterable[Quantization]) -> dict[str, Callable[[Samples, bool], Trial]]:
    """The cases by name. A prompt's products have few rows, for which some backends use other kernels."""
    packed = {}
    for q in quantizations:
        packed[f"{q} product"] = packed_product(q, rows=1024)
        packed[f"{q} product, few rows"] = packed_product(q, rows=64)
        packed[f"{q} packing"] = packing(q)
    return {
        "hand-off": hand_off(threads=1),
        "hand-off in a second thread": hand_off(threads=2),
        "product": product(2048, 10240, 1920),  # the feed-forward's second product, with the transformer's longest sums
        "product, few rows": product(96, 2560, 9728),
        "product, few rows, long sums": product(96, 9728, 2560),
        "product, few rows, few columns": product(96, 2560, 1024),
        "product and bias": product(1024, 2560, 512, bias=True),
        **packed,
        "attention": attention(8, 1120, 1120, 128),
        "attention, fewer rows than keys": attention(8, 1024, 1120, 128),
        "causal attention": attention(32, 96, 96, 128, kv_heads=8, causal=True),
        "attention, one wide head": attention(1, 512, 4608, 512),
        "convolution": convolution(64, 512, 512),
        "convolution from 16 channels": convolution(64, 16, 512),
        "convolution to 3 channels": convolution(128, 128, 3),
        "convolution of stride 2": convolution(64, 128, 128, stride=2),
        "convolution of one pixel": convolution(64, 256, 128, kernel=1),
        "upsampling and convolution": convolution(32, 512, 512, scale=2),
        "RMS norm": rms,
        "layer norm": layer,
        "norm and rotation": norm_and_rotation,
        "rotation": rotation,
        "scale, shift and SiLU": group_norm_silu,
        "moments": moments,
    }
