"""Blocks of a network in memory: kept from one call to the next, or read from disk each time they are needed."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

import mlx.core as mx

from ..machine import backend
from ..models.layers import settle
from ..models.runner import Apply, S, Tree, Weights

# Whether a block is read while the one before is computed, by a thread of its own. MLX's CUDA build cannot: there a GPU
# that waits for such a thread may wait for ever. Its own reading keeps the calling thread, a hundred times as long as
# the GPU needs for a block; to begin before the GPU has done would only cost the memory of another block. There,
# what is kept is read before anything else, by `Weights.read_all`.
READS_AHEAD = {"cpu": True, "metal": True, "cuda": False}


class Blocks:
    """The `Runner` of a network within a plan of memory. Keeps what it read but for the blocks named in `streamed`.

    Those are read from disk each time they are needed, one ahead of the computation (see READS_AHEAD). Either way the
    same function runs on the same numbers, so the results are the same bits.
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
            mx.eval(tree)  # before it is kept: what is lazy belongs to this thread
            self._kept[key] = tree
        return self._kept[key]

    def once(self, prefix: str, dtype: mx.Dtype | None = None) -> Tree:
        return self.weights.read(prefix, dtype or self.dtype)

    def rows(self, name: str, ids: Sequence[int]) -> mx.array:
        return self.weights.rows(name, ids, self.dtype)

    def computed(self, *arrays: mx.array) -> None:
        mx.eval(*arrays)

    def walk(
        self, blocks: Sequence[str], streams: Sequence[S], apply: Apply[S], without: str = "", wait: bool = False
    ) -> Generator[int, None, list[S]]:
        """See `Runner.walk`; each block is read once for all streams.

        A GPU is given each stream's block while it still computes the one before, so that it never waits; no more than
        those two blocks' intermediates are alive, and beside what is kept two blocks' weights, one where nothing is
        read ahead. `wait` holds one block's intermediates only, and so does reading.
        """
        wait = wait or mx.default_device() == mx.cpu
        streams = list(streams)
        last = len(streams) - 1
        before = streams[last].x
        if self._disk is None:
            self._keep(blocks, without, before)
        weights = self._start(blocks[0], without, before)
        for i in range(len(blocks)):
            for k, stream in enumerate(streams):
                streams[k] = stream = apply(stream, weights, i)
                if k == last:
                    weights = None  # not needed here any longer
                mx.async_eval(stream.x)
                mx.eval(before)
                before = stream.x
                if k == last and i + 1 < len(blocks):
                    weights = self._start(blocks[i + 1], without, before)
                if wait:
                    settle(before)
            yield i + 1
        return streams

    def _start(self, block: str, without: str, x: mx.array) -> Tree:
        """The weights of a block, from what is kept or on their way from the disk while x is computed."""
        if block in self._kept:
            return self._kept[block]
        weights = self.weights.read(block, self.dtype, without=without, stream=self._disk)
        # A GPU would wait for the reading anyway, and so what led to x need not stay until it has its next block.
        if self._disk is None:
            settle(x)
            mx.async_eval(weights)
        else:
            mx.async_eval(weights)
            settle(x)
        if block not in self.streamed:
            self._kept[block] = weights
        return weights

    def _keep(self, blocks: Sequence[str], without: str, x: mx.array) -> None:
        """Read those of the blocks that are to be kept and are not yet, all at once after x is computed."""
        wanted = [block for block in blocks if block not in self._kept and block not in self.streamed]
        if wanted:
            settle(x)
            self._kept.update(zip(wanted, self.weights.read_all(wanted, self.dtype, without), strict=True))

    def release(self) -> None:
        """Forget everything kept, and give its memory back."""
        self._kept.clear()
        mx.clear_cache()
