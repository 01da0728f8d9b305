"""What networks ask of their weights, and of whatever runs their blocks.

A network is given a `Runner`: it hands out trees of weights in one dtype, and sends tokens through blocks. The one of
`mlx_zimage.weights.blocks` keeps blocks in memory or reads them from disk as they are needed, and computes as it goes.
`PlainRunner` does neither: it has all weights and leaves everything lazy, so that gradients pass through it. Both run
the same functions on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import mlx.core as mx
from mlx.utils import tree_map

from ..quantization import Quantization

# Dicts and lists of arrays, nested by the parts of their names: `tree["attention"]["to_q"]["weight"]`. A quantized
# layer has `scales`, where it is affine `biases`, and its `packing` beside its weight. What is asked for by its whole
# name is the array itself.
Tree = Any


# Where arrays are computed; None is where MLX does by default.
Where = mx.Stream | mx.ThreadLocalStream | None


class NetworkConfig(Protocol):
    """What a network's config.json says, as the dataclass of its architecture."""

    @classmethod
    def from_dict(cls, config: dict) -> Self:
        """Read it; CheckpointError for what is not implemented."""

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that can be read one by one, in the order they run."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint."""

    def sanitize(self, name: str, array: mx.array) -> mx.array:
        """A tensor (or a part of a packed one) as computed with: the same numbers in another layout."""

    @property
    def read_once(self) -> str:
        """What the names of those tensors of a block begin with that are needed before the blocks run, and not then."""

    def unused(self, name: str) -> bool:
        """Whether a tensor cannot influence what the network gives, and may be absent."""

    def stays(self, name: str) -> bool:
        """Whether a tensor outside the blocks is in memory while they run."""

    def named(self, name: str) -> str:
        """A stored tensor's name as the architecture has it."""


class Weights(Protocol):
    """One network's weights, by the checkpoint's names: those on disk, random ones, or an overlay of either."""

    @property
    def config(self) -> NetworkConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every weight, quantized ones as if they were dense."""

    @property
    def quantizations(self) -> Mapping[str, Quantization]:
        """How each quantized layer is packed, by its name without ".weight"."""

    def read(self, prefix: str, dtype: mx.Dtype, without: str = "", stream: Where = None) -> Tree:
        """The tree under `prefix`, lazy, floating arrays in dtype; without the part of it that begins so.

        stream is where the reading happens.
        """

    def read_all(self, prefixes: Sequence[str], dtype: mx.Dtype, without: str = "") -> Iterator[Tree]:
        """The tree of each prefix in turn, computed."""

    def rows(self, name: str, ids: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Rows of a table, (len(ids), width) in dtype, read without the rest of it."""


class Tokens(Protocol):
    """What goes through blocks: its tokens x, and whatever else a block wants to know."""

    @property
    def x(self) -> mx.array: ...


S = TypeVar("S", bound=Tokens)
Apply = Callable[[S, Tree, int], S]


class Runner(Protocol):
    """Hands a network its weights in one dtype, and runs its blocks."""

    @property
    def dtype(self) -> mx.Dtype: ...

    def tree(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        """The weights under a name, kept for the next call."""

    def once(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        """The weights under a name, lazy and not kept."""

    def rows(self, name: str, ids: Sequence[int]) -> mx.array:
        """Rows of a table."""

    def computed(self, *arrays: mx.array) -> None:
        """Called where what led to arrays should be let go, as far as the runner computes at all."""

    def walk(
        self, blocks: Sequence[str], streams: Sequence[S], apply: Apply[S], without: str = "", wait: bool = False
    ) -> Generator[int, None, list[S]]:
        """Send streams through the named blocks: stream = apply(stream, weights, index), all streams block by block.

        Yields how many blocks are done, and returns the streams. `without` names a part of the blocks that is not
        needed; wait asks for as little memory as can be.
        """


class PlainRunner:
    """Runs blocks over a tree of weights that is all in memory, and computes nothing: mx.grad passes through it."""

    def __init__(self, weights: Tree, dtype: mx.Dtype = mx.float32):
        self.weights = weights
        self.dtype = dtype

    def tree(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        found = self.weights
        for part in prefix.split("."):
            found = found[int(part) if isinstance(found, list) else part]
        return found if dtype is None else tree_map(lambda array: array.astype(dtype), found)

    def once(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        return self.tree(prefix, dtype)

    def rows(self, name: str, ids: Sequence[int]) -> mx.array:
        return self.tree(name, self.dtype)[mx.array(list(ids))]

    def computed(self, *arrays: mx.array) -> None:
        pass

    def walk(
        self, blocks: Sequence[str], streams: Sequence[S], apply: Apply[S], without: str = "", wait: bool = False
    ) -> Generator[int, None, list[S]]:
        streams = list(streams)
        for i, block in enumerate(blocks):
            streams = [apply(stream, self.tree(block), i) for stream in streams]
            yield i + 1
        return streams
