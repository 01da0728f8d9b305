"""Packing rows of a weight: as MLX does, or with each group's scale and bias searched for.

MLX spans a group's whole range. A grid that leaves out its ends and is then fitted by least squares is nearer to
most values; and codes chosen for scale and bias as they are stored, rounded, undo that rounding's error.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..quantize import Quantization

PARTS_OF_RANGE = (1.0, 0.92, 0.84, 0.76)  # grids to begin with
FITS = 2  # least-squares fits of each
SEARCHED_VALUES = 2**20  # at a time


def pack(rows: mx.array, q: Quantization, search: bool = False) -> list[mx.array]:
    """Packed weight, scales and, when affine, biases of rows (n, width) in the dtype that the scales shall have."""
    if not search or q.mode != "affine":
        return list(mx.quantize(rows, group_size=q.group_size, bits=q.bits, mode=q.mode))
    step = max(1, SEARCHED_VALUES // rows.shape[-1])
    pieces = [_search(rows[i : i + step], q) for i in range(0, rows.shape[0], step)]
    return [mx.concatenate(parts) for parts in zip(*pieces, strict=True)]


def unpack(packed: list[mx.array], q: Quantization) -> mx.array:
    """The rows that packed arrays stand for, float32."""
    weight, *helpers = packed
    if q.mode == "affine":
        helpers = [part.astype(mx.float32) for part in helpers]
    return mx.dequantize(weight, *helpers, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=mx.float32)


def _search(rows: mx.array, q: Quantization) -> list[mx.array]:
    top = 2**q.bits - 1
    x = rows.astype(mx.float32).reshape(-1, q.group_size)
    mean = x.mean(-1, keepdims=True)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    _, scales, biases = mx.quantize(rows, group_size=q.group_size, bits=q.bits)
    grids = [(scales.reshape(-1, 1), biases.reshape(-1, 1))]
    for part in PARTS_OF_RANGE:
        span = (high - low) * part
        grids.append((span / top, (low + high - span) / 2))
    best = None
    for scale, bias in grids:
        for fit in range(FITS + 1):
            scale, bias = (a.astype(rows.dtype).astype(mx.float32) for a in (scale, bias))
            codes = mx.clip(mx.round((x - bias) / mx.where(scale == 0, 1, scale)), 0, top)
            error = mx.square(x - codes * scale - bias).sum(-1, keepdims=True)
            found = error, codes, scale, bias
            if best is None:
                best = found
            else:
                better = error < best[0]
                best = tuple(mx.where(better, new, old) for new, old in zip(found, best, strict=True))
            if fit < FITS:
                center = codes.mean(-1, keepdims=True)
                variance = mx.square(codes - center).sum(-1, keepdims=True)
                covariance = ((codes - center) * (x - mean)).sum(-1, keepdims=True)
                scale = mx.where(variance == 0, scale, covariance / mx.where(variance == 0, 1, variance))
                bias = mx.where(variance == 0, bias, mean - scale * center)
        mx.eval(best)
    _, codes, scale, bias = best
    groups = (rows.shape[0], -1)
    return [
        mx.array(pack_codes(np.array(codes.astype(mx.uint8)).reshape(rows.shape), q.bits)),
        scale.reshape(groups).astype(rows.dtype),
        bias.reshape(groups).astype(rows.dtype),
    ]


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n, width) codes below 2**bits -> (n, width * bits / 32) uint32: one stream of bits, the lowest first."""
    single = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little").view(np.uint32)
