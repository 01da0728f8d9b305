"""What the networks share: a linear layer (dense or quantized), RMSNorm, SiLU, and compiling for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps

import mlx.core as mx

from ..quantize import Quantization

# float16 ends at 65504, and products inside real feed-forwards pass it. There they are made this much smaller, and the
# norm or the sum that follows takes it back: a power of two changes no bit of a normal number. Its room on both sides
# is wide: numbers up to 1.6e7 fit, and those of 0.02 and more keep all of float16's bits.
FLOAT16_SCALE = 2.0**-8


def linear(x: mx.array, weights: dict) -> mx.array:
    """x (..., in) times weights["weight"] (out, in), plus weights["bias"] (out,) where there is one.

    A quantized layer has `scales` (and `biases` when affine) beside its packed `weight`.
    """
    weight = weights["weight"]
    if "scales" in weights:
        # Prompts and pictures are hundreds to thousands of rows. There, unpacking the weight and using the dense
        # product has been seen to beat quantized_matmul on CUDA and on the CPU.
        weight = dequantize(weights, x.shape[-1], x.dtype)
    if "bias" in weights:
        return mx.addmm(weights["bias"], x, weight.T)
    return mx.matmul(x, weight.T)


def dequantize(weights: dict, width: int, dtype: mx.Dtype) -> mx.array:
    """The dense (out, width) weight of a quantized layer, in dtype."""
    q = Quantization.of(weights["weight"].shape, weights["scales"].shape, "biases" in weights, width)
    return mx.dequantize(
        weights["weight"], weights["scales"], weights.get("biases"),
        group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=dtype,
    )  # fmt: skip


def rms_norm(x: mx.array, weights: dict, eps: float) -> mx.array:
    """x / rms(x) * weight over the last axis, in the weight's dtype; the mean square is formed in float32."""
    return mx.fast.rms_norm(x, weights["weight"], eps).astype(weights["weight"].dtype)


def sum_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """In what a network that computes in dtype adds up its blocks: real sums pass float16's range."""
    return mx.float32 if dtype == mx.float16 else dtype


def headroom(dtype: mx.Dtype) -> float:
    """What to make products in dtype smaller by, so that they cannot overflow."""
    return FLOAT16_SCALE if dtype == mx.float16 else 1.0


def scaled(x: mx.array, factor: float) -> mx.array:
    return x if factor == 1 else x * factor


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def settle(*arrays: mx.array) -> None:
    """Compute arrays, and have the memory of all that led to them given back before this returns."""
    mx.eval(*arrays)
    mx.synchronize()


def result(steps: Generator[object, None, mx.array]) -> mx.array:
    """What a generator returns, run to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def compiled(function: Callable) -> Callable:
    """The function compiled where MLX runs on a GPU. On the CPU that takes a C++ compiler, and gains nothing."""
    fast = mx.compile(function)

    @wraps(function)
    def call(*args):
        return (fast if mx.default_device() == mx.gpu else function)(*args)

    return call
