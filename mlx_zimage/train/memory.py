"""Plans the memory of training: which blocks stay in memory and which are streamed, forward and back, in every step.

The bounds are in bytes beyond the weights, measured on a CPU in float32 as MLX's peaks; those of a GPU follow from what
a block computes there, and were not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from ..errors import MemoryBudgetError
from ..machine import backend
from ..memory import Plan, Planner, Stage, Way, Workload, make_plan
from ..models.layers import sum_dtype
from ..models.transformer import modulation_shapes
from ..request import SIZE_MULTIPLE
from ..sizes import rounded_up
from . import attention
from .dataset import Example

# Bytes per token and feature that one block's gradients need (on a CPU at most 240.4, measured from 608 to 2336 tokens
# of a model 384 wide), and that they need during its attention, when pieces of at most SCORES bytes are alive as well.
BLOCK = {"cpu": 242, "cuda": 130, "metal": 130}
ATTENTION = {"cpu": 60, "cuda": 40, "metal": 40}
PIECES = 8
COPIES = 6  # of the factors, in float32: themselves, their gradients and the sum of these, two moments, and new ones
UNPACKED = 2  # of a quantized block's dense form


def plan_training(planner: Planner, examples: Sequence[Example], tokens: int, factors: int, budget: int) -> Plan:
    """The fastest plan for steps on these examples, with captions of at most `tokens`, within a budget in bytes.

    factors is the number of trained values. MemoryBudgetError if nothing fits, with the resolution that would.
    """
    width, height = max(((e.width, e.height) for e in examples), key=lambda size: size[0] * size[1])
    best = _best(planner, width, height, tokens, factors, budget)
    if best.room <= budget:
        return best
    side = int((width * height) ** 0.5) // SIZE_MULTIPLE * SIZE_MULTIPLE
    while side and _best(planner, side, side, tokens, factors, budget).room > budget:
        side -= SIZE_MULTIPLE
    smaller = f"--resolution {side} would fit" if side else "no smaller resolution fits"
    raise MemoryBudgetError(
        f"images of {width}x{height} cannot be trained on within {rounded_up(budget)}: they need at least "
        f"{rounded_up(best.room)}; {smaller}. Raise the budget, lower the rank, or convert the model to fewer bits"
    )


def _best(planner: Planner, width: int, height: int, tokens: int, factors: int, budget: int) -> Plan:
    way = Way(work(planner, width, height, tokens, factors))
    found = make_plan([Stage("train", ("transformer",), (way,))], planner.footprints, budget, keep=False)
    return replace(found, keep=True)  # from step to step


def work(planner: Planner, width: int, height: int, tokens: int, factors: int) -> int:
    """The bytes that training needs besides the transformer's blocks."""
    config, dtype = planner.checkpoint.transformer.config, planner.dtype
    length, _ = planner.tokens_of(Workload(width, height, images=1, tokens=tokens, steps=1))
    inputs = (len(config.blocks) + 2) * length * config.dim * sum_dtype(dtype).size
    modulation = sum(prod(shape) for shape in modulation_shapes("", config.dim).values())
    modulations = len(config.modulated) * modulation * dtype.size  # these weights stay in memory
    heads, size = config.n_heads, length * config.dim
    fused = backend() == "cuda" and attention.is_fused(dtype, config.dim // heads)
    scores = 0 if fused else PIECES * min(attention.SCORES, 4 * heads * length**2)
    block = max(BLOCK[backend()] * size, ATTENTION[backend()] * size + scores)
    block += UNPACKED * planner.footprints["transformer"].unpacked
    return int(inputs + modulations + 4 * COPIES * factors + block)
