"""What the networks need beside their weights, as upper bounds that were measured as MLX's peaks.

Each number says what it bounds, on which backend and in which dtype. The CPU's were measured there in float32, where
nothing is fused and memory is taken ahead; the GPU's with MLX's CUDA build on an H100, in each dtype, with random
weights of full size (examples/peaks.py measures them again). On Metal nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .machine import backend

LARGEST_WHOLE = 2**30  # elements: MLX's CUDA kernels fail on more, so larger pictures are decoded by strips


@dataclass(frozen=True)
class Strip:
    """Bytes of decoding in one way: by pixel and channel at full size, and in all, whatever the size."""

    by_pixel: float
    at_least: float


@dataclass(frozen=True)
class Bounds:
    """Bytes of intermediates on one backend and in one dtype.

    block, lean_block: of a transformer block in its two ways, per token and feature; waiting: beside it, of each of
    several streams that take turns. layer: of a layer of the text encoder, per token and feature. score: of attention,
    per head and pair of tokens. unpacked, lean_unpacked: of a packed block's dense form, per byte of it;
    layer_unpacked: of a layer's. strips: the ways to decode, fastest first, whole (None) or by strips of so many bytes;
    most: of any of them, per pixel and channel. late: what a GPU may hold longer than it must of blocks that nothing
    waits for, as a part of the work: seen in one run of about ten.
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
FLOAT32_STRIPS = {  # of a VAE that computes in float32, on a GPU
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
    # Blocks add up, and the VAE computes, in float32.
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
    # MLX's CUDA build holds all scores of an attention in float32.
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
    """Those of this backend for networks that compute in dtype."""
    return CPU if backend() == "cpu" else GPU[dtype]
