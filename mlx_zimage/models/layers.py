"""Code shared by the networks: a linear layer (dense or quantized), RMSNorm, SiLU, and compilation for a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import partial, wraps
from typing import TypeVar

import mlx.core as mx

from ..machine import backend
from ..quantization import Quantization
from .lora import added, beside, items, low_rank, needs_dense
from .runner import Tree

T = TypeVar("T")
TILE = 64  # rows


def pieces(rows: int, flops: float, most: float) -> list[tuple[int, int]]:
    """Split rows that take `flops` each into pieces of at most `most` FLOP: (first row, end row) of each.

    A piece is a multiple of TILE rows; TILE rows are one piece even if they take more.
    """
    step = rows if rows * flops <= most else max(1, int(most / flops) // TILE) * TILE
    return [(a, min(a + step, rows)) for a in range(0, rows, step)]


def linear(x: mx.array, weights: Tree, unpack_from: int = 0, most: float = math.inf) -> mx.array:
    """x (..., in) times the transpose of weights["weight"] (out, in), plus weights["bias"] (out,) if there is one.

    A quantized layer has `scales` (and `biases` if affine) and `packing`, the arguments it was quantized with, next to
    its packed `weight`. With at least unpack_from rows of input, it is dequantized for a dense product; with fewer, it
    is multiplied in packed form. A product of more than `most` FLOP is computed by rows (see `machine.kernel_flops`). A
    layer that LoRAs change has `lora`, too: see `models.lora`.
    """
    if "lora" in weights:
        return adapted(x, weights, unpack_from, most)
    weight = weights["weight"]
    if "packing" in weights:
        if x.size // x.shape[-1] < unpack_from:
            y = mx.quantized_matmul(
                x, weight, weights["scales"], weights.get("biases"), transpose=True, **weights["packing"]
            )
            return y + weights["bias"] if "bias" in weights else y
        weight = dequantize(weights, x.dtype)
    if 2 * x.size * len(weight) > most:
        rows = x.reshape(-1, x.shape[-1])
        parts = [_dense(rows[a:b], weight, weights) for a, b in pieces(len(rows), 2 * weight.size, most)]
        return mx.concatenate(parts).reshape(*x.shape[:-1], -1)
    return _dense(x, weight, weights)


def _dense(x: mx.array, weight: mx.array, weights: Tree) -> mx.array:
    return mx.addmm(weights["bias"], x, weight.T) if "bias" in weights else mx.matmul(x, weight.T)


def dot_product_attention(q: mx.array, k: mx.array, v: mx.array, most: float = math.inf) -> mx.array:
    """Attention of q (B, H, L, D) to k and v (B, H, L', D) without a mask.

    Queries do not affect each other, so an attention of more than `most` FLOP is computed in pieces.
    """
    B, H, L, D = q.shape
    parts = [
        mx.fast.scaled_dot_product_attention(q[:, :, a:b], k, v, scale=D**-0.5)
        for a, b in pieces(L, 4 * B * H * k.shape[2] * D, most)
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def adapted(x: mx.array, weights: Tree, unpack_from: int = 0, most: float = math.inf) -> mx.array:
    """`linear` of a layer that LoRAs change."""
    lora, own = weights["lora"], {name: part for name, part in weights.items() if name not in ("lora", "bias")}
    packed = "packing" in own and x.size // x.shape[-1] < unpack_from and not needs_dense(lora)
    if packed or not (needs_dense(lora) or any(items(lora))):
        y = beside(x, partial(linear, weights=own, unpack_from=unpack_from, most=most), lora)
    else:
        weight = dequantize(own, x.dtype) if "packing" in own else own["weight"]
        y = low_rank(x, linear(x, {"weight": added(weight, lora)}, most=most), lora)
    return y + weights["bias"] if "bias" in weights else y


# Multiplies an input by a layer's weights: `linear`, or a function that stands in for it.
Product = Callable[[mx.array, Tree], mx.array]


def product_from(unpack_from: int, most: float = math.inf) -> Product:
    """`linear` with these limits; without any, `linear` itself: 245 calls through a partial take 1% of a prompt's
    encoding time."""
    return partial(linear, unpack_from=unpack_from, most=most) if unpack_from or most < math.inf else linear


def pack(name: str, weight: mx.array, q: Quantization) -> dict[str, mx.array]:
    """Quantize the dense weight `name` (out, in) with MLX; returns the packed tensors by name."""
    parts = mx.quantize(weight, group_size=q.group_size, bits=q.bits, mode=q.mode)
    return dict(zip(q.packed(name, weight.shape), parts, strict=True))


def dequantize(weights: Tree, dtype: mx.Dtype) -> mx.array:
    """A quantized layer's weight as a dense (out, in) array in dtype."""
    weight, scales, biases, packing = (weights.get(name) for name in ("weight", "scales", "biases", "packing"))
    if backend() == "cuda" and (packing["mode"], packing["bits"]) == ("affine", 8):
        return unpack(weight, scales, biases).astype(dtype)
    return mx.dequantize(weight, scales, biases, dtype=dtype, **packing)


def rms_norm(x: mx.array, weights: Tree, eps: float) -> mx.array:
    """x / rms(x) * weight over the last axis, in the weight's dtype; the mean square is computed in float32."""
    return mx.fast.rms_norm(x, weights["weight"], eps).astype(weights["weight"].dtype)


def sum_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The residual stream's dtype when computing in dtype: with trained weights, its sums exceed float16's range."""
    return mx.float32 if dtype == mx.float16 else dtype


def vae_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The VAE's compute dtype when the model computes in dtype: nothing would keep the VAE in float16's range, and on
    a CPU float32 is faster and takes less memory."""
    return mx.float32 if backend() == "cpu" else sum_dtype(dtype)


def margin(dtype: mx.Dtype) -> float:
    """The default factor by which products in dtype are scaled down. In float16 it is 2**-8, which gives every model
    256 times the range and keeps every bit of values of 0.02 and above; `mlx_zimage.headroom` finds out whether a
    checkpoint needs more."""
    return 2.0**-8 if dtype == mx.float16 else 1.0


def scaled(x: mx.array, factor: float) -> mx.array:
    return x if factor == 1 else x * factor


def silu(x: mx.array) -> mx.array:
    if backend() == "cpu" and x.dtype == mx.float32:
        return x / (1 + mx.exp(-x))  # takes a third less time on a CPU than MLX's sigmoid
    return x * mx.sigmoid(x)


def settle(*arrays: mx.array) -> None:
    """Evaluate arrays, and wait until the memory of the intermediates is free."""
    mx.eval(*arrays)
    mx.synchronize()


def result(steps: Generator[object, None, T]) -> T:
    """Run a generator to its end, and return its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def compiled(function: Callable) -> Callable:
    """Compile the function if MLX runs on a GPU. On a CPU, compiling needs a C++ compiler and gains nothing."""
    fast = mx.compile(function)

    @wraps(function)
    def call(*args):
        return (fast if mx.default_device() == mx.gpu else function)(*args)

    return call


@compiled
def unpack(packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """mx.dequantize for 8-bit affine groups, bit for bit, in the dtype of scales.

    Compiled, it is one pass over memory: a (10240, 3840) weight takes 60 us on an H100, and 140 with MLX's own kernel.
    For 4 bits that kernel takes 85, and plain arithmetic is no faster.
    """
    numbers = packed.view(mx.uint8).reshape(*scales.shape, -1).astype(scales.dtype)
    return (numbers * scales[..., None] + biases[..., None]).reshape(len(packed), -1)
