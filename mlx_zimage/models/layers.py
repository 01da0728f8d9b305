"""What the networks share: a linear layer (dense or quantized), RMSNorm, SiLU, and compiling for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps
from typing import TypeVar

import mlx.core as mx

from ..machine import backend
from ..quantization import Quantization
from .runner import Tree

T = TypeVar("T")


def linear(x: mx.array, weights: Tree, unpack_from: int = 0) -> mx.array:
    """x (..., in) times weights["weight"] (out, in), plus weights["bias"] (out,) where there is one.

    A quantized layer has `scales` (and `biases` when affine) beside its packed `weight`, and how it is packed. From
    unpack_from rows of input on it is unpacked for the dense product; with fewer it is multiplied as it is.
    """
    weight = weights["weight"]
    if "packing" in weights:
        if x.size // x.shape[-1] < unpack_from:
            y = mx.quantized_matmul(
                x, weight, weights["scales"], weights.get("biases"), transpose=True, **weights["packing"]
            )
            return y + weights["bias"] if "bias" in weights else y
        weight = dequantize(weights, x.dtype)
    if "bias" in weights:
        return mx.addmm(weights["bias"], x, weight.T)
    return mx.matmul(x, weight.T)


# What multiplies an input by a layer's weights: `linear`, with what it was handed.
Product = Callable[[mx.array, Tree], mx.array]


def pack(name: str, weight: mx.array, q: Quantization) -> dict[str, mx.array]:
    """The tensors that stand for the dense weight `name` (out, in), rounded as MLX does."""
    parts = mx.quantize(weight, group_size=q.group_size, bits=q.bits, mode=q.mode)
    return dict(zip(q.packed(name, weight.shape), parts, strict=True))


def dequantize(weights: Tree, dtype: mx.Dtype) -> mx.array:
    """The dense (out, in) weight of a quantized layer, in dtype."""
    weight, scales, biases, packing = (weights.get(name) for name in ("weight", "scales", "biases", "packing"))
    if backend() == "cuda" and (packing["mode"], packing["bits"]) == ("affine", 8):
        return unpack(weight, scales, biases).astype(dtype)
    return mx.dequantize(weight, scales, biases, dtype=dtype, **packing)


def rms_norm(x: mx.array, weights: Tree, eps: float) -> mx.array:
    """x / rms(x) * weight over the last axis, in the weight's dtype; the mean square is formed in float32."""
    return mx.fast.rms_norm(x, weights["weight"], eps).astype(weights["weight"].dtype)


def sum_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """In what a network that computes in dtype adds up its blocks: real sums pass float16's range."""
    return mx.float32 if dtype == mx.float16 else dtype


def vae_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """In what the VAE of a model that computes in dtype does: nothing would keep it in float16's range, and on a CPU
    float32 is faster and takes less memory."""
    return mx.float32 if backend() == "cpu" else sum_dtype(dtype)


def margin(dtype: mx.Dtype) -> float:
    """What to make products in dtype smaller by, at least. In float16, those of any model get 256 times its range, and
    of numbers from 0.02 up every bit is kept; `mlx_zimage.headroom` finds out whether a checkpoint needs more."""
    return 2.0**-8 if dtype == mx.float16 else 1.0


def scaled(x: mx.array, factor: float) -> mx.array:
    return x if factor == 1 else x * factor


def silu(x: mx.array) -> mx.array:
    if backend() == "cpu" and x.dtype == mx.float32:
        return x / (1 + mx.exp(-x))  # a third less time than MLX's sigmoid takes there
    return x * mx.sigmoid(x)


def settle(*arrays: mx.array) -> None:
    """Compute arrays, and have the memory of all that led to them given back before this returns."""
    mx.eval(*arrays)
    mx.synchronize()


def result(steps: Generator[object, None, T]) -> T:
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


@compiled
def unpack(packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """mx.dequantize of affine groups of 8 bits, to the same bits, in the dtype of scales.

    Compiled, it is one pass over memory: a (10240, 3840) weight takes 60 us on an H100, with MLX's own kernel 140. Of
    4 bits that kernel takes 85, and arithmetic as long.
    """
    numbers = packed.view(mx.uint8).reshape(*scales.shape, -1).astype(scales.dtype)
    return (numbers * scales[..., None] + biases[..., None]).reshape(len(packed), -1)
