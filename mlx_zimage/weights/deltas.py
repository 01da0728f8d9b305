"""What a LoRA adds to one weight (out, in), in each of the forms that trainers store.

`difference(weight)` is the dense difference at strength 1, float32 in the weight's shape; at strength s the layer's
weight is weight + s * difference. Source: PEFT's and LyCORIS's modules, whose forward pass the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

import mlx.core as mx
import numpy as np

DORA_EPS = 1e-12  # a row of zeros has no direction; PEFT divides by its norm, LyCORIS adds its dtype's epsilon
FLOAT32_MAX = float(np.finfo(np.float32).max)

Reorder = Callable[[mx.array], mx.array]


class Delta(Protocol):
    """The difference of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights that it fits."""

    @property
    def arrays(self) -> list[mx.array]: ...

    def difference(self, weight: mx.array) -> mx.array:
        """What it adds to the weight at strength 1, float32."""

    def rows(self, part: int, parts: int) -> Delta:
        """Its rows when they are cut into `parts` equal pieces: one weight's share of a fused layer's difference."""

    def reordered(self, reorder: Reorder) -> Delta:
        """The same for a weight whose rows are in another order; reorder gives an array's rows that order."""


@dataclass(frozen=True)
class LowRank:
    """scale * up @ down; down (rank, in), up (out, rank)."""

    down: mx.array
    up: mx.array
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def arrays(self) -> list[mx.array]:
        return [self.down, self.up]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def difference(self, weight: mx.array) -> mx.array:
        return self.scale * (self.up.astype(mx.float32) @ self.down.astype(mx.float32))

    def rows(self, part: int, parts: int) -> Self:
        up = _rows(self.up, part, parts)
        # A fused layer made of three has a block-diagonal `up`; the other two's factors add nothing here. Zeros are
        # looked for on the CPU, since this may be for a plan, while another request is using the GPU.
        share = mx.split(self.up, parts, stream=mx.cpu)[part]
        nonzero = mx.any(mx.not_equal(share, 0, stream=mx.cpu), axis=0, stream=mx.cpu)
        used = np.flatnonzero(np.array(nonzero)).tolist()
        if len(used) == self.rank:
            return replace(self, up=up)
        used = used or [0]
        return replace(self, down=self.down[mx.array(used)], up=up[:, mx.array(used)])

    def reordered(self, reorder: Reorder) -> Self:
        return replace(self, up=reorder(self.up))


@dataclass(frozen=True)
class Kronecker:
    """scale * kron(w1, w2), as LoKr stores it: w1 (a, c) and w2 (b, d) for a weight (a * b, c * d)."""

    w1: mx.array
    w2: mx.array
    scale: float = 1.0
    order: mx.array | None = None  # of its rows, if different from the file's

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    @property
    def arrays(self) -> list[mx.array]:
        return [self.w1, self.w2]

    def difference(self, weight: mx.array) -> mx.array:
        w1, w2 = self.w1.astype(mx.float32), self.w2.astype(mx.float32)
        whole = (self.scale * w1[:, None, :, None] * w2[None, :, None, :]).reshape(self.shape)
        return whole if self.order is None else whole[self.order]

    def rows(self, part: int, parts: int) -> Delta:
        if self.w1.shape[0] % parts == 0:
            return replace(self, w1=_rows(self.w1, part, parts))
        return Dense(_rows(self.difference(mx.array(0.0)), part, parts))

    def reordered(self, reorder: Reorder) -> Self:
        rows = mx.arange(self.shape[0])
        order = reorder(rows)
        return self if order is rows else replace(self, order=order)


@dataclass(frozen=True)
class Hadamard:
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise, as LoHa stores it: each a (out, rank), each b (rank, in)."""

    w1_a: mx.array
    w1_b: mx.array
    w2_a: mx.array
    w2_b: mx.array
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def arrays(self) -> list[mx.array]:
        return [self.w1_a, self.w1_b, self.w2_a, self.w2_b]

    def difference(self, weight: mx.array) -> mx.array:
        w1_a, w1_b, w2_a, w2_b = (array.astype(mx.float32) for array in self.arrays)
        return self.scale * (w1_a @ w1_b) * (w2_a @ w2_b)

    def rows(self, part: int, parts: int) -> Self:
        return replace(self, w1_a=_rows(self.w1_a, part, parts), w2_a=_rows(self.w2_a, part, parts))

    def reordered(self, reorder: Reorder) -> Self:
        return replace(self, w1_a=reorder(self.w1_a), w2_a=reorder(self.w2_a))


@dataclass(frozen=True)
class Dense:
    """The whole difference, as ComfyUI extracts it for norms, biases and layers of any kind."""

    diff: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.diff.shape

    @property
    def arrays(self) -> list[mx.array]:
        return [self.diff]

    def difference(self, weight: mx.array) -> mx.array:
        return self.diff.astype(mx.float32)

    def rows(self, part: int, parts: int) -> Self:
        return replace(self, diff=_rows(self.diff, part, parts))

    def reordered(self, reorder: Reorder) -> Self:
        return replace(self, diff=reorder(self.diff))


@dataclass(frozen=True)
class Replacement:
    """The weight itself, in place of the model's."""

    value: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def arrays(self) -> list[mx.array]:
        return [self.value]

    def difference(self, weight: mx.array) -> mx.array:
        return self.value.astype(mx.float32) - weight.astype(mx.float32)

    def rows(self, part: int, parts: int) -> Self:
        return replace(self, value=_rows(self.value, part, parts))

    def reordered(self, reorder: Reorder) -> Self:
        return replace(self, value=reorder(self.value))


@dataclass(frozen=True)
class DoRA:
    """Direction and magnitude: weight + inner, each row (or column) rescaled to the length that magnitude gives it.

    magnitude is (out, 1), one length per row, or (1, in), one per column, as OneTrainer writes it. Strength 1 is as in
    PEFT and LyCORIS; at other strengths the difference is scaled as a whole, so that 0 is the model itself.
    """

    inner: Delta
    magnitude: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.inner.arrays, self.magnitude]

    @property
    def by_row(self) -> bool:
        return self.magnitude.shape[1] == 1

    def gain(self, weight: mx.array) -> mx.array:
        """The factor by which each row (out, 1) or column (1, in) of weight + inner is rescaled, float32."""
        whole = weight.astype(mx.float32) + self.inner.difference(weight)
        length = mx.sqrt((whole * whole).sum(axis=1 if self.by_row else 0, keepdims=True))
        return self.magnitude.astype(mx.float32) / (length + DORA_EPS)

    def difference(self, weight: mx.array) -> mx.array:
        base = weight.astype(mx.float32)
        return (base + self.inner.difference(weight)) * self.gain(weight) - base

    def rows(self, part: int, parts: int) -> Self:
        magnitude = _rows(self.magnitude, part, parts) if self.by_row else self.magnitude
        return replace(self, inner=self.inner.rows(part, parts), magnitude=magnitude)

    def reordered(self, reorder: Reorder) -> Self:
        magnitude = reorder(self.magnitude) if self.by_row else self.magnitude
        return replace(self, inner=self.inner.reordered(reorder), magnitude=magnitude)


def is_finite(delta: Delta) -> bool:
    scale = getattr(getattr(delta, "inner", delta), "scale", 1.0)
    return abs(scale) <= FLOAT32_MAX and all(mx.isfinite(array).all().item() for array in delta.arrays)


def _rows(array: mx.array, part: int, parts: int) -> mx.array:
    n = array.shape[0] // parts
    return array[part * n : (part + 1) * n]
