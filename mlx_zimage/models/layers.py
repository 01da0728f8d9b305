"""What the networks share: a linear layer (dense or quantized), RMSNorm, SiLU, and compiling for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import mlx.core as mx

from ..quantize import Quantization


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
    """x / rms(x) * weight over the last axis; the mean square is formed in float32."""
    return mx.fast.rms_norm(x, weights["weight"], eps)


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def compiled(function: Callable) -> Callable:
    """The function compiled where MLX runs on a GPU. On the CPU that takes a C++ compiler, and gains nothing."""
    fast = mx.compile(function)

    @wraps(function)
    def call(*args):
        return (fast if mx.default_device() == mx.gpu else function)(*args)

    return call
