"""The blocks of a network: kept in memory between calls, or streamed from disk each time they are needed."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

import mlx.core as mx

from ..machine import backend
from ..models.layers import settle
from ..models.runner import Apply, S, Tree, Weights

# Whether a separate thread reads a block while the previous one is computed. MLX's CUDA build cannot do this: a GPU
# that waits for such a thread may wait forever. There, a read holds up the calling thread for a hundred times as long
# as the GPU takes to compute a block, so starting early would gain nothing and cost the memory of another block.
# Instead, blocks that stay in memory are read before all others, by `Weights.read_all`.
READS_AHEAD = {"cpu": True, "metal": True, "cuda": False}


class Blocks:
    """The `Runner` of a network: keeps what it reads in memory, except for the blocks named in `streamed`.

    Those are read from disk each time they are needed, one block ahead of the computation (see READS_AHEAD). Either way
    the same function runs on the same numbers, so the results are identical bit for bit.
    """

    def __init__(self, weights: Weights, dtype: mx.Dtype, streamed: Collection[str] = ()):
        self.weights = weights
        self.dtype = dtype
        self.streamed = streamed
        self._kept: dict = {}
        self._disk = mx.new_thread_local_stream(mx.cpu) if READS_AHEAD[backend()] else None

    def tree(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        key = prefix, dtype
        if key not in self._kept:
            tree = self.once(prefix, dtype)
            mx.eval(tree)  # lazy arrays could be evaluated only in this thread
            self._kept[key] = tree
        return self._kept[key]

    def once(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        return self.weights.read(prefix, dtype or self.dtype)()

    def rows(self, name: str, ids: Sequence[int]) -> mx.array:
        return self.weights.rows(name, ids, self.dtype)

    def computed(self, *arrays: mx.array) -> None:
        mx.eval(*arrays)

    def walk(
        self, blocks: Sequence[str], streams: Sequence[S], apply: Apply[S], without: str = "", wait: bool = False
    ) -> Generator[int, None, list[S]]:
        """See `Runner.walk`; each block is read once for all streams.

        The next block is queued while a GPU still computes the previous one, so that it never waits. At most these two
        blocks' intermediates are alive and, besides the weights kept in memory, the weights of two blocks (one if
        nothing is read ahead). With `wait`, and whenever a block is read, only one block's intermediates are alive.
        """
        wait = wait or mx.default_device() == mx.cpu
        streams = list(streams)
        last = len(streams) - 1
        before = streams[last].arrays
        if self._disk is None:
            self._keep(blocks, without, before)
        weights = self._start(blocks[0], without, before)
        for i in range(len(blocks)):
            for k, stream in enumerate(streams):
                streams[k] = stream = apply(stream, weights, i)
                if k == last:
                    weights = None  # not needed here any longer
                mx.async_eval(stream.arrays)
                mx.eval(before)
                before = stream.arrays
                if k == last and i + 1 < len(blocks):
                    weights = self._start(blocks[i + 1], without, before)
                if wait:
                    settle(*before)
            yield i + 1
        return streams

    def _start(self, block: str, without: str, before: tuple[mx.array, ...]) -> Tree:
        """The weights of a block: from memory, or read from disk while `before` is computed."""
        if block in self._kept:
            return self._kept[block]
        reading = self.weights.read(block, self.dtype, without=without, stream=self._disk)
        # The GPU is idle until the block is read anyway, so intermediates can be freed before it is queued.
        settle(*before)
        weights = reading()
        mx.async_eval(weights)
        if block not in self.streamed:
            self._kept[block] = weights
        return weights

    def load(self, blocks: Sequence[str], without: str = "") -> None:
        """Read the blocks that should be kept in memory, before a walk needs them."""
        if self._disk is None:
            self._keep(blocks, without, ())
        for block in blocks:
            if block not in self.streamed:
                self._start(block, without, ())

    def _keep(self, blocks: Sequence[str], without: str, before: tuple[mx.array, ...]) -> None:
        """Once `before` is computed, read all blocks that should be kept in memory and are not there yet."""
        missing = [block for block in blocks if block not in self._kept and block not in self.streamed]
        if missing:
            settle(*before)
            self._kept.update(zip(missing, self.weights.read_all(missing, self.dtype, without), strict=True))

    def release(self) -> None:
        """Unload everything and free its memory."""
        self._kept.clear()
        mx.clear_cache()
