"""The loss of one image, and its gradients with respect to the factors, in the memory of one block.

In the forward pass, only the input of each block is kept. The backward pass walks through the same blocks from the last
to the first, by the same runner: each block is computed again, differentiated and evaluated before the next one is
read. So weights can be streamed from disk in both directions, and only one block's intermediates are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..models.layers import Product, linear, result, silu
from ..models.runner import Runner, Tree
from ..models.transformer import (
    Caption,
    Stream,
    Transformer,
    TransformerConfig,
    row,
    scales_and_gates,
    time_embedding,
)
from ..scheduler import times
from .block import Block, Layers, pulled_back
from .factors import MODULATION, Factors, laid


@dataclass(frozen=True)
class Sample:
    """What a loss is computed from: an image's latents (1, h, w, C), its prompt's embeddings (L, cap_feat_dim), noise
    like the latents, and its level sigma. weight is a factor of the loss."""

    latents: mx.array
    cap_feats: mx.array
    noise: mx.array
    sigma: float
    weight: float = 1.0


@dataclass(frozen=True)
class Walked:
    """A walk through blocks: each block's input, and what else they were given."""

    blocks: Sequence[str]
    stream: Stream
    inputs: list[mx.array]


@dataclass(frozen=True)
class Back:
    """The loss's gradient with respect to a block's output (B, L, dim), with those found in the block after it."""

    d: mx.array
    found: tuple[mx.array, ...] = ()

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.d, *self.found)


class Gradients:
    """Losses and gradients of factors added to a runner's weights, which never change.

    The factors' difference is scale * up @ down; `product` and `most` are as in `Transformer`, `lean` as in `Block`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        runner: Runner,
        scale: float,
        product: Product = linear,
        most: float = math.inf,
        lean: bool = False,
    ):
        self.config = config
        self.runner = runner
        self.scale = scale
        self.product = product
        self.network = Transformer(config, runner, product, most=most)
        self.block = Block(config, runner.dtype, scale, product, most, lean)

    def __call__(self, factors: Factors, sample: Sample) -> tuple[mx.array, Factors]:
        """The loss, weight * mean((predicted - (latents - noise))^2) in float32, and the factors' gradients."""
        _, h, w, _ = sample.latents.shape
        network, names, refiners = self.network, self.config.modulated, self.config.n_refiner_layers
        embedding, final_scale = self._time(sample.sigma)
        modulation = mx.stack([self._modulation(factors.get(name, {}), embedding, name) for name in names])

        of_caption = self._forward(self.config.refiners, factors, network.caption_stream(sample.cap_feats))
        embedded = of_caption.stream.x
        caption = Caption(embedded, *network.rope(embedded.shape[1], h, w))
        x, tokens = network.begin((1 - sample.sigma) * sample.latents + sample.sigma * sample.noise)
        of_image = self._forward(names[:refiners], factors, network.image_stream(x, caption, modulation))
        joint = network.join(of_image.stream, caption, modulation, tokens)
        of_both = self._forward(names[refiners:], factors, joint)

        def loss(x: mx.array) -> mx.array:
            found = network.finish(x, final_scale, h, w)
            return sample.weight * mx.square(found - (sample.latents - sample.noise)).mean()

        value, d = mx.value_and_grad(loss)(of_both.stream.x)
        mx.eval(value, d)
        gradients: Factors = {}
        d = self._backward(of_both, factors, d, embedding, gradients)
        length = of_image.stream.x.shape[1]
        for walked, part in ((of_image, d[:, :length]), (of_caption, d[:, length:])):
            if any(name in factors for name in walked.blocks):
                self._backward(walked, factors, part, embedding, gradients)
        return value, gradients

    # ---- what depends on the time

    def _time(self, sigma: float) -> tuple[mx.array, mx.array]:
        """The time's embedding (1, time_dim) in the compute dtype, and the scale of the final layer (dim,)."""
        dtype, tree = self.runner.dtype, self.runner.tree
        embedding = time_embedding(times([sigma]), tree("t_embedder", mx.float32), self.config.t_scale)
        final = tree("all_final_layer.2-1.adaLN_modulation")[1]
        return embedding.astype(dtype), row(1 + self.product(silu(embedding).astype(dtype), final), 0)

    def _modulation(self, own: Layers, embedding: mx.array, name: str) -> mx.array:
        """A block's scales and gates (4, dim), with its factors if its modulation has any."""
        weights = {"adaLN_modulation": self.runner.tree(f"{name}.adaLN_modulation")}
        if MODULATION in own:
            weights = laid(weights, {MODULATION: own[MODULATION]}, self.scale, self.runner.dtype)
        return row(scales_and_gates(embedding, weights["adaLN_modulation"][0], self.product), 0)

    # ---- forward and back

    def _forward(self, blocks: Sequence[str], factors: Factors, stream: Stream) -> Walked:
        """Send a stream through blocks; the result's stream has their output."""
        inputs: list[mx.array] = []

        def apply(stream: Stream, weights: Tree, i: int) -> Stream:
            inputs.append(stream.x)
            rows = stream.rows if i == len(blocks) - 1 else None
            given = row(stream.modulation, i), stream.cos, stream.sin, rows
            return replace(stream, x=self.block(stream.x, _inside(factors, blocks[i]), weights, *given))

        # running two blocks forward needs less memory than the gradients of a whole one: on the H200 the peak is the
        # same, and a step at 512x512 takes 0.18 s instead of 0.24
        wait = not self.block.is_whole
        (ended,) = result(self.runner.walk(blocks, [stream], apply, without=self.config.read_once, wait=wait))
        return Walked(blocks, ended, inputs)

    def _backward(
        self, walked: Walked, factors: Factors, d: mx.array, embedding: mx.array, gradients: Factors
    ) -> mx.array:
        """From the gradient of a walk's output to that of its input; adds the factors' gradients to `gradients`."""
        blocks, stream = list(reversed(walked.blocks)), walked.stream

        def apply(back: Back, weights: Tree, i: int) -> Back:
            name, rows = blocks[i], stream.rows if i == 0 else None
            modulation = row(stream.modulation, len(blocks) - 1 - i)
            given = modulation, stream.cos, stream.sin, rows, back.d
            d, by_modulation, own = self.block.gradients(walked.inputs.pop(), _inside(factors, name), weights, *given)
            if MODULATION in factors.get(name, {}):
                own |= self._through_modulation(factors[name], embedding, name, by_modulation)
            if own:
                gradients[name] = own
            return Back(d, tuple(array for layer in own.values() for array in layer.values()))

        (ended,) = result(self.runner.walk(blocks, [Back(d)], apply, without=self.config.read_once, wait=True))
        return ended.d

    def _through_modulation(self, own: Layers, embedding: mx.array, name: str, d: mx.array) -> Layers:
        def modulation(own: Layers) -> tuple[mx.array]:
            return (self._modulation(own, embedding, name),)

        (found,) = pulled_back(modulation, ({MODULATION: own[MODULATION]},), (d,))
        return found


def _inside(factors: Factors, block: str) -> Layers:
    """The factors that a block itself uses: all but its modulation's."""
    return {layer: own for layer, own in factors.get(block, {}).items() if layer != MODULATION}
