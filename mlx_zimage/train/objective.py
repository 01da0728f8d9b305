"""Which noise levels a model is trained at, and how much each counts.

Flow matching: at the noise level sigma, from 0 to 1, the model sees (1 - sigma) * latents + sigma * noise at the time
1 - sigma, and should output latents - noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..variants import TURBO, Variant

# ai-toolkit's weights of the loss (its timestep_type "weighted"), measured there on flex.1, at some of its levels;
# linear in between
LEVELS = (0.0, 0.2, 0.5, 0.6, 0.876, 1.0)
WEIGHTS = (0.447, 0.72, 0.925, 1.08, 1.52, 0.906)
COUNT = 1000  # noise levels
SIGMAS = np.arange(1, COUNT + 1) / COUNT
LOSS_WEIGHTS = np.interp(SIGMAS, LEVELS, WEIGHTS)
LOSS_WEIGHTS /= LOSS_WEIGHTS.mean()
SHIFT = 2.0  # musubi-tuner's default for the base model


@dataclass(frozen=True)
class Draw:
    """What one gradient is computed from: the index of an example, its noise, the noise level and its weight."""

    example: int
    noise: np.ndarray
    sigma: float
    weight: float
    drops_caption: bool


def default_objective(variant: Variant) -> str:
    return "weighted" if variant == TURBO else "logit-normal"


def level(objective: str, random: np.random.Generator) -> tuple[float, float]:
    """A random noise level, and the weight of the loss there; weights have a mean of 1.

    "weighted" and "uniform" draw uniformly, the former from 1000 levels from 0.001 to 1; "logit-normal" is shifted by
    2.
    """
    if objective == "weighted":
        i = int(random.integers(COUNT))
        return float(SIGMAS[i]), float(LOSS_WEIGHTS[i])
    if objective == "logit-normal":
        u = 1 / (1 + np.exp(-random.standard_normal()))
        return float(SHIFT * u / (1 + (SHIFT - 1) * u)), 1.0
    return float(random.uniform()), 1.0


def draw(
    seed: int, index: int, order: Sequence[int], shapes: Sequence[tuple[int, ...]], objective: str, dropout: float
) -> Draw:
    """Gradient `index` of a run, counted from 0: a function of its arguments, so that a run can be resumed anywhere.

    order has the index of each example, as many times as it is repeated; each pass over it is shuffled anew. shapes
    are those of all examples' latents.
    """
    pass_, place = divmod(index, len(order))
    example = order[int(np.random.default_rng([seed, 0, pass_]).permutation(len(order))[place])]
    random = np.random.default_rng([seed, 1, index])
    sigma, own = level(objective, random)
    noise = random.standard_normal(shapes[example], np.float32)
    return Draw(example, noise, sigma, own, bool(random.uniform() < dropout))
