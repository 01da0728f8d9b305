"""What LoRAs add to a linear layer, dense or quantized.

A layer that LoRAs change has `lora` in its tree (see `mlx_zimage.weights.overlay`), with any of these. R is the sum of
all files' ranks. Strengths are float32 arrays, so that compiled code is not traced again for others:

- `low`: `down` (R, in), `up` (out, R), `scale` (R,): low-rank factors, those of several files side by side;
- `kron`: a list of Kronecker factors `w1` (a, c), `w2` (b, d) and their `scale`, with `order` (out,) if the layer's
  rows are in a different order from the file's;
- `hada`: a list of `w1_a`, `w1_b`, `w2_a`, `w2_b`, products that are multiplied elementwise, and their `scale`;
- `dense`: a list of whole differences `diff` (out, in) and their `scale`;
- `rows` (out,) or `columns` (in,): DoRA's gains of the layer's own outputs or inputs, minus 1. An item of a list may
  have gains of the same names, from which 1 is not subtracted, for its own difference.

Low-rank factors are always multiplied beside the layer's product, where they lose nothing to the weight's rounding. All
others are added to the dense weight if there is one, which is faster: on an H200 at 1024x1024 (bfloat16, 8 and 4 bits
alike) a LoKr of all layers makes a step 15% longer this way, and 40% beside the product. Two files of rank 16 make it
8% longer beside the product; added to the weight they would make it 7% longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx

from .runner import Tree


def beside(x: mx.array, own: Callable[[mx.array], mx.array], lora: Tree) -> mx.array:
    """The output (..., out) for x (..., in) of a layer with LoRAs, which are multiplied beside its own product."""
    y = own(x + by(x, lora["columns"]) if "columns" in lora else x)
    if "rows" in lora:
        y = y + by(y, lora["rows"])
    for kind, side in items(lora):
        inner = by(x, side["columns"]) if "columns" in side else x
        product = kronecker(inner, side) if kind == "kron" else inner @ DIFFERENCES[kind](side).T
        y = y + by(product, side["scale"] * side["rows"] if "rows" in side else side["scale"])
    return low_rank(x, y, lora)


def low_rank(x: mx.array, y: mx.array, lora: Tree) -> mx.array:
    """y (..., out) with the low-rank products of x (..., in)."""
    low = lora.get("low")
    return mx.addmm(y, by(x @ low["down"].T, low["scale"]), low["up"].T) if low else y


def added(weight: mx.array, lora: Tree) -> mx.array:
    """The dense weight (out, in) plus all differences except the low-rank ones."""
    own = weight
    if "rows" in lora:
        weight = weight + by(own, lora["rows"][:, None])
    if "columns" in lora:
        weight = weight + by(own, lora["columns"])
    for kind, side in items(lora):
        scale = side["scale"] * side["rows"][:, None] if "rows" in side else side["scale"]
        weight = weight + by(DIFFERENCES[kind](side), scale * side["columns"] if "columns" in side else scale)
    return weight


def needs_dense(lora: Tree) -> bool:
    """Whether one file has gains of rows and another of columns, which can only be added up in the dense weight."""
    return "rows" in lora and "columns" in lora


def items(lora: Tree) -> Iterator[tuple[str, Tree]]:
    """All differences except the low-rank ones, with their kinds."""
    return ((kind, side) for kind in DIFFERENCES for side in lora.get(kind, ()))


def by(x: mx.array, factor: mx.array) -> mx.array:
    """x times a float32 factor, rounded once to x's dtype."""
    return (x * factor).astype(x.dtype)


def kronecker(x: mx.array, side: Tree) -> mx.array:
    """x (..., c * d) times the transpose of kron(w1, w2), which is not built: (..., a * b)."""
    w1, w2 = side["w1"], side["w2"]
    inner = x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1]) @ w2.T
    y = (w1 @ inner).reshape(*x.shape[:-1], -1)
    return mx.take(y, side["order"], axis=-1) if "order" in side else y


def kron(side: Tree) -> mx.array:
    w1, w2 = side["w1"], side["w2"]
    whole = (w1[:, None, :, None] * w2[None, :, None, :]).reshape(len(w1) * len(w2), -1)
    return whole[side["order"]] if "order" in side else whole


def hadamard(side: Tree) -> mx.array:
    return (side["w1_a"] @ side["w1_b"]) * (side["w2_a"] @ side["w2_b"])


def dense(side: Tree) -> mx.array:
    return side["diff"]


# Each kind's difference of the weight (out, in), without its scale.
DIFFERENCES: dict[str, Callable[[Tree], mx.array]] = {"kron": kron, "hada": hadamard, "dense": dense}
