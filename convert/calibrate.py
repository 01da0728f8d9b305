"""What goes into each matrix of the transformer while it draws: where an error of a weight matters, and how much.

What counts is not a matrix but its products. With M the second moments of its inputs and L the Cholesky factor of M,
the products' mean squared error is the square of (error of the weights) times L. pack.py keeps that small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from ..machine import default_dtype
from ..models.layers import linear, rms_norm, silu
from ..models.transformer import Transformer, attend, attention, feed, modulated_norm, pad_tokens, patchify
from ..noise import initial_noise
from ..pipeline import ZImagePipeline
from ..request import GenerateRequest

PROMPTS = (
    "a lighthouse on a cliff at dusk, long exposure, oil painting",
    "一位老人在茶馆里下棋，窗外下着雨",
    "two green apples and a red cup on a white table, studio photo",
    "isometric map of a small harbour town, pixel art",
    "close-up of a tabby cat with yellow eyes, shallow depth of field",
    "黑色背景上的三颗黄色星星，极简海报",
)
STEPS = 8
LARGEST = 512  # pixels a side: a thousand tokens in each step of each prompt
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


@dataclass
class Stream:
    """Tokens x (1, L, dim) before a block, and all else that goes into it; modulation (blocks, 4, dim)."""

    x: mx.array
    modulation: mx.array
    cos: mx.array
    sin: mx.array
    rows: int  # of x that the network's output depends on


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
        self._block, self._moments = "", {}
        self._last: tuple[str, np.ndarray] = "", np.empty(0)

    def factor(self, name: str) -> np.ndarray:
        """L (in, in) float32, lower triangular, for a weight's name such as "layers.3.attention.to_q.weight"."""
        kind, i, layer = name.removesuffix(".weight").split(".", 2)
        if self._blocks is None:
            self._blocks = moments(self._pipe, PROMPTS, min(LARGEST, self._pipe.sample_size), STEPS)
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
    network, config = pipe.transformer, pipe.transformer.config
    source, refiners = network.source, config.n_refiner_layers
    side = size // pipe.checkpoint.vae.config.scale
    images, captions = [], []
    for seed, prompt in enumerate(prompts):
        request = GenerateRequest(prompt=prompt, width=size, height=size, seed=seed, steps=steps)
        noise = initial_noise(seed, (1, config.in_channels, side, side))
        times, latents = [0.0], [noise.transpose(0, 2, 3, 1)]
        for step in pipe.denoise(request, noise):
            times.append(1 - step.sigma)
            latents.append(step.latents)
        embedder = source.once("cap_embedder")
        x = rms_norm(pipe.encode(prompt)[None].astype(network.sums), embedder[0], config.norm_eps)
        x = pad_tokens(linear(x, embedder[1]), source.once("cap_pad_token"))
        ones = mx.ones((refiners, 4, config.dim), dtype=x.dtype)
        captions.append(Stream(x, ones, *network.rope(x.shape[1], 0, 0), x.shape[1]))
        modulations, _ = network.modulate(times[:-1])
        for latent, modulation in zip(latents[:-1], modulations, strict=True):
            x = linear(patchify(latent.astype(source.dtype)), source.once("all_x_embedder.2-1"))
            rows = x.shape[1]
            x = pad_tokens(x, source.once("x_pad_token"))
            cos, sin = network.rope(captions[-1].rows, side, side)
            images.append(Stream(x, modulation, cos, sin, rows))
            mx.eval(images[-1].x)
    source.release()
    pipe.text_encoder.source.release()
    yield from _walk(network, "noise_refiner", refiners, images)
    begun = [caption.x for caption in captions]
    for _ in _walk(network, "context_refiner", refiners, captions):
        pass
    for i, image in enumerate(images):
        image.x = mx.concatenate([image.x, captions[i // steps].x], axis=1)
        image.modulation = image.modulation[refiners:]
    yield from _walk(network, "layers", config.n_layers, images)
    images.clear()
    for caption, x in zip(captions, begun, strict=True):
        caption.x = x
    yield from _walk(network, "context_refiner", refiners, captions)


def _walk(
    network: Transformer, kind: str, count: int, streams: Sequence[Stream]
) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """Run blocks over streams, yielding each block's name and moments before the next begins."""
    config = network.config
    for i in range(count):
        weights = network.source.component.read(f"{kind}.{i}", network.source.dtype, without="adaLN_modulation")
        mx.eval(weights)
        sums, seen = dict.fromkeys(INPUTS.values(), 0), dict.fromkeys(INPUTS.values(), 0)
        for stream in streams:
            # of the last block, only the image is used
            rows = stream.rows if (kind, i) == ("layers", count - 1) else None
            for name, x in _inputs(stream, weights, i, rows, config.n_heads, config.norm_eps):
                x = x.reshape(-1, x.shape[-1]).astype(mx.float32)
                sums[name] = sums[name] + x.T @ x
                seen[name] += len(x)
            mx.eval(sums, stream.x)
        del weights
        yield f"{kind}.{i}", {name: sums[name] / seen[name] for name in sums}


def _inputs(
    stream: Stream, weights: dict, i: int, rows: int | None, heads: int, eps: float
) -> Iterator[tuple[str, mx.array]]:
    """What goes into the matrices of a block, by the names of INPUTS; the stream is moved past the block."""
    x, modulation = stream.x, stream.modulation[i]
    cos, sin = stream.cos[: x.shape[1]], stream.sin[: x.shape[1]]
    h = modulated_norm(x, weights["attention_norm1"], modulation[0], eps)
    yield "attention", h
    same = {"to_out": [{"weight": mx.eye(h.shape[-1], dtype=h.dtype)}]}
    yield "mixed", attention(h, weights["attention"] | same, cos, sin, heads, rows)
    x = attend(x, weights, modulation, cos, sin, rows, heads=heads, eps=eps)
    h = modulated_norm(x, weights["ffn_norm1"], modulation[2], eps)
    yield "feed_forward", h
    yield "hidden", silu(linear(h, weights["feed_forward"]["w1"])) * linear(h, weights["feed_forward"]["w3"])
    stream.x = feed(x, weights, modulation, eps=eps)
