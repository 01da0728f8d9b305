"""The interfaces between networks, their weights, and whatever runs their blocks.

A network is given a `Runner`, which hands out trees of weights in one dtype and sends tokens through blocks.
`mlx_zimage.weights.blocks.Blocks` keeps blocks in memory or streams them from disk, and evaluates as it goes.
`PlainRunner` does neither: it holds all weights and leaves everything lazy, so that gradients pass through it. Both run
the same functions on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import mlx.core as mx
from mlx.utils import tree_map

from ..quantization import Quantization

# Dicts and lists of arrays, nested by the parts of their names: `tree["attention"]["to_q"]["weight"]`. A quantized
# layer has `scales`, `biases` if it is affine, and `packing` next to its weight. The tree under a tensor's full name is
# the array itself.
Tree = Any
# Waits until a tree has been read from disk, and returns it. To be called only once.
Reading = Callable[[], Tree]


# The stream on which arrays are computed; None is MLX's default.
Where = mx.Stream | mx.ThreadLocalStream | None


class NetworkConfig(Protocol):
    """A network's config.json, as the dataclass of its architecture: a subclass of this, which has what most of them
    share."""

    @classmethod
    def from_dict(cls, config: dict) -> Self:
        """Read config.json; CheckpointError if it asks for something that is not implemented."""

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that can be read one by one, in the order they run."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint."""

    def spare(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every other tensor that a checkpoint may have. Nothing reads them."""
        return {}

    def sanitize(self, name: str, array: mx.array) -> mx.array:
        """A tensor (or one part of a quantized one) in the layout used for computing: the same numbers, rearranged."""

    @property
    def read_once(self) -> str:
        """Prefix of the tensors in a block that are needed only before the blocks run; empty if there are none."""

    def unused(self, name: str) -> bool:
        """Whether a tensor cannot affect the output, and may be missing."""
        return False

    def stays(self, name: str) -> bool:
        """Whether a tensor outside the blocks stays in memory while they run."""
        return True

    def named(self, name: str) -> str:
        """The architecture's name for a stored tensor."""
        return name


class Weights(Protocol):
    """One network's weights, by the checkpoint's names.

    In `mlx_zimage.weights`, `Component` reads them from disk, `RandomWeights` makes them up, and `Joined` combines
    those of several networks.
    """

    @property
    def config(self) -> NetworkConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and dense shape of every weight, quantized or not."""

    @property
    def quantizations(self) -> Mapping[str, Quantization]:
        """The quantization of each quantized layer, by its name without ".weight"."""

    def read(self, prefix: str, dtype: mx.Dtype, without: str = "", stream: Where = None) -> Reading:
        """Read the tree under `prefix`, with floating-point arrays in dtype: calling the result waits for the disk.

        Tensors whose name after the prefix starts with `without` are left out. A stream, if given, starts reading at
        once, and the tree is lazy; otherwise it is evaluated, tensor by tensor. Nothing is computed from bytes that
        have not been read yet: macOS kills GPU work that waits seconds for a disk.
        """

    def read_all(self, prefixes: Sequence[str], dtype: mx.Dtype, without: str = "") -> Iterator[Tree]:
        """The tree under each prefix in turn, evaluated."""

    def rows(self, name: str, ids: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """The rows `ids` of a table, (len(ids), width) in dtype; only these rows are read."""


class Tokens(Protocol):
    """What goes through blocks: tokens x, and anything else a block needs."""

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The arrays that blocks compute: the tokens x, and anything that runs along with them."""


# How many rows of a sequence each machine has. Empty if they are not shared: then every machine has all of them.
Shares = tuple[int, ...]


class Sharing(Protocol):
    """How machines share the rows of a sequence."""

    def shares(self, parts: Sequence[int]) -> Shares:
        """The rows that each machine has of a sequence made of parts, each of which is shared on its own."""

    def mine(self, rows: int) -> tuple[int, int]:
        """This machine's part of this many rows: its first row, and the row after its last."""

    def own(self, x: mx.array, parts: Sequence[int], axis: int = 0) -> mx.array:
        """This machine's rows of a whole sequence made of parts."""


class Ranks(Sharing, Protocol):
    """The machines that generate an image together: in MLX's words, the ranks of a group.

    Each has all weights, computes its own rows of every sequence, and attends to everyone's: keys and values are all
    that blocks exchange. Attention does not depend on the order of keys, so what is gathered stays ordered by rank.
    """

    def among(self, tokens: int) -> Sharing:
        """How the machines share an image of this many tokens: a small one may not be worth the time that exchanging
        takes."""

    def parts(self, rows: int) -> int:
        """The number of parts in which the keys and values of this many rows are exchanged, so that one part travels
        while another is used; 0 if they are exchanged between other operations instead."""

    def gather(self, x: mx.array, shares: Shares, apart: bool = True) -> mx.array:
        """All rows of an array (B, L, ...) of which each machine has its share. If apart, exchanging begins at once,
        and nothing waits for it but what uses the result."""


class Alone:
    """The `Ranks` of a machine by itself, which has all rows."""

    def shares(self, parts: Sequence[int]) -> Shares:
        return ()

    def mine(self, rows: int) -> tuple[int, int]:
        return 0, rows

    def own(self, x: mx.array, parts: Sequence[int], axis: int = 0) -> mx.array:
        return x

    def among(self, tokens: int) -> Sharing:
        return self

    def parts(self, rows: int) -> int:
        return 0

    def gather(self, x: mx.array, shares: Shares, apart: bool = True) -> mx.array:
        return x


ALONE = Alone()


S = TypeVar("S", bound=Tokens)
Apply = Callable[[S, Tree, int], S]


class Runner(Protocol):
    """Hands a network its weights in one dtype, and runs its blocks."""

    @property
    def dtype(self) -> mx.Dtype: ...

    def tree(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        """The weights under a name, kept in memory for the next call."""

    def once(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        """The weights under a name, not kept."""

    def rows(self, name: str, ids: Sequence[int]) -> mx.array:
        """The rows `ids` of a table."""

    def computed(self, *arrays: mx.array) -> None:
        """Evaluate arrays, so that their inputs can be freed; a runner that leaves everything lazy does nothing."""

    def walk(
        self, blocks: Sequence[str], streams: Sequence[S], apply: Apply[S], without: str = "", wait: bool = False
    ) -> Generator[int, None, list[S]]:
        """Send all streams through the named blocks, block by block: stream = apply(stream, weights, index).

        Yields the number of blocks done, and returns the streams. Tensors of a block whose names start with `without`
        are not read; wait trades speed for the least memory.
        """


class PlainRunner:
    """Runs blocks over a tree of weights that is all in memory, and evaluates nothing: mx.grad passes through it.

    For tests, and for the LoRAs and the ControlNet of examples/pocket. `mlx_zimage.train` does without it: it
    differentiates block by block, over weights that may be streamed.
    """

    dtype = mx.float32

    def __init__(self, weights: Tree):
        self.weights = weights

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
