"""Plans the memory of training: which blocks stay in memory and which are streamed, forward and back, in every step.

The bounds are in bytes beyond the weights, measured as MLX's peaks: on a CPU in float32, and on an H200 in bfloat16
with MLX's CUDA build, at full size, for 512x512 and 1024x1024. Nothing was measured on Metal,
where a block is evaluated in smaller pieces: it has CUDA's bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import mlx.core as mx

from ..errors import MemoryBudgetError
from ..machine import backend
from ..memory import Plan, Planner, Stage, Way, Workload, make_plan
from ..models.layers import sum_dtype
from ..models.transformer import modulation_shapes
from ..request import SIZE_MULTIPLE
from ..sizes import rounded_up
from ..weights.blocks import READS_AHEAD
from . import attention
from .block import ROWS
from .dataset import Example

# Bytes per token and feature that one block's gradients need: measured 240.4 on a CPU, and on the H200 180 at 1024x1024
# and 183 at 512x512, with little freed before the end. On Metal a block is evaluated in pieces, which need less.
BLOCK = {"cpu": 242, "cuda": 184, "metal": 184}
# What a lean block keeps of the other rows: eleven arrays, among them queries, keys, values, and their gradients.
KEPT = {"cpu": 44, "cuda": 22, "metal": 22}
# During its attention. Unless that is fused, SCORES arrays of a piece's scores are alive as well, for two pieces at
# once if there are several: measured 3.0 for one and 6.2 for two on a CPU.
ATTENTION = {"cpu": 72, "cuda": 40, "metal": 40}
SCORES = {"cpu": 3.2, "cuda": 4, "metal": 4}
UNPACKED = {"cpu": 2, "cuda": 1.02, "metal": 1.02}  # of a quantized block's dense form: measured 1.01 on the H200
# Arrays of the factors' size in float32: the factors, two moments, and the sum of gradients so far; later, an image's
# gradients and a new sum as well.
STAYING, COPIES = 4, 6
LEAST_RESOLUTION = 256  # the lowest that is chosen to fit a budget


def plan_training(planner: Planner, examples: Sequence[Example], tokens: int, factors: int, budget: int) -> Plan:
    """The fastest plan for steps on these examples, with captions of at most `tokens`, within a budget in bytes.

    factors is the number of trained values. MemoryBudgetError if nothing fits, with the resolution that would.
    """
    width, height = max(((e.width, e.height) for e in examples), key=lambda size: size[0] * size[1])
    best = best_plan(planner, width, height, tokens, factors, budget)
    if best.room <= budget:
        return best
    side = int((width * height) ** 0.5) // SIZE_MULTIPLE * SIZE_MULTIPLE
    while side and best_plan(planner, side, side, tokens, factors, budget).room > budget:
        side -= SIZE_MULTIPLE
    smaller = f"--resolution {side} would fit" if side else "no smaller resolution fits"
    raise MemoryBudgetError(
        f"training on images of {width}x{height} does not fit within {rounded_up(budget)}: it needs at least "
        f"{rounded_up(best.room)}; {smaller}. Raise the budget, lower the rank, or convert the model to fewer bits"
    )


def resolution_within(planner: Planner, most: int, tokens: int, factors: int, budget: int) -> int:
    """The largest resolution from LEAST_RESOLUTION to `most` that fits a budget in bytes; `most` if none does."""
    sides = range(most, LEAST_RESOLUTION - 1, -SIZE_MULTIPLE)
    fitting = (side for side in sides if best_plan(planner, side, side, tokens, factors, budget).room <= budget)
    return next(fitting, most)


def best_plan(planner: Planner, width: int, height: int, tokens: int, factors: int, budget: int) -> Plan:
    """The fastest plan for steps on images of one size within a budget in bytes; the one that needs the least memory
    if nothing fits."""
    # lean blocks cannot use the fused gradient of attention: on the H200 they took more than 1.7 times as long
    leans = (False,) if backend() == "cuda" else (False, True)
    ways = tuple(Way(work(planner, width, height, tokens, factors, lean), lean=lean) for lean in leans)
    weights = planner.footprints["transformer"]
    if not READS_AHEAD[backend()]:
        weights = replace(weights, reading=0)  # nothing is computed meanwhile, and `_block_work` has room for it
    found = make_plan([Stage("train", ("transformer",), ways)], {"transformer": weights}, budget, keep=False)
    return replace(found, keep=True)  # from step to step


def work(planner: Planner, width: int, height: int, tokens: int, factors: int, lean: bool = False) -> int:
    """The bytes that training needs besides the transformer's blocks."""
    config, dtype = planner.checkpoint.transformer.config, planner.dtype
    length, _ = planner.tokens_of(Workload(width, height, images=1, tokens=tokens, steps=1))
    inputs = (len(config.blocks) + 1) * length * config.dim * sum_dtype(dtype).size
    modulation = sum(prod(shape) for shape in modulation_shapes("", config.dim).values())
    modulations = len(config.modulated) * modulation * dtype.size  # these weights stay in memory
    # the time's embedding is computed in float32, but its weights are planned in dtype
    values = sum(prod(shape) for name, shape in config.shapes().items() if name.startswith("t_embedder."))
    wider = values * (mx.float32.size - dtype.size)
    copy = 4 * factors
    # In the backward pass, the inputs of blocks make room for their factors' gradients.
    gradients = STAYING * copy + max(inputs, copy) + _block_work(planner, length, lean)
    return int(modulations + wider + max(gradients, COPIES * copy))


def _block_work(planner: Planner, length: int, lean: bool) -> float:
    config, on = planner.checkpoint.transformer.config, backend()
    rows = -(-length // -(-length // ROWS)) if lean else length  # a lean block's parts have equal sizes
    weights = planner.footprints["transformer"]
    block = (BLOCK[on] * rows + KEPT[on] * (length - rows)) * config.dim + UNPACKED[on] * weights.unpacked
    if not READS_AHEAD[on]:
        block = max(block, weights.reading)
    if attention.has_fused_gradient(planner.dtype, config.dim // config.n_heads):
        return block
    scores = SCORES[on] * attention.scores_bytes(config.n_heads, length)
    return max(block, ATTENTION[on] * length * config.dim + scores)
