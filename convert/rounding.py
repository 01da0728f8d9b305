"""Quantizing rows of a weight: as MLX does, or with a search for the scale and bias of each group.

MLX spans the whole range of a group. A grid that excludes the extremes and is then fitted by least squares is closer to
most values; and choosing codes for the scale and bias as stored compensates for the rounding of those. If the inputs of
a layer are known, each column is rounded to compensate for the errors of the others in the layer's products (GPTQ).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..quantization import Quantization

RANGE_FRACTIONS = (1.0, 0.92, 0.84, 0.76)  # of the initial grids
FITS = 2  # least-squares fits of each grid
SEARCHED_VALUES = 2**20  # at a time


def quantize_rows(
    rows: mx.array, q: Quantization, search: bool = False, factor: np.ndarray | None = None
) -> list[mx.array]:
    """Packed weight, scales and, if affine, biases of rows (n, width). Scales and biases have the rows' dtype.

    factor describes the layer's inputs (see calibrate.py); with it, the products' error is minimized, not the weights'.
    """
    if q.mode != "affine" or not (search or factor is not None):
        return list(mx.quantize(rows, group_size=q.group_size, bits=q.bits, mode=q.mode))
    if factor is not None:
        return _gptq(rows, q, factor)
    step = max(1, SEARCHED_VALUES // rows.shape[-1])
    pieces = [_search(rows[i : i + step], q) for i in range(0, rows.shape[0], step)]
    return [mx.concatenate(list(parts)) for parts in zip(*pieces, strict=True)]


def dequantize_rows(packed: list[mx.array], q: Quantization) -> mx.array:
    """The rows that packed arrays represent, float32."""
    weight, scales, *rest = packed
    biases = None
    if q.mode == "affine":  # in float32, so that the caller's cast is the only rounding
        scales, biases = scales.astype(mx.float32), rest[0].astype(mx.float32)
    return mx.dequantize(weight, scales, biases, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=mx.float32)


def _search(rows: mx.array, q: Quantization) -> list[mx.array]:
    x = rows.astype(mx.float32).reshape(-1, q.group_size)
    return _packed(*_fit(x, q, rows.dtype), rows.shape, q, rows.dtype)


def _packed(codes: mx.array, scale: mx.array, bias: mx.array, shape: tuple, q: Quantization, dtype) -> list[mx.array]:
    groups = (shape[0], -1)
    return [
        mx.array(pack_codes(np.array(codes.astype(mx.uint8)).reshape(shape), q.bits)),
        scale.reshape(groups).astype(dtype),
        bias.reshape(groups).astype(dtype),
    ]


def _fit(
    x: mx.array, q: Quantization, dtype: mx.Dtype, share: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Codes (n, group), scales and biases (n, 1) closest to groups x (n, group): float32, but rounded to dtype.

    share (group,) weights the squared error of each value; uniform by default.
    """
    top = 2**q.bits - 1
    share = mx.ones((q.group_size,)) if share is None else share / share.mean()
    total = share.sum()

    def mean_of(values: mx.array) -> mx.array:
        return (share * values).sum(-1, keepdims=True) / total

    mean = mean_of(x)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    _, scales, biases = mx.quantize(x.astype(dtype), group_size=q.group_size, bits=q.bits)
    grids = [(scales, biases)]
    for part in RANGE_FRACTIONS:
        span = (high - low) * part
        grids.append((span / top, (low + high - span) / 2))
    best: tuple[mx.array, ...] = ()
    for scale, bias in grids:
        for fit in range(FITS + 1):
            scale, bias = (a.astype(dtype).astype(mx.float32) for a in (scale, bias))
            codes = mx.clip(mx.round((x - bias) / mx.where(scale == 0, 1, scale)), 0, top)
            error = mean_of(mx.square(x - codes * scale - bias))
            found: tuple[mx.array, ...] = (error, codes, scale, bias)
            if best:
                better = error < best[0]
                found = tuple(mx.where(better, new, old) for new, old in zip(found, best, strict=True))
            best = found
            if fit < FITS:
                center = mean_of(codes)
                variance = mean_of(mx.square(codes - center))
                covariance = mean_of((codes - center) * (x - mean))
                scale = mx.where(variance == 0, scale, covariance / mx.where(variance == 0, 1, variance))
                bias = mx.where(variance == 0, bias, mean - scale * center)
        mx.eval(best)
    _, codes, scale, bias = best
    return codes, scale, bias


def _gptq(rows: mx.array, q: Quantization, factor: np.ndarray) -> list[mx.array]:
    """Quantize such that (error of the rows) times factor, lower triangular (width, width), is small: GPTQ.

    Column j of that product contains only the errors of columns j, j + 1, ... So from the last column to the first,
    each is rounded from the value that would make its sum vanish: its weight plus the effect of the later errors.
    """
    exact = np.array(rows.astype(mx.float32))
    height, width = exact.shape
    g, top = q.group_size, 2**q.bits - 1
    diagonal = np.diagonal(factor)
    errors = np.zeros_like(exact)
    codes = np.empty(exact.shape, np.uint8)
    scales, biases = (np.empty((height, width // g), np.float32) for _ in range(2))
    for start in range(width - g, -1, -g):
        stop = start + g
        share = diagonal[start:stop]
        target = exact[:, start:stop] + errors[:, stop:] @ (factor[stop:, start:stop] / share)
        _, scale, bias = (np.array(a)[:, 0] for a in _fit(mx.array(target), q, rows.dtype, mx.array(share**2)))
        near, divisor = factor[start:stop, start:stop] / share, np.where(scale == 0, 1, scale)
        for j in range(g - 1, -1, -1):
            code = np.clip(np.round((target[:, j] - bias) / divisor), 0, top)
            error = exact[:, start + j] - (code * scale + bias)
            target[:, :j] += error[:, None] * near[j, :j]
            codes[:, start + j], errors[:, start + j] = code, error
        scales[:, start // g], biases[:, start // g] = scale, bias
    return _packed(mx.array(codes), mx.array(scales), mx.array(biases), exact.shape, q, rows.dtype)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n, width) codes below 2**bits -> (n, width * bits / 32) uint32: one stream of bits, lowest first."""
    single = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little").view(np.uint32)
