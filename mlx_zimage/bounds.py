"""Upper bounds on the memory that the networks need in addition to their weights, measured as MLX's peaks.

Each number belongs to one backend and one dtype. The CPU's were measured in float32, where nothing is fused and memory
is allocated ahead; the GPU's with MLX's CUDA build on an H100, in each dtype, with full-size random weights
(examples/peaks.py measures them again). Nothing was measured on Metal.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .machine import backend

# What LoRAs add to a block's working memory, in values of the compute dtype: per token and output of the adapted
# layers, and per weight that they change. Measured on an H200 in bfloat16 at 1024x1024, all layers adapted: 2.06 and
# 2.33.
LORA_BY_OUTPUT, LORA_BY_WEIGHT = 2.1, 2.4
# The memory to encode an image, as a fraction of that to decode one of the same size in the same way: at full size, the
# encoder has half the decoder's channels. Measured at most 0.60 on a CPU, from 64x512 to 768x768; on an H200, from
# 256x256 to 2048x2048, 0.88 in bfloat16 and 0.86 in float32, both in small strips.
ENCODED = 0.9
# Widths of heads for which MLX has a fused attention on Metal, in every dtype: no scores are in memory. Source: MLX,
# backend/metal/scaled_dot_product_attention.cpp.
FUSED_ON_METAL = (64, 72, 80, 96, 128)
LARGEST_WHOLE = 2**30  # elements: MLX's CUDA kernels fail on more, so larger images are decoded in strips


@dataclass(frozen=True)
class Strip:
    """Bytes that one way of decoding needs: per pixel and channel at full size, plus a constant."""

    by_pixel: float
    at_least: float


@dataclass(frozen=True)
class Bounds:
    """Bytes of intermediates on one backend and in one dtype.

    block, lean_block: a transformer block, normally and lean, per token and feature.
    waiting: in addition, for each of several streams that take turns, per token and feature.
    layer: a text encoder layer, per token and feature.
    score: attention, per head and pair of tokens.
    unpacked, lean_unpacked, layer_unpacked: dequantizing a block (normally and lean) or an encoder layer, per byte of
    its dense form.
    strips: the ways to decode, fastest first: the whole image (None), or strips of this many bytes.
    most: the maximum for any way to decode, per pixel and channel.
    late: memory that a GPU may free late when nothing waits for its blocks, as a fraction of the work; seen in about
    one run in ten.
    """

    block: float
    lean_block: float
    waiting: float
    layer: float
    score: float
    unpacked: float
    lean_unpacked: float
    layer_unpacked: float
    strips: dict[int | None, Strip]
    most: float
    late: float = 0


CPU = Bounds(
    block=116,
    lean_block=84,
    waiting=12,
    layer=150,
    score=4,
    unpacked=1.35,
    lean_unpacked=1.35,
    layer_unpacked=1.35,
    strips={
        None: Strip(24.4, 4.1e7),
        2**20: Strip(12.2, 5.1e7),
        2**18: Strip(12.2, 1.27e7),
        2**16: Strip(6.16, 6.7e6),
    },
    most=64,
)
FLOAT32_STRIPS = {  # for a VAE that computes in float32 on a GPU
    None: Strip(30.1, 9e6),
    2**26: Strip(6.1, 1.16e9),
    2**24: Strip(7.15, 3e8),
    2**22: Strip(4.03, 3.7e8),
    2**20: Strip(4.02, 9.6e7),
    2**18: Strip(4, 2.45e7),
    2**16: Strip(4, 5.1e6),
}
GPU = {
    mx.bfloat16: Bounds(
        block=66.5,
        lean_block=21.3,
        waiting=7.5,
        layer=40,
        score=0,
        unpacked=2,
        lean_unpacked=0.67,
        layer_unpacked=1.1,
        strips={
            None: Strip(27.5, 0),
            2**26: Strip(2.06, 1.235e9),
            2**24: Strip(3.77, 2.56e8),
            2**22: Strip(2.57, 2.07e8),
            2**20: Strip(2.48, 5.48e7),
            2**18: Strip(2.25, 1.58e7),
            2**16: Strip(2.25, 1.58e7),
        },
        most=27.5,
        late=0.5,
    ),
    # The residual stream and the VAE are in float32.
    mx.float16: Bounds(
        block=102.7,
        lean_block=35.4,
        waiting=15,
        layer=54,
        score=0,
        unpacked=2,
        lean_unpacked=0.67,
        layer_unpacked=1.1,
        strips=FLOAT32_STRIPS,
        most=43,
        late=0.5,
    ),
    # MLX's CUDA build keeps all attention scores in memory in float32.
    mx.float32: Bounds(
        block=97.5,
        lean_block=66,
        waiting=15,
        layer=130,
        score=4,
        unpacked=1.1,
        lean_unpacked=0.67,
        layer_unpacked=1.1,
        strips=FLOAT32_STRIPS,
        most=43,
        late=0.5,
    ),
}


def bounds(dtype: mx.Dtype) -> Bounds:
    """The bounds on this backend for networks that compute in dtype."""
    return CPU if backend() == "cpu" else GPU[dtype]
