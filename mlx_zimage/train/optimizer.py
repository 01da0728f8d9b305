"""AdamW, with gradients clipped by their norm and a rate that warms up.

It follows torch.optim.AdamW and torch.nn.utils.clip_grad_norm_, which also compute bias corrections in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

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
        """The factors after one more step, evaluated block by block, so that little is in memory twice."""
        self.step += 1
        b1, b2 = BETAS
        rate_1, scale_2 = rate / (1 - b1**self.step), 1 / math.sqrt(1 - b2**self.step)
        stepped: Factors = {}
        for block, own in factors.items():
            d = gradients.pop(block)
            self.first[block] = tree_map(lambda m, d: b1 * m + (1 - b1) * d, self.first[block], d)
            self.second[block] = tree_map(lambda v, d: b2 * v + (1 - b2) * mx.square(d), self.second[block], d)
            stepped[block] = tree_map(
                lambda p, m, v: p * (1 - rate * decay) - rate_1 * m / (mx.sqrt(v) * scale_2 + EPS),
                own,
                self.first[block],
                self.second[block],
            )
            mx.eval(self.first[block], self.second[block], stepped[block])
        return stepped


def added(total: Factors, gradients: Factors) -> Factors:
    """The sum of two trees of gradients, evaluated; the first may be empty."""
    found = tree_map(mx.add, total, gradients) if total else gradients
    mx.eval(found)
    return found


def clipped(gradients: Factors, norm: float, share: float = 1.0) -> tuple[Factors, float]:
    """share times the gradients, scaled down if their norm exceeds `norm`; and their norm before that."""
    squares = [mx.square(array).sum() for array in arrays_of(gradients)]
    own = share * math.sqrt(float(mx.stack(squares).sum()))
    factor = share * min(1.0, norm / (own + 1e-6))
    return tree_map(lambda array: factor * array, gradients), own


def warmed_up(rate: float, step: int, warm_up: int) -> float:
    """The rate of step 0, 1, 2, ...: it rises linearly to `rate` in the first warm_up steps."""
    return rate * min(1.0, (step + 1) / (warm_up + 1))
