"""Records the inputs of each matrix of the transformer during generation, which show where weight errors matter.

What matters is not the error of a matrix's weights but that of its products. With M the second moments of the inputs
and L the Cholesky factor of M, the mean squared error of the products is the squared norm of (weight error) times L.
rounding.py keeps it small.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

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
STEPS = TURBO.steps  # fixed for every model: all steps of all prompts are in memory at once
MAX_SIDE = 512  # pixels per side: a thousand tokens in each step of each prompt
DAMPING = 0.01  # as a fraction of the mean square input, for directions that these prompts do not cover
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


NO_PARTS: Mapping[str, Any] = {}


class Calibration:
    """Cholesky factors of the inputs' second moments. Generation starts when the first factor is requested.

    Only the factors of one block are kept, and blocks must be requested in the order of the checkpoint: those of the
    whole real model would take 20 GB.
    """

    def __init__(
        self,
        source: str | Path,
        memory: str | int | None = None,
        variant: str | None = None,
        parts: Mapping[str, Any] = NO_PARTS,
    ):
        # in float16 the squares would overflow
        dtype = "float32" if default_dtype() == "float32" else "bfloat16"
        self._pipe = ZImagePipeline.from_pretrained(source, dtype, memory, variant=variant, **parts)
        self._blocks: Iterator[tuple[str, dict[str, mx.array]]] | None = None
        self._block = ""
        self._moments: dict[str, mx.array] = {}
        self._last: tuple[str, np.ndarray] = "", np.empty(0)

    def factor(self, name: str) -> np.ndarray:
        """L (in, in) float32, lower triangular, for a weight such as "layers.3.attention.to_q.weight"."""
        kind, i, layer = name.removesuffix(".weight").split(".", 2)
        if self._blocks is None:
            self._blocks = second_moments(self._pipe, PROMPTS, min(MAX_SIDE, self._pipe.sample_size), STEPS)
        while self._block != f"{kind}.{i}":
            self._block, self._moments = next(self._blocks)
            self._last = "", np.empty(0)
        if self._last[0] != INPUTS[layer]:
            self._last = "", np.empty(0)  # frees it first: the widest of the real model takes 420 MB
            self._last = INPUTS[layer], cholesky(np.array(self._moments[INPUTS[layer]]))
        return self._last[1]


def cholesky(moment: np.ndarray) -> np.ndarray:
    damping = DAMPING * np.trace(moment) / len(moment)
    moment[np.diag_indices_from(moment)] += damping or 1.0
    return np.linalg.cholesky(moment)


def second_moments(
    pipe: ZImagePipeline, prompts: Sequence[str], size: int, steps: int
) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """Yield each block, in checkpoint order, with the mean of x x^T for each of the inputs x named in INPUTS.

    Latents of all prompts are generated first; then the blocks run one by one, on all steps of all prompts.
    """
    network, config, recorder = pipe.transformer, pipe.transformer.config, Recorder()
    side = size // pipe.checkpoint.vae.config.scale
    latents, captions = [], []
    for seed, prompt in enumerate(prompts):
        request = GenerateRequest(prompt, size, size, seed, steps, guidance_scale=0.0)
        noise = initial_noise(seed, (1, config.in_channels, side, side))
        times, states = [0.0], [noise.transpose(0, 2, 3, 1)]
        for step in pipe.denoise(request, noise):
            times.append(1 - step.sigma)
            states.append(step.latents)
        latents.append(states[:-1])
        captions.append(network.caption_stream(pipe.encode(prompt)))
    # a network that records its inputs, and reads each block once for all streams
    runner = Blocks(pipe.networks.runners["transformer"].weights, network.runner.dtype, streamed=config.blocks)
    recording = Transformer(config, runner, recorder.product, compile=False)
    modulations, _ = network.modulate(times[:-1])
    images, tokens = [], 0
    for states, caption in zip(latents, captions, strict=True):
        tables = Caption(caption.x, *network.rope(caption.x.shape[1], side, side))
        for state, modulation in zip(states, modulations, strict=True):
            x, tokens = network.begin(state)
            mx.eval(x)
            images.append((network.image_stream(x, tables, modulation), modulation, tables))
    pipe.networks.release()
    refined = yield from _walk(
        recording, config.modulated[: config.n_refiner_layers], [i for i, *_ in images], recorder
    )
    ends = recording.run(config.refiners, captions)
    joined = []
    for i, (image, (_, modulation, tables)) in enumerate(zip(refined, images, strict=True)):
        joined.append(recording.join(image, replace(tables, embedded=ends[i // steps].x), modulation, tokens))
    images.clear()
    yield from _walk(recording, config.modulated[config.n_refiner_layers :], joined, recorder)
    yield from _walk(recording, config.refiners, captions, recorder)


class Recorder:
    """The sums of x^T x, and the numbers of rows, of the inputs x of a block's matrices."""

    def __init__(self) -> None:
        self.sums: dict[str, mx.array] = {}
        self.rows: dict[str, int] = {}
        self.names: dict[int, str] = {}  # of the layers of the block that is running, by id

    def product(self, x: mx.array, weights: Tree) -> mx.array:
        """Like `linear`, but records the input, once for the layers that share it."""
        name = self.names.get(id(weights))
        if name:
            flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
            self.sums[name] = self.sums[name] + flat.T @ flat if name in self.sums else flat.T @ flat
            self.rows[name] = self.rows.get(name, 0) + len(flat)
        return linear(x, weights, unpack_from())

    def begin(self, block: Tree) -> None:
        """Record the layers of a block that is about to run."""
        attention, feed_forward = block["attention"], block["feed_forward"]
        # to_k, as in the last block to_q gets only some of the rows; other layers that share an input get the same rows
        layers = {"attention": attention["to_k"], "mixed": attention["to_out"][0]}
        layers |= {"feed_forward": feed_forward["w1"], "hidden": feed_forward["w2"]}
        self.names = {id(layer): name for name, layer in layers.items()}

    def means(self) -> dict[str, mx.array]:
        return {name: total / self.rows[name] for name, total in self.sums.items()}

    def reset(self) -> None:
        self.sums, self.rows, self.names = {}, {}, {}


def _walk(
    network: Transformer, blocks: Sequence[str], streams: Sequence[Stream], recorder: Recorder
) -> Generator[tuple[str, dict[str, mx.array]], None, list[Stream]]:
    """Run blocks over streams, yielding each block's name and moments before the next starts; returns the streams."""

    def apply(stream: Stream, weights: Tree, i: int) -> Stream:
        recorder.begin(weights)
        stream = network.apply(stream, weights, i)
        mx.eval(stream.x, recorder.sums)
        return stream

    walk = network.runner.walk(blocks, streams, apply, network.config.read_once)
    while True:
        recorder.reset()
        try:
            done = next(walk)
        except StopIteration as end:
            return end.value
        yield blocks[done - 1], recorder.means()
