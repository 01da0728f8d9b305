"""Choosing the bits of each layer: the same for all, more where it matters, or the best within a given size.

How much a layer matters was measured by quantizing one kind of layer at a time to 3 bits and comparing the final
latents, on two pocket checkpoints that were trained independently (examples/sensitivity.py). The squared error of the
latents is the squared relative error of the weights times a factor per kind; IMPORTANCE is that factor for one matrix,
relative to to_k, as the geometric mean over the two checkpoints.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from ..dtypes import ITEM_BYTES, SPELLED
from ..errors import RequestError
from ..quantization import MODES, Quantization, default_quantization
from ..sizes import parse_bytes
from ..weights.quantize import tensor_quantization
from .rounding import dequantize_rows, quantize_rows
from .rows import SourceComponent, Tensor
from .sources import Source

DENSE = (0, 16)  # values of bits that mean "not quantized"
BITS = MODES["affine"][0]
RECIPES = ("uniform", "mixed")
# Value and output matrices carry the content of attention; queries and keys only steer it, through a softmax.
EXTRA_STEPS = {"to_v": 2, "to_out": 1}  # steps up in BITS, for `mixed`
IMPORTANCE = {"to_q": 1.2, "to_k": 1.0, "to_v": 18.0, "to_out": 11.0, "w1": 9.0, "w2": 21.0, "w3": 13.0}
TEXT_ENCODER_IMPORTANCE = 0.4
KIND = re.compile(r".*\.(to_q|to_k|to_v|to_out|w1|w2|w3)\.")
SAMPLED_RUNS, SAMPLED_ROWS = 4, 8  # rows that represent a matrix: the number of runs, and of rows in each
MIN_BITS = 3  # with 2 bits the relative error of the weights is 0.4

Recipe = Callable[[str, str, tuple[int, ...]], Quantization | None]
Choice = Callable[[str, Tensor], Quantization | None]
Rung = tuple[Quantization | None, int, float]  # with its bytes, and its squared relative error times importance


@dataclass(frozen=True)
class QuantizationSettings:
    """What the caller asked for: a quantization for each network, or a target size in bytes, and the recipe.

    kept has the networks for which nothing was requested: what the source packs in one of MLX's modes is copied as it
    is.
    """

    networks: dict[str, Quantization | None]
    group_size: int | None
    recipe: str | Recipe
    target: int | None
    kept: tuple[str, ...] = ()

    @property
    def quantizes(self) -> bool:
        return self.target is not None or callable(self.recipe) or any(self.networks.values())

    @property
    def is_affine(self) -> bool:
        """Whether any layer may use the mode "affine", the only one whose scales can be searched."""
        affine = any(q and q.mode == "affine" for q in self.networks.values())
        return self.target is not None or callable(self.recipe) or affine

    def choice(self, source: Source, dtype: str) -> Choice:
        if self.target is not None:
            return within(self.target, source, self.group_size, dtype)
        if callable(self.recipe):
            return custom(self.recipe)
        chosen = {"uniform": uniform, "mixed": mixed}[self.recipe](self.networks)
        return lambda component, tensor: chosen(component, tensor) or self._own(component, tensor)

    def _own(self, component: str, tensor: Tensor) -> Quantization | None:
        """How the source packs a tensor, if that is kept."""
        if component not in self.kept or tensor.packing is None:
            return None
        return tensor_quantization(component, tensor.name, tensor.shape, tensor.packing.quantization)

    def to_dict(self) -> dict:
        if self.target is not None:
            return {"target_bytes": self.target}
        if callable(self.recipe):
            return {"recipe": "custom"}
        return {name: q and q.to_dict() for name, q in self.networks.items()} | {"recipe": self.recipe}


def quantizations(
    bits: int | None,
    group_size: int | None = None,
    mode: str = "affine",
    text_encoder_bits: int | None = None,
    transformer_bits: int | None = None,
    recipe: str | Recipe = "uniform",
    target_size: int | str | None = None,
) -> QuantizationSettings:
    """How to quantize each network, from the arguments of convert."""
    if not callable(recipe) and recipe not in RECIPES:
        raise RequestError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    some_bits = (bits, text_encoder_bits, transformer_bits) != (None, None, None)
    if callable(recipe) and (some_bits or mode != "affine" or group_size is not None or target_size is not None):
        raise RequestError(
            "a recipe function chooses bits, group size and mode itself; leave out the other quantization options"
        )
    if target_size is not None:
        if recipe != "uniform" or mode != "affine":
            raise RequestError(
                "a target size chooses the bits of each layer, in mode affine; leave out recipe and mode"
            )
        if some_bits:
            raise RequestError("a target size and bits were both given; leave one of them out")
        target = parse_bytes(target_size, "target_size must be a size such as 3.2GB or 900MB")
        return QuantizationSettings({}, group_size, recipe, target)
    chosen = {}
    kept = []
    for component, own_bits in (("transformer", transformer_bits), ("text_encoder", text_encoder_bits)):
        component_bits = bits if own_bits is None else own_bits
        if component_bits is None and mode == "affine":
            kept.append(component)
        dense = component_bits in DENSE or (component_bits is None and mode == "affine")
        chosen[component] = None if dense else default_quantization(component_bits, group_size, mode)
    if group_size is not None and not any(chosen.values()):
        raise RequestError(
            f"group size {group_size} was given without bits, so nothing would be quantized; give bits too"
        )
    if recipe == "mixed" and not any(chosen.values()):
        raise RequestError("recipe mixed was given without bits, so nothing would be quantized; give bits too")
    if recipe == "mixed" and mode != "affine":
        raise RequestError(f"recipe mixed needs mode affine, the only one with a choice of bits, got {mode}")
    return QuantizationSettings(chosen, group_size, recipe, None, tuple(kept))


def uniform(networks: dict[str, Quantization | None]) -> Choice:
    return lambda component, tensor: tensor_quantization(component, tensor.name, tensor.shape, networks.get(component))


def mixed(networks: dict[str, Quantization | None]) -> Choice:
    """Like uniform, but with more bits for the transformer's value and output matrices."""

    def choose(component: str, tensor: Tensor) -> Quantization | None:
        q = tensor_quantization(component, tensor.name, tensor.shape, networks.get(component))
        if q is None or component != "transformer":
            return q
        step = BITS.index(q.bits) + EXTRA_STEPS.get(_kind(tensor.name), 0)
        return Quantization(BITS[min(step, len(BITS) - 1)], q.group_size)

    return choose


def _kind(name: str) -> str:
    """The kind of a matrix in the transformer's blocks: a key of IMPORTANCE."""
    found = KIND.match(name)
    assert found, f"{name} is not in a block of the transformer"
    return found[1]


def custom(own: Recipe) -> Choice:
    """A recipe function, limited to what the networks can run."""

    def choose(component: str, tensor: Tensor) -> Quantization | None:
        q = own(component, tensor.name, tensor.shape)
        if q and tensor_quantization(component, tensor.name, tensor.shape, q) is None:
            raise RequestError(f"{component} {tensor.name} cannot be quantized; the recipe must leave it dense")
        return q

    return choose


def within(target: int, source: Source, group_size: int | None, dtype: str) -> Choice:
    """The bits of each layer with the least expected error, such that all tensors fit in target bytes.

    The error of each layer is measured on a sample of its rows for each number of bits; then bits are added, one step
    at a time, to the layer that gains most per byte. Layers may stay dense if the size allows.
    """
    group_size = default_quantization(4, group_size).group_size
    item_bytes = ITEM_BYTES[SPELLED[dtype]]
    spent = 0
    ladders = {}
    for component in source.components.values():
        for tensor in component.tensors:
            dense = prod(tensor.shape) * item_bytes
            if (
                tensor_quantization(component.name, tensor.name, tensor.shape, Quantization(MIN_BITS, group_size))
                is None
            ):
                spent += dense
                continue
            ladder = _ladder(component, tensor, group_size, dtype, dense)
            ladders[component.name, tensor.name] = ladder
            spent += ladder[0][1]
    if spent > target:
        raise RequestError(
            f"a target size of {target:,} bytes is too small: with {MIN_BITS} bits in every layer that can be "
            f"quantized, the model takes {spent:,}; give at least that"
        )
    level = dict.fromkeys(ladders, 0)
    heap = [(_gain(ladder, 0), key) for key, ladder in ladders.items()]
    heapq.heapify(heap)
    while heap:
        _, key = heapq.heappop(heap)
        ladder, i = ladders[key], level[key]
        more = ladder[i + 1][1] - ladder[i][1]
        if spent + more > target:
            continue
        spent += more
        level[key] = i + 1
        if i + 2 < len(ladder):
            heapq.heappush(heap, (_gain(ladder, i + 1), key))
    chosen = {key: ladder[level[key]][0] for key, ladder in ladders.items()}
    return lambda component, tensor: chosen.get((component, tensor.name))


def _ladder(component: SourceComponent, tensor: Tensor, group_size: int, dtype: str, dense: int) -> list[Rung]:
    """The options for a layer, from the fewest bits up to dense."""
    importance = TEXT_ENCODER_IMPORTANCE
    if component.name == "transformer":
        importance = IMPORTANCE[_kind(tensor.name)]
    item_bytes = ITEM_BYTES[SPELLED[dtype]]
    height, width = tensor.shape
    starts = {run * max(0, height - SAMPLED_ROWS) // max(1, SAMPLED_RUNS - 1) for run in range(SAMPLED_RUNS)}
    rows = mx.concatenate([tensor.read(start, min(height, start + SAMPLED_ROWS)) for start in sorted(starts)])
    rows = rows.astype(getattr(mx, dtype))
    exact = rows.astype(mx.float32)
    power = float(mx.square(exact).sum()) or 1.0
    ladder: list[Rung] = []
    for bits in BITS:
        if bits < MIN_BITS:
            continue
        q = Quantization(bits, group_size)
        error = float(mx.square(dequantize_rows(quantize_rows(rows, q), q) - exact).sum()) / power
        nbytes = height * (width * bits // 8 + 2 * item_bytes * (width // group_size))
        ladder.append((q, nbytes, importance * error))
    return [*ladder, (None, dense, 0.0)]


def _gain(ladder: list[Rung], i: int) -> float:
    """Minus the error saved per byte by the next step up."""
    (_, before, error), (_, after, less) = ladder[i], ladder[i + 1]
    return (less - error) / (after - before)
