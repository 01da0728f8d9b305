"""One block of the transformer with factors added to its weights: its output, and the gradients of its inputs.

Where MLX has no fused gradient of attention, a block is differentiated in three pieces: what is before its attention,
the attention itself as in `attention`, and what is after it. The first and the last treat each row on its own, so a
lean block can differentiate both, and compute the last, for a group of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import mlx.core as mx
from mlx.utils import tree_map

from ..models.layers import Product, compiled, linear, settle
from ..models.runner import Tree
from ..models.transformer import TransformerConfig, add_attention, attention_inputs, feed
from . import attention
from .factors import laid

Layers = dict[str, dict[str, mx.array]]  # the factors of one block, by the layer's name within it

ROWS = 1280  # that a lean block computes at a time, at most: an image of 512x512 with its caption
BEFORE = ("attention.to_q", "attention.to_k", "attention.to_v")  # the layers before the attention


class Block:
    """Blocks of an architecture that compute in dtype; the factors' difference is scale * up @ down.

    `product` and `most` are as in `Transformer`; `lean` is explained above. In all methods x is (B, L, dim), `own` has
    the block's factors, modulation is (4, dim), cos and sin are the rotary tables of the rows of x, and only the first
    `rows` rows of the output are computed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        dtype: mx.Dtype,
        scale: float,
        product: Product = linear,
        most: float = math.inf,
        lean: bool = False,
    ):
        self.config = config
        self.dtype = dtype
        self.scale = scale
        self.product = product
        self.most = most
        self.at_once = ROWS if lean else None
        # whether it is differentiated as a whole
        self.is_whole = not lean and attention.has_fused_gradient(dtype, config.dim // config.n_heads)
        self._enter_fast, self._leave_fast = compiled(self._enter), compiled(self._leave)
        self._enter_back_fast, self._leave_back_fast = compiled(self._enter_back), compiled(self._leave_back)
        self._whole_back_fast = compiled(self._whole_back)

    def __call__(
        self,
        x: mx.array,
        own: Layers,
        weights: Tree,
        modulation: mx.array,
        cos: mx.array,
        sin: mx.array,
        rows: int | None = None,
    ) -> mx.array:
        """The block's output."""
        q, k, v = self._enter_fast(x, own, weights, modulation, cos, sin, rows)
        out = attention.attention(q, k, v, self.most)
        del q, k, v
        parts = self._parts(out.shape[2])
        if len(parts) == 1:
            return self._leave_fast(x, out, own, weights, modulation)
        settle(out)
        ended = []
        for part in parts:
            ended.append(self._leave_fast(x[:, part], out[:, :, part], own, weights, modulation))
            settle(ended[-1])
        return mx.concatenate(ended, axis=1)

    def gradients(
        self,
        x: mx.array,
        own: Layers,
        weights: Tree,
        modulation: mx.array,
        cos: mx.array,
        sin: mx.array,
        rows: int | None,
        d: mx.array,
    ) -> tuple[mx.array, mx.array, Layers]:
        """The loss's gradients with respect to x, the modulation and the factors, given that of the block's output.

        The block is computed again: as a whole where MLX has a fused gradient of attention, otherwise piece by piece,
        each evaluated before the next.
        """
        if self.is_whole:
            return self._whole_back_fast(x, own, weights, modulation, cos, sin, rows, d)
        q, k, v = self._enter_fast(x, own, weights, modulation, cos, sin, rows)
        out = attention.attention(q, k, v, self.most)
        settle(q, k, v, out)
        after = {layer: factors for layer, factors in own.items() if layer not in BEFORE}
        before = {layer: factors for layer, factors in own.items() if layer in BEFORE}
        ended = []
        for part in self._parts(out.shape[2]):
            ended.append(self._leave_back_fast(x[:, part], out[:, :, part], after, weights, modulation, d[:, part]))
            settle(ended[-1])
        dx, d_out, d_modulation, found_after = joined(ended, axes=(1, 2))
        dq, dk, dv = attention.gradients(q, k, v, out, d_out)
        settle(dx, dq, dk, dv)
        del q, k, v, out, d_out, ended
        if rows is not None:
            dx, dq = _padded(dx, 1, x.shape[1]), _padded(dq, 2, x.shape[1])
        begun = []
        for part in self._parts(x.shape[1]):
            given = cos[part], sin[part], *(array[:, :, part] for array in (dq, dk, dv))
            begun.append(self._enter_back_fast(x[:, part], before, weights, modulation, *given))
            settle(begun[-1])
        by_x, by_modulation, found = joined(begun, axes=(1,))
        dx, d_modulation = dx + by_x, d_modulation + by_modulation
        settle(dx, d_modulation)
        return dx, d_modulation, {**found, **found_after}

    def _parts(self, rows: int) -> list[slice]:
        """The rows that are computed together."""
        count = 1 if self.at_once is None else -(-rows // self.at_once)
        size = -(-rows // count)
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _over(self, weights: Tree, own: Layers) -> Tree:
        return laid(weights, own, self.scale, self.dtype)

    def _enter(self, x, own, weights, modulation, cos, sin, rows):
        """Queries, keys and values."""
        config, laid_over = self.config, self._over(weights, own)
        shared = {"heads": config.n_heads, "eps": config.norm_eps, "product": self.product}
        return attention_inputs(x, laid_over, modulation, cos, sin, rows, **shared)

    def _leave(self, x, out, own, weights, modulation):
        """From the attention's output to the block's."""
        laid_over = self._over(weights, own)
        x = add_attention(x, out, laid_over, modulation, eps=self.config.norm_eps, product=self.product)
        return feed(x, laid_over, modulation, eps=self.config.norm_eps, product=self.product)

    def _whole_back(self, x, own, weights, modulation, cos, sin, rows, d):
        def whole(x, modulation, own):
            q, k, v = self._enter(x, own, weights, modulation, cos, sin, rows)
            return (self._leave(x, attention.differentiable(q, k, v), own, weights, modulation),)

        return pulled_back(whole, (x, modulation, own), (d,))

    def _leave_back(self, x, out, own, weights, modulation, d):
        def leave(x, out, modulation, own):
            return (self._leave(x, out, own, weights, modulation),)

        return pulled_back(leave, (x, out, modulation, own), (d,))

    def _enter_back(self, x, own, weights, modulation, cos, sin, dq, dk, dv):
        def enter(x, modulation, own):
            return self._enter(x, own, weights, modulation, cos, sin, None)

        return pulled_back(enter, (x, modulation, own), (dq, dk, dv))


def pulled_back(function: Callable[..., tuple[mx.array, ...]], given: tuple, cotangents: tuple[mx.array, ...]) -> tuple:
    """The loss's gradients with respect to a function's arguments (arrays or trees), given those of its results."""

    def probe(*given):
        pairs = zip(function(*given), cotangents, strict=True)
        return sum((found.astype(mx.float32) * d).sum() for found, d in pairs)

    found = mx.grad(probe, argnums=tuple(range(len(given))))(*given)
    return found if len(given) > 1 else (found,)  # for a single argument, MLX returns its gradient without a tuple


def joined(parts: Sequence[tuple], axes: Sequence[int]) -> tuple:
    """Gradients of all rows, from parts that each cover some of them: of each part, the first gradients, one for each
    axis, are joined along it, and all others are added up."""
    if len(parts) == 1:
        return parts[0]
    each = list(zip(*parts, strict=True))
    by_row = [mx.concatenate(list(arrays), axis) for arrays, axis in zip(each[: len(axes)], axes, strict=True)]
    return *by_row, *(reduce(partial(tree_map, mx.add), trees) for trees in each[len(axes) :])


def _padded(x: mx.array, axis: int, rows: int) -> mx.array:
    """x with zeros appended along an axis."""
    return mx.pad(x, [(0, rows - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
