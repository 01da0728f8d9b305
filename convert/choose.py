"""Which bits each layer gets: the same for all, more where it matters, or the best within a given size.

How much a layer matters was measured on the pocket checkpoint, by packing one kind of layer at a time to 3 bits and
comparing final latents (6 prompts, 4 steps). With x times the relative error in a kind's weights its share of the
final squared error grows x squared times; IMPORTANCE is the factor between the two, for one matrix, to_k = 1.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable
from math import prod

import mlx.core as mx

from ..errors import RequestError
from ..quantize import MODES, Quantization, default_quantization, recipe
from .pack import pack, unpack
from .rows import SourceComponent, Tensor
from .sources import Source

DENSE = (0, 16)  # bits that mean: not quantized
BITS = MODES["affine"][0]
RECIPES = ("uniform", "mixed")
# The value and output matrices carry what attention moves; queries and keys only steer it, through a softmax.
RAISED = {"to_v": 2, "to_out": 1}  # steps up in BITS, for `mixed`
IMPORTANCE = {"to_q": 1.5, "to_k": 1.0, "to_v": 10.0, "to_out": 4.3, "w1": 3.0, "w2": 5.0, "w3": 4.0}
TEXT_ENCODER_IMPORTANCE = 0.9
KIND = re.compile(r".*\.(to_q|to_k|to_v|to_out|w1|w2|w3)\.")
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SAMPLED_RUNS, SAMPLED_ROWS = 4, 8  # rows that stand for a matrix: so many runs of so many
LEAST_BITS = 3  # 2 bits leave an error of 0.4 of the weights

Choice = Callable[[str, Tensor], Quantization | None]


def quantizations(
    bits: int | None,
    group_size: int | None = None,
    mode: str = "affine",
    text_encoder_bits: int | None = None,
    transformer_bits: int | None = None,
) -> dict[str, Quantization | None]:
    """How each network that can be quantized is to be, from convert's arguments."""
    chosen = {}
    for component, own_bits in (("transformer", transformer_bits), ("text_encoder", text_encoder_bits)):
        component_bits = bits if own_bits is None else own_bits
        dense = component_bits in DENSE or (component_bits is None and mode == "affine")
        chosen[component] = None if dense else default_quantization(component_bits, group_size, mode)
    if group_size is not None and not any(chosen.values()):
        raise RequestError(f"a group size of {group_size} was given, but no bits; nothing would be quantized")
    return chosen


def uniform(wanted: dict[str, Quantization | None]) -> Choice:
    return lambda component, tensor: recipe(component, tensor.name, tensor.shape, wanted.get(component))


def mixed(wanted: dict[str, Quantization | None]) -> Choice:
    """Like uniform, with more bits for the transformer's value and output matrices."""
    if any(q and q.mode != "affine" for q in wanted.values()):
        raise RequestError("the recipe mixed is for the mode affine, the only one with several bits")

    def choose(component: str, tensor: Tensor) -> Quantization | None:
        q = recipe(component, tensor.name, tensor.shape, wanted.get(component))
        if q is None or component != "transformer":
            return q
        step = BITS.index(q.bits) + RAISED.get(KIND.match(tensor.name)[1], 0)
        return Quantization(BITS[min(step, len(BITS) - 1)], q.group_size)

    return choose


def parse_size(size: int | str) -> int:
    """Bytes, from a number or a text such as "3.2GB" (decimal) or "3GiB" (binary)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if not found or found[2].upper() not in SIZES:
        raise RequestError(f"target size must be like 3.2GB or 900MB, got {size!r}")
    return int(float(found[1]) * SIZES[found[2].upper()])


def within(target: int, source: Source, group_size: int | None, dtype: str) -> Choice:
    """The bits of each layer that keep the folder's tensors within target bytes at the least expected error.

    Each layer's error is measured on a sample of its rows for each number of bits; bits then go, one step at a time,
    to the layer that gains most by the byte. Layers may stay dense, where the size allows.
    """
    group_size = default_quantization(4, group_size).group_size
    item_bytes = 4 if dtype == "float32" else 2
    spent = 0
    ladders = {}
    for component in source.components.values():
        for tensor in component.tensors:
            dense = prod(tensor.shape) * item_bytes
            if recipe(component.name, tensor.name, tensor.shape, Quantization(LEAST_BITS, group_size)) is None:
                spent += dense
                continue
            ladder = _ladder(component, tensor, group_size, dtype, dense)
            ladders[component.name, tensor.name] = ladder
            spent += ladder[0][1]
    if spent > target:
        raise RequestError(
            f"{target:,} bytes cannot be met: with {LEAST_BITS} bits in every layer that can be quantized the model "
            f"has {spent:,}"
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


def _ladder(component: SourceComponent, tensor: Tensor, group_size: int, dtype: str, dense: int) -> list:
    """(quantization, bytes, weighted squared error) of a layer, from the fewest bits up to dense."""
    importance = TEXT_ENCODER_IMPORTANCE
    if component.name == "transformer":
        importance = IMPORTANCE[KIND.match(tensor.name)[1]]
    item_bytes = 4 if dtype == "float32" else 2
    height, width = tensor.shape
    starts = {run * max(0, height - SAMPLED_ROWS) // max(1, SAMPLED_RUNS - 1) for run in range(SAMPLED_RUNS)}
    rows = mx.concatenate([tensor.read(start, min(height, start + SAMPLED_ROWS)) for start in sorted(starts)])
    rows = rows.astype(getattr(mx, dtype))
    exact = rows.astype(mx.float32)
    power = mx.square(exact).sum().item() or 1.0
    ladder = []
    for bits in BITS:
        if bits < LEAST_BITS:
            continue
        q = Quantization(bits, group_size)
        error = mx.square(unpack(pack(rows, q), q) - exact).sum().item() / power
        nbytes = height * (width * bits // 8 + 2 * item_bytes * (width // group_size))
        ladder.append((q, nbytes, importance * error))
    return [*ladder, (None, dense, 0.0)]


def _gain(ladder: list, i: int) -> float:
    """Minus the error saved by each byte that the next step costs."""
    (_, before, error), (_, after, less) = ladder[i], ladder[i + 1]
    return (less - error) / (after - before)
