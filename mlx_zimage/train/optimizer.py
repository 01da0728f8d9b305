"""AdamW, with gradients clipped by their norm and a rate that warms up.

It follows torch.optim.AdamW, which also computes bias corrections in float64, and torch.nn.utils.clip_grad_norm_.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

from ..models.layers import compiled
from .block import Layers
from .factors import Factors, arrays_of

BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass
class AdamW:
    """The moments of all factors, float32, and the number of steps taken so far."""

    first: Factors
    second: Factors
    step: int = 0

    @classmethod
    def new(cls, factors: Factors) -> AdamW:
        return cls(tree_map(mx.zeros_like, factors), tree_map(mx.zeros_like, factors))

    def apply(self, factors: Factors, gradients: Factors, rate: float, decay: float) -> Factors:
        """The factors after one more step, evaluated block by block, so that little is in memory twice.

        Gradients are removed from their tree as they are used.
        """
        self.step += 1
        b1, b2 = BETAS
        rate_1, scale_2 = rate / (1 - b1**self.step), 1 / math.sqrt(1 - b2**self.step)
        # as numbers they would be constants, and each step would be compiled anew
        changing = [mx.array(number) for number in (1 - rate * decay, rate_1, scale_2)]
        stepped: Factors = {}
        for block, own in factors.items():
            changed = _stepped(own, self.first[block], self.second[block], gradients.pop(block), *changing)
            mx.eval(changed)
            stepped[block], self.first[block], self.second[block] = changed
        return stepped


@compiled
def _stepped(
    own: Layers, first: Layers, second: Layers, d: Layers, kept: mx.array, rate: mx.array, scale: mx.array
) -> tuple[Layers, Layers, Layers]:
    """The factors of one block and their moments after one more step; see `AdamW.apply`."""
    b1, b2 = BETAS
    first = tree_map(lambda m, d: b1 * m + (1 - b1) * d, first, d)
    second = tree_map(lambda v, d: b2 * v + (1 - b2) * mx.square(d), second, d)
    own = tree_map(lambda p, m, v: p * kept - rate * m / (mx.sqrt(v) * scale + EPS), own, first, second)
    return own, first, second


def sum_of(total: Factors, gradients: Factors) -> Factors:
    """The sum of two trees of gradients, evaluated; the first may be empty."""
    found = tree_map(mx.add, total, gradients) if total else gradients
    mx.eval(found)
    return found


def clipped(gradients: Factors, norm: float, share: float = 1.0) -> tuple[Factors, float]:
    """The gradients times `share`, scaled down if their norm exceeds `norm`; and their norm before that."""
    squares = [mx.square(array).sum() for array in arrays_of(gradients)]
    own = share * math.sqrt(float(mx.stack(squares).sum()))
    factor = share * min(1.0, norm / (own + 1e-6))
    return tree_map(lambda array: factor * array, gradients), own


def warmed_up(rate: float, step: int, warm_up: int) -> float:
    """The rate of step 0, 1, 2, ...: it rises linearly to `rate` in the first warm_up steps."""
    return rate * min(1.0, (step + 1) / (warm_up + 1))
