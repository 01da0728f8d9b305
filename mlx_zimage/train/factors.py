"""The low-rank factors that training changes, and how they are added to a model's weights.

    {"layers.3": {"attention.to_q": {"down": (rank, in), "up": (out, rank)}, ...}, ...}

by block and by the layer's name within it: all float32, in the layout used for computing. A layer's difference is
scale * up @ down. As in kohya's trainer, `down` starts uniform and `up` at zero, so that the model starts unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from ..models.runner import NetworkConfig, Tree
from ..models.transformer import TransformerConfig
from ..weights.deltas import LowRank
from ..weights.overlay import changed

Factors = dict[str, dict[str, dict[str, mx.array]]]

MATRICES = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip
MODULATION = "adaLN_modulation.0"


def targets(config: TransformerConfig, extras: Collection[str] = ()) -> list[tuple[str, str]]:
    """(block, layer within it) of what is trained: the matrices of `layers`, 210 in the published model, and extras."""
    blocks = config.blocks if "refiners" in extras else [name for name in config.blocks if name.startswith("layers.")]
    found = [(block, layer) for block in blocks for layer in MATRICES]
    if "adaln" in extras:
        found += [(block, MODULATION) for block in blocks if block in config.modulated]
    return found


def new_factors(config: TransformerConfig, rank: int, extras: Collection[str], seed: int) -> Factors:
    """Factors that change nothing yet; RequestError if the rank is too large."""
    shapes, factors = config.shapes(), Factors()
    sides = {(block, layer): shapes[f"{block}.{layer}.weight"] for block, layer in targets(config, extras)}
    for (block, layer), (outputs, inputs) in sides.items():
        if not 1 <= rank <= min(outputs, inputs):
            raise RequestError(
                f"rank must be from 1 to {min(outputs, inputs)}, the smaller side of {block}.{layer} "
                f"({outputs}x{inputs}), got {rank}"
            )
    count, whole = rank * sum(map(sum, sides.values())), sum(map(math.prod, shapes.values()))
    if count > whole:  # `read_lora` would take it for a LoRA of another model
        raise RequestError(
            f"a LoRA of rank {rank} would have {count:,} values, more than the whole transformer ({whole:,}); choose a "
            f"lower rank"
        )
    random = np.random.default_rng(seed)
    for (block, layer), (outputs, inputs) in sides.items():
        bound = 1 / math.sqrt(inputs)  # Kaiming's, with a = sqrt(5)
        down = random.uniform(-bound, bound, (rank, inputs)).astype(np.float32)
        own = {"down": mx.array(down), "up": mx.zeros((outputs, rank))}
        factors.setdefault(block, {})[layer] = own
    return factors


def arrays_of(factors: Factors) -> list[mx.array]:
    """All arrays, in order."""
    return [array for layers in factors.values() for own in layers.values() for array in own.values()]


def laid(tree: Tree, factors: Mapping[str, Mapping[str, mx.array]], scale: float, dtype: mx.Dtype) -> Tree:
    """A block's tree with these factors added to any that it has already; see `models.lora`."""
    for layer, own in factors.items():
        tree = changed(tree, layer.split("."), partial(_beside, own=own, scale=scale, dtype=dtype))
    return tree


def _beside(weights: Tree, own: Mapping[str, mx.array], scale: float, dtype: mx.Dtype) -> Tree:
    lora = weights.get("lora", {})
    low = {
        "down": own["down"].astype(dtype),
        "up": own["up"].astype(dtype),
        "scale": mx.full((len(own["down"]),), scale, mx.float32),
    }
    if "low" in lora:  # the adapter's
        axes = {"down": 0, "up": 1, "scale": 0}
        low = {name: mx.concatenate([lora["low"][name], part], axis=axes[name]) for name, part in low.items()}
    return {**weights, "lora": {**lora, "low": low}}


def deltas(factors: Factors, scale: float, config: NetworkConfig) -> dict[str, LowRank]:
    """The factors by the weights' names, rows in the checkpoint's order, the scale in `up`."""
    found = {}
    for block, layers in factors.items():
        for layer, own in layers.items():
            name = f"{block}.{layer}.weight"
            order = np.argsort(np.array(config.sanitize(name, mx.arange(len(own["up"])))))
            found[name] = LowRank(own["down"], scale * own["up"][mx.array(order)])
    return found
