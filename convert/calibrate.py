"""What goes into each matrix of the transformer while it draws: where an error of a weight matters, and how much.

What counts is not a matrix but its products. With M the second moments of its inputs and L the Cholesky factor of M,
the products' mean squared error is the square of (error of the weights) times L. rounding.py keeps that small.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from ..machine import default_dtype, unpack_from
from ..models.layers import linear
from ..models.runner import Tree
from ..models.transformer import Caption, Stream, Transformer
from ..noise import initial_noise
from ..pipeline import ZImagePipeline
from ..request import GenerateRequest
from ..variants import TURBO
from ..weights.blocks import Blocks

PROMPTS = (
    "a lighthouse on a cliff at dusk, long exposure, oil painting",
    "一位老人在茶馆里下棋，窗外下着雨",
    "two green apples and a red cup on a white table, studio photo",
    "isometric map of a small harbour town, pixel art",
    "close-up of a tabby cat with yellow eyes, shallow depth of field",
    "黑色背景上的三颗黄色星星，极简海报",
)
STEPS = TURBO.steps  # whatever the model's: all steps of all prompts are in memory at once
MAX_SIDE = 512  # pixels a side: a thousand tokens in each step of each prompt
DAMPING = 0.01  # of the mean square input, for what these prompts do not show
# The matrices of a block that share an input.
INPUTS = {
    "attention.to_q": "attention",
    "attention.to_k": "attention",
    "attention.to_v": "attention",
    "attention.to_out.0": "mixed",
    "feed_forward.w1": "feed_forward",
    "feed_forward.w3": "feed_forward",
    "feed_forward.w2": "hidden",
}


class Calibration:
    """Cholesky factors of the inputs' second moments. Nothing is drawn or read before the first is asked for.

    A block's are forgotten when another block's are asked for, and blocks have to come in the order of the checkpoint:
    all of the real model's would be 20 GB.
    """

    def __init__(self, source: str | Path, memory: str | int | None = None):
        # float16 would overflow in the squares
        dtype = "float32" if default_dtype() == "float32" else "bfloat16"
        self._pipe = open_pipeline(source, dtype, memory)
        self._blocks: Iterator[tuple[str, dict[str, mx.array]]] | None = None
        self._block = ""
        self._moments: dict[str, mx.array] = {}
        self._last: tuple[str, np.ndarray] = "", np.empty(0)

    def factor(self, name: str) -> np.ndarray:
        """L (in, in) float32, lower triangular, for a weight's name such as "layers.3.attention.to_q.weight"."""
        kind, i, layer = name.removesuffix(".weight").split(".", 2)
        if self._blocks is None:
            self._blocks = moments(self._pipe, PROMPTS, min(MAX_SIDE, self._pipe.sample_size), STEPS)
        while self._block != f"{kind}.{i}":
            self._block, self._moments = next(self._blocks)
            self._last = "", np.empty(0)
        if self._last[0] != INPUTS[layer]:
            self._last = "", np.empty(0)  # one at a time: the widest of the real model takes 420 MB
            self._last = INPUTS[layer], cholesky(np.array(self._moments[INPUTS[layer]]))
        return self._last[1]


def open_pipeline(source: str | Path, dtype: str | None = None, memory: str | int | None = None) -> ZImagePipeline:
    """The source as a model that draws, which a single file is not."""
    if Path(source).expanduser().is_file():
        raise RequestError(
            f"reports and calibration draw with the source, and {source} is a single file; convert it to a folder "
            f"without quantizing, then convert that folder"
        )
    return ZImagePipeline.from_pretrained(source, dtype, memory)


def cholesky(moment: np.ndarray) -> np.ndarray:
    damping = DAMPING * np.trace(moment) / len(moment)
    moment[np.diag_indices_from(moment)] += damping or 1.0
    return np.linalg.cholesky(moment)


def moments(
    pipe: ZImagePipeline, prompts: Sequence[str], size: int, steps: int
) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """Each block, in the checkpoint's order, with the mean of x x^T for each of the inputs x that INPUTS names.

    The prompts are drawn first; the blocks then run one by one, on all steps of all prompts.
    """
    network, config, seen = pipe.transformer, pipe.transformer.config, Seen()
    side = size // pipe.checkpoint.vae.config.scale
    latents, captions = [], []
    for seed, prompt in enumerate(prompts):
        request = GenerateRequest(prompt=prompt, width=size, height=size, seed=seed, steps=steps)
        noise = initial_noise(seed, (1, config.in_channels, side, side))
        times, stops = [0.0], [noise.transpose(0, 2, 3, 1)]
        for step in pipe.denoise(request, noise):
            times.append(1 - step.sigma)
            stops.append(step.latents)
        latents.append(stops[:-1])
        captions.append(network.caption_stream(pipe.encode(prompt)))
    # one network that watches its products, and whose blocks are read once for all that goes through them
    runner = Blocks(pipe.networks.runners["transformer"].weights, network.runner.dtype, streamed=config.blocks)
    watched = Transformer(config, runner, seen.product, compile=False)
    modulations, _ = network.modulate(times[:-1])
    images, tokens = [], 0
    for stops, caption in zip(latents, captions, strict=True):
        tables = Caption(caption.x, *network.rope(caption.x.shape[1], side, side))
        for stop, modulation in zip(stops, modulations, strict=True):
            x, tokens = network.begin(stop)
            mx.eval(x)
            images.append((network.image_stream(x, tables, modulation), modulation, tables))
    pipe.networks.release()
    refined = yield from _walk(watched, config.modulated[: config.n_refiner_layers], [i for i, *_ in images], seen)
    ends = watched.run(config.refiners, captions)
    joined = []
    for i, (image, (_, modulation, tables)) in enumerate(zip(refined, images, strict=True)):
        joined.append(watched.join(image, replace(tables, embedded=ends[i // steps].x), modulation, tokens))
    images.clear()
    yield from _walk(watched, config.modulated[config.n_refiner_layers :], joined, seen)
    yield from _walk(watched, config.refiners, captions, seen)


class Seen:
    """The sums of x^T x, and the rows, of the inputs x that a block's products were given."""

    def __init__(self) -> None:
        self.sums: dict[str, mx.array] = {}
        self.rows: dict[str, int] = {}
        self.names: dict[int, str] = {}  # of the layers of the block that runs now, by their identity

    def product(self, x: mx.array, weights: Tree) -> mx.array:
        """linear, which notes its input where the layer is the first of those that share it."""
        name = self.names.get(id(weights))
        if name:
            flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
            self.sums[name] = self.sums[name] + flat.T @ flat if name in self.sums else flat.T @ flat
            self.rows[name] = self.rows.get(name, 0) + len(flat)
        return linear(x, weights, unpack_from())

    def begin(self, block: Tree) -> None:
        """Watch the layers of a block that is about to run."""
        attention, feed_forward = block["attention"], block["feed_forward"]
        # to_q is given some of the rows of the last block only, and the others of an input are given the same
        layers = {"attention": attention["to_k"], "mixed": attention["to_out"][0]}
        layers |= {"feed_forward": feed_forward["w1"], "hidden": feed_forward["w2"]}
        self.names = {id(layer): name for name, layer in layers.items()}

    def means(self) -> dict[str, mx.array]:
        return {name: total / self.rows[name] for name, total in self.sums.items()}

    def forget(self) -> None:
        self.sums, self.rows, self.names = {}, {}, {}


def _walk(
    network: Transformer, blocks: Sequence[str], streams: Sequence[Stream], seen: Seen
) -> Generator[tuple[str, dict[str, mx.array]], None, list[Stream]]:
    """Run blocks over streams, yielding each block's name and moments before the next begins; returns the streams."""

    def apply(stream: Stream, weights: Tree, i: int) -> Stream:
        seen.begin(weights)
        stream = network.apply(stream, weights, i)
        mx.eval(stream.x, seen.sums)
        return stream

    walk = network.runner.walk(blocks, streams, apply, network.config.read_once)
    while True:
        seen.forget()
        try:
            done = next(walk)
        except StopIteration as end:
            return end.value
        yield blocks[done - 1], seen.means()
