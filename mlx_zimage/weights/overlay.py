"""LoRAs laid over a network's weights: the same blocks, kept or streamed, with what LoRAs add beside each layer.

The model's own weights are never changed. LoRAs are laid over a block's tree when the block runs, so that without
them it is the same model, bit for bit, and changing strengths reads nothing from disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.layers import dequantize
from ..models.lora import DIFFERENCES
from ..models.runner import Apply, NetworkConfig, S, Tree
from .blocks import Blocks
from .deltas import Delta, DoRA, Hadamard, Kronecker, LowRank, Replacement

Edit = Callable[[Any], Any]  # returns the replacement for a part of a tree
Base = Callable[[str], mx.array]  # returns a weight of the model in the form used for computing


@dataclass(frozen=True)
class Side:
    """One file's difference of one weight, in the layout and dtype used for computing, without its strength.

    kind is that of `models.lora`, or "sum" for what is added to a norm's weight, a bias or the like; the strength is
    multiplied by scale. gain is DoRA's, float32, by name: "rows" (out,) or "columns" (in,).
    """

    kind: str
    arrays: Mapping[str, mx.array]
    scale: float = 1.0
    gain: Mapping[str, mx.array] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.arrays.values(), *self.gain.values()))


@dataclass(frozen=True)
class Extra:
    """What LoRAs add to a network's memory: `held` bytes, and work in the block that they add most to.

    features is the sum of the output widths of a block's adapted layers, and weights the number of weights in
    layers whose dense weight is changed.
    """

    held: int = 0
    features: int = 0
    weights: int = 0


class Overlay:
    """A `Runner` that lays LoRAs over the blocks of another."""

    def __init__(self, runner: Blocks, config: NetworkConfig):
        self.runner = runner
        self.config = config
        self._deltas: dict[str, Mapping[str, Delta]] = {}  # by file, by the weight's name, as read
        self._sides: dict[str, dict[str, Side]] = {}  # the same, computed
        self._active: dict[str, float] = {}  # the strengths other than 0, by file
        self._stacks: dict[str, Tree] = {}  # by weight: the low-rank factors of the active files, side by side
        self._changes: dict[str, Edit] = {}  # by the path of the part that it replaces
        self._under: dict[str, list[tuple[list[str], Edit]]] = {}  # those under a prefix, by the rest of their path

    @property
    def dtype(self) -> mx.Dtype:
        return self.runner.dtype

    def extra(self, strengths: Mapping[str, float]) -> Extra:
        """What the attached files, at these strengths, need in addition to the network's own weights and work."""
        return self._extra({file: (deltas, self._computed(file)) for file, deltas in self._deltas.items()}, strengths)

    def extra_of(self, files: Mapping[str, Mapping[str, Delta]], strengths: Mapping[str, float]) -> Extra:
        """What these files would need if they were attached instead. Uses the shapes of arrays only, and reads none."""
        shapes = self.config.shapes()

        def sides(deltas: Mapping[str, Delta]) -> dict[str, Side]:
            return {
                name: self._side(name, delta, lambda base: mx.zeros(shapes[base])) for name, delta in deltas.items()
            }

        return self._extra({file: (deltas, sides(deltas)) for file, deltas in files.items()}, strengths)

    def _extra(
        self, files: Mapping[str, tuple[Mapping[str, Delta], Mapping[str, Side]]], strengths: Mapping[str, float]
    ) -> Extra:
        held, features, weights, shapes = 0, Counter[str](), Counter[str](), self.config.shapes()
        kinds: dict[str, list[str]] = {}
        for file, (deltas, sides) in files.items():
            arrays = [array for delta in deltas.values() for array in delta.arrays]
            arrays += [array for side in sides.values() for array in (*side.arrays.values(), *side.gain.values())]
            held += sum({id(array): array.nbytes for array in arrays}.values())  # many are shared
            for name, side in sides.items() if strengths.get(file) else ():
                kinds.setdefault(name, []).append(side.kind)
                held += side.nbytes * (side.kind == "low")  # joined with other files' factors
        for name, found in kinds.items():
            if found != ["sum"]:
                block = next((block for block in self.config.blocks if name.startswith(f"{block}.")), "")
                rows, columns = shapes[name]
                features[block] += rows
                weights[block] += rows * columns * bool(set(found) & set(DIFFERENCES))
        return Extra(held, max(features.values(), default=0), max(weights.values(), default=0))

    def tree(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        return self._over(prefix, self.runner.tree(prefix, dtype))

    def once(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        return self._over(prefix, self.runner.once(prefix, dtype))

    def rows(self, name: str, ids: Sequence[int]) -> mx.array:
        return self.runner.rows(name, ids)

    def computed(self, *arrays: mx.array) -> None:
        self.runner.computed(*arrays)

    def walk(
        self, blocks: Sequence[str], streams: Sequence[S], apply: Apply[S], without: str = "", wait: bool = False
    ) -> Generator[int, None, list[S]]:
        def over(stream: S, weights: Tree, i: int) -> S:
            return apply(stream, self._over(blocks[i], weights), i)

        run = over if self._changes else apply
        return (yield from self.runner.walk(blocks, streams, run, without=without, wait=wait))

    # ---- which LoRAs, and how strong

    def attach(self, file: str, deltas: Mapping[str, Delta]) -> None:
        """Bring a file's differences into memory, by the weight's name; without strength until `set` gives it one.

        Reads the model's own weights where a difference depends on them: under DoRA, layer by layer.
        """
        sides: dict[str, Side] = {}
        for name, delta in deltas.items():
            sides[name] = self._side(name, delta, self.base)
            mx.eval(dict(sides[name].arrays), dict(sides[name].gain))
        self._deltas[file], self._sides[file] = deltas, sides

    def has(self, file: str) -> bool:
        """Whether the differences in a file are attached."""
        return file in self._deltas

    def detach(self, file: str) -> None:
        """Forget a file's differences."""
        self._deltas.pop(file, None)
        self._sides.pop(file, None)
        self.set({other: strength for other, strength in self._active.items() if other != file})

    def start_over(self) -> None:
        """Lay nothing over the model, and compute every file's differences again: what was computed may be wrong."""
        self._sides, self._stacks, self._active, self._changes, self._under = {}, {}, {}, {}, {}
        for file in self._deltas:
            self._computed(file)

    def _computed(self, file: str) -> dict[str, Side]:
        if file not in self._sides:
            self.attach(file, self._deltas[file])
        return self._sides[file]

    @property
    def strengths(self) -> dict[str, float]:
        """Each file's strength, if it is not 0."""
        return dict(self._active)

    def set(self, strengths: Mapping[str, float]) -> bool:
        """Give files their strengths, and all others none; returns whether any changed. Reads nothing."""
        # Sorted, so that the same files give the same bits; at strength 0 nothing is laid over the model.
        active = {file: strengths[file] for file in sorted(strengths) if strengths[file] and file in self._deltas}
        if active == self._active:
            return False
        if list(active) != list(self._active):
            self._stacks = {}
        self._active, self._changes, self._under = active, {}, {}
        found: dict[str, list[tuple[Side, float]]] = {}
        for file, strength in active.items():
            for name, side in self._computed(file).items():
                found.setdefault(name, []).append((side, strength))
        for name, sides in found.items():
            if sides[0][0].kind == "sum":
                self._changes[name] = partial(_summed, sides=sides)
            else:
                layer = name.removesuffix(".weight")
                self._changes[layer] = partial(_with_lora, lora=self._lora(name, sides))
        return True

    def _lora(self, name: str, sides: Sequence[tuple[Side, float]]) -> Tree:
        """The part `lora` of a layer's tree; see `models.lora`."""
        lora: dict[str, Any] = {}
        low = [(side, strength) for side, strength in sides if side.kind == "low"]
        if low:
            if name not in self._stacks:
                self._stacks[name] = {
                    "down": mx.concatenate([side.arrays["down"] for side, _ in low], axis=0),
                    "up": mx.concatenate([side.arrays["up"] for side, _ in low], axis=1),
                }
                mx.eval(self._stacks[name])
            scale = [np.full(len(side.arrays["down"]), strength * side.scale, np.float32) for side, strength in low]
            lora["low"] = {**self._stacks[name], "scale": mx.array(np.concatenate(scale))}
        for side, strength in sides:
            if side.kind != "low":
                item = {**side.arrays, **side.gain, "scale": mx.array(strength * side.scale, mx.float32)}
                lora.setdefault(side.kind, []).append(item)
            for axis, gain in side.gain.items():
                lora[axis] = lora.get(axis, 0) + strength * (gain - 1)
        return lora

    # ---- a difference in the layout used for computing

    def _side(self, name: str, delta: Delta, base: Base) -> Side:
        delta = delta.reordered(partial(self.config.sanitize, name))
        if _is_layer(name, delta):
            return self._layer(name, delta, base)
        return Side("sum", {"diff": delta.difference(base(name))})

    def _layer(self, name: str, delta: Delta, base: Base) -> Side:
        gain: dict[str, mx.array] = {}
        if isinstance(delta, DoRA):
            axis = "rows" if delta.by_row else "columns"
            gain[axis] = delta.gain(base(name)).reshape(-1)
            delta = delta.inner
        cast = partial(mx.array.astype, dtype=self.dtype)
        if isinstance(delta, LowRank):
            down, up = delta.down, delta.up
            if "rows" in gain:
                up = gain["rows"][:, None] * up
            if "columns" in gain:
                down = down * gain["columns"]
            return Side("low", {"down": cast(down), "up": cast(up)}, delta.scale, gain)
        if isinstance(delta, Kronecker):
            order = {} if delta.order is None else {"order": delta.order}
            return Side("kron", {"w1": cast(delta.w1), "w2": cast(delta.w2), **order}, delta.scale, gain)
        if isinstance(delta, Hadamard):
            names = ("w1_a", "w1_b", "w2_a", "w2_b")
            return Side("hada", {n: cast(getattr(delta, n)) for n in names}, delta.scale, gain)
        own = base(name) if isinstance(delta, Replacement) else mx.array(0.0)
        return Side("dense", {"diff": cast(delta.difference(own))}, 1.0, gain)

    def base(self, name: str) -> mx.array:
        """The model's own weight in the form used for computing, but dense and float32."""
        layer, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return self.runner.once(name, mx.float32)
        weights = self.runner.once(layer, mx.float32)
        return dequantize(weights, mx.float32) if kind == "weight" and "packing" in weights else weights[kind]

    # ---- over the model's own trees

    def _over(self, prefix: str, tree: Tree) -> Tree:
        """The tree under a prefix with everything that the active LoRAs change in it."""
        if not self._changes:
            return tree
        if prefix not in self._under:
            start = f"{prefix}."
            self._under[prefix] = [
                (path.removeprefix(start).split(".") if path != prefix else [], change)
                for path, change in self._changes.items()
                if path == prefix or path.startswith(start)
            ]
        for path, change in self._under[prefix]:
            tree = changed(tree, path, change)
        return tree


def _is_layer(name: str, delta: Delta) -> bool:
    return name.endswith(".weight") and len(delta.shape) == 2


def changed(tree: Tree, path: Sequence[str], change: Edit) -> Tree:
    """A copy of the tree with one part changed, and all others shared; the tree itself where the part is not in it."""
    if not path:
        return change(tree)
    copy = tree.copy()
    key = int(path[0]) if isinstance(tree, list) else path[0]
    if isinstance(tree, dict) and key not in tree:  # a part that was not read, such as the blocks' modulation
        return tree
    copy[key] = changed(tree[key], path[1:], change)
    return copy


def _with_lora(weights: Tree, lora: Tree) -> Tree:
    return {**weights, "lora": lora}


def _summed(own: mx.array, sides: Sequence[tuple[Side, float]]) -> mx.array:
    total = own.astype(mx.float32)
    for side, strength in sides:
        total = total + strength * side.arrays["diff"]
    return total.astype(own.dtype)
