"""The gradients of attention without ever holding the scores of all queries.

Where MLX has no fused gradient, as on Metal and on a CPU, differentiating its attention would keep the scores of every
head and pair of tokens: 2.1 GB per block at 1024x1024. There they are recomputed for a few queries at a time.
Source: Dao et al., FlashAttention (2022), appendix B.
"""

from __future__ import annotations

import math

import mlx.core as mx

from ..bounds import FUSED_ON_METAL
from ..machine import backend
from ..models.layers import TILE, compiled, dot_product_attention

SCORES = 2**26  # bytes of float32 scores at once
FUSED_ROWS = 128  # MLX's fused gradient needs a multiple of this many queries


def is_fused(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether MLX's attention keeps no scores in memory; its gradient may."""
    if backend() == "metal":
        return head_dim in FUSED_ON_METAL
    return backend() == "cuda" and dtype != mx.float32 and head_dim in (64, 80, 96, 128)


def has_fused_gradient(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether `differentiable` keeps no scores in memory, and its gradient does not either."""
    return backend() == "cuda" and is_fused(dtype, head_dim)


def differentiable(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """`dot_product_attention` of q (B, H, L, D) to k and v (B, H, L', D), for code that MLX differentiates.

    Zeros are appended to the queries up to a multiple of FUSED_ROWS, without which MLX's gradient keeps all scores.
    """
    count = q.shape[2]
    if extra := -count % FUSED_ROWS:
        q = mx.pad(q.swapaxes(1, 2), [(0, 0), (0, extra), (0, 0), (0, 0)]).swapaxes(1, 2)  # its layout stays
    return dot_product_attention(q, k, v).swapaxes(1, 2)[:, :count].swapaxes(1, 2)


def attention(q: mx.array, k: mx.array, v: mx.array, most: float = math.inf) -> mx.array:
    """`dot_product_attention` of q (B, H, L, D) to k and v (B, H, L', D), evaluated in pieces unless it is fused."""
    if is_fused(q.dtype, q.shape[-1]):
        return dot_product_attention(q, k, v, most)
    found: list[mx.array] = []
    for part in _pieces(q, k):
        _follow(found, dot_product_attention(q[:, :, part], k, v, most))
    return mx.concatenate(found, axis=2)


def gradients(
    q: mx.array, k: mx.array, v: mx.array, out: mx.array, d_out: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The loss's gradients with respect to q, k and v, given the attention's output and its gradient (B, H, L, D).

    They are evaluated in pieces, in float32.
    """
    dk, dv = (mx.zeros(part.shape, mx.float32) for part in (k, v))
    found: list[mx.array] = []
    for part in _pieces(q, k):
        dq, dk, dv = _piece(q[:, :, part], out[:, :, part], d_out[:, :, part], k, v, dk, dv)
        _follow(found, dq, dk, dv)
    return mx.concatenate(found, axis=2), dk.astype(k.dtype), dv.astype(v.dtype)


def scores_bytes(heads: int, length: int) -> int:
    """The bytes of an attention's scores that are needed at once: those of two pieces, or of all its queries."""
    return 4 * heads * min(length, 2 * _rows(heads, length)) * length


def _rows(heads: int, length: int) -> int:
    """The number of queries whose scores for this many keys fit in SCORES bytes, but at least TILE."""
    return max(1, SCORES // (4 * heads * length) // TILE) * TILE


def _pieces(q: mx.array, k: mx.array) -> list[slice]:
    step = _rows(q.shape[0] * q.shape[1], k.shape[2])
    return [slice(a, a + step) for a in range(0, q.shape[2], step)]


def _follow(before: list[mx.array], piece: mx.array, *beside: mx.array) -> None:
    """Queue a piece once all earlier pieces except the last are computed: otherwise memory for all is allocated at
    once."""
    mx.async_eval(piece, *beside)
    mx.eval(*before[-1:])
    before.append(piece)


@compiled
def _piece(
    q: mx.array, out: mx.array, d_out: mx.array, k: mx.array, v: mx.array, dk: mx.array, dv: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The gradient of some queries, and dk and dv with what these queries add."""
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, out, d_out, k, v = (x.astype(mx.float32) for x in (q, out, d_out, k, v))
    p = mx.softmax(scale * q @ k.swapaxes(-1, -2), axis=-1)
    dv = dv + p.swapaxes(-1, -2) @ d_out
    ds = scale * p * (d_out @ v.swapaxes(-1, -2) - (d_out * out).sum(-1, keepdims=True))
    return (ds @ k).astype(dtype), dk + ds.swapaxes(-1, -2) @ q, dv
