"""The S3-DiT transformer of Z-Image: a single stream of image and caption tokens through modulated blocks.

Source: diffusers models/transformers/transformer_z_image.py, whose outputs it matches in float32.
`noise_refiner` processes the image tokens alone, `context_refiner` the caption tokens alone, and `layers` both
together, image first. The network predicts data minus noise at time t = 1 - sigma.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..config import read_config
from ..errors import CheckpointError
from ..needless import Needless
from ..scheduler import times
from .layers import (
    Product,
    compiled,
    dot_product_attention,
    linear,
    margin,
    result,
    rms_norm,
    scaled,
    settle,
    silu,
    sum_dtype,
)
from .runner import ALONE, NetworkConfig, Ranks, Runner, Shares, Tree

PATCH = 2  # a token covers PATCH x PATCH latent pixels
PAD_MULTIPLE = 32  # image and caption are each padded to a multiple of this many tokens
TOKENS_AT_ONCE = 4608  # limit for a batch of images: this many rows keep any GPU busy, and more only cost memory
ADALN_WIDTH = 256
TIME_FREQUENCIES = 256
TIME_HIDDEN = 1024
TURNED = re.compile(r"\.attention\.(to|norm)_[qk]\.")


@dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    in_channels: int = 16
    cap_feat_dim: int = 2560
    norm_eps: float = 1e-5
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)

    @classmethod
    def from_dict(cls, config: dict) -> TransformerConfig:
        """Read transformer/config.json; refuse what this file does not implement."""
        fixed = {"all_patch_size": [PATCH], "all_f_patch_size": [1], "qk_norm": True, "siglip_feat_dim": None}
        read = read_config(cls, config, "transformer", fixed)
        if any(width % 2 for width in read.axes_dims):
            raise CheckpointError(f"transformer config: axes_dims must be even, got {list(read.axes_dims)}")
        if sum(read.axes_dims) * read.n_heads != read.dim:
            raise CheckpointError(
                f"transformer config: axes_dims {list(read.axes_dims)} must add up to the head dimension, "
                f"dim / n_heads = {read.dim / read.n_heads:g}"
            )
        return read

    @property
    def ffn_dim(self) -> int:
        return ffn_dim(self.dim)

    @property
    def time_dim(self) -> int:
        return time_dim(self.dim)

    @property
    def refiners(self) -> list[str]:
        """Names of the blocks that see only the caption, and not the time."""
        return [f"context_refiner.{i}" for i in range(self.n_refiner_layers)]

    @property
    def blocks(self) -> list[str]:
        """Names of all blocks in the order they run."""
        return self.refiners + self.modulated

    @property
    def read_once(self) -> str:
        return "adaLN_modulation"  # for the whole schedule at once: see `modulate`

    @property
    def modulated(self) -> list[str]:
        """Names of the blocks that see the time, in the order they run."""
        refiners = [f"noise_refiner.{i}" for i in range(self.n_refiner_layers)]
        return refiners + [f"layers.{i}" for i in range(self.n_layers)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, as diffusers stores it."""
        d, t, patch = self.dim, self.time_dim, PATCH * PATCH * self.in_channels
        shapes = {
            "x_pad_token": (1, d),
            "cap_pad_token": (1, d),
            "cap_embedder.0.weight": (self.cap_feat_dim,),
            **linear_shapes("cap_embedder.1", d, self.cap_feat_dim),
            **linear_shapes("t_embedder.mlp.0", TIME_HIDDEN, TIME_FREQUENCIES),
            **linear_shapes("t_embedder.mlp.2", t, TIME_HIDDEN),
            **linear_shapes("all_x_embedder.2-1", d, patch),
            **linear_shapes("all_final_layer.2-1.linear", patch, d),
            **linear_shapes("all_final_layer.2-1.adaLN_modulation.1", d, t),
        }
        for block in self.modulated + self.refiners:
            shapes |= block_shapes(block, d, self.n_heads)
        for block in self.modulated:
            shapes |= modulation_shapes(block, d)
        return shapes

    def sanitize(self, name: str, array: mx.array) -> mx.array:
        """A tensor (or one part of a quantized one) in the layout used for computing: see `turned`."""
        return turned(name, array, self.dim // self.n_heads)


# Shapes of parts that a ControlNet has, too.


def ffn_dim(dim: int) -> int:
    return int(dim / 3 * 8)


def time_dim(dim: int) -> int:
    return min(dim, ADALN_WIDTH)


def linear_shapes(name: str, out_dim: int, in_dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}


def block_shapes(block: str, dim: int, heads: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a block, without those of its modulation."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes[f"{block}.attention.{name}.weight"] = (dim, dim)
    for name in ("norm_q", "norm_k"):
        shapes[f"{block}.attention.{name}.weight"] = (dim // heads,)
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        shapes[f"{block}.{name}.weight"] = (dim,)
    shapes[f"{block}.feed_forward.w1.weight"] = (ffn_dim(dim), dim)
    shapes[f"{block}.feed_forward.w2.weight"] = (dim, ffn_dim(dim))
    shapes[f"{block}.feed_forward.w3.weight"] = (ffn_dim(dim), dim)
    return shapes


def modulation_shapes(block: str, dim: int) -> dict[str, tuple[int, ...]]:
    return linear_shapes(f"{block}.adaLN_modulation.0", 4 * dim, time_dim(dim))


def turned(name: str, array: mx.array, head_dim: int) -> mx.array:
    """A block's tensor (or one part of a quantized one) in the layout used for computing.

    The checkpoint rotates adjacent features of queries and keys; `rotate` rotates the two halves of a head, which
    is faster on GPUs. The rows of both are reordered in the same way, so that their products stay the same.
    """
    if not TURNED.search(name):
        return array
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


# ---- the parts, small to large


def rope_table(positions: np.ndarray, axes_dims: Sequence[int], theta: float) -> tuple[mx.array, mx.array]:
    """cos, sin of the rotary angles: each (L, sum(axes_dims) / 2), float32.

    positions is (L, 3) integers: frame, row, column. Angles are computed in float64 and rounded once,
    as in diffusers' RopeEmbedder.
    """
    by_axis = [
        positions[:, axis, None] / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    angles = np.concatenate(by_axis, axis=-1).astype(np.float32)
    return mx.array(np.cos(angles)), mx.array(np.sin(angles))


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate the pairs (x[i], x[D / 2 + i]) of x (B, L, H, D) by the angles in cos, sin (L, D / 2); returns x's dtype.

    Computed in float32, elementwise over views of x, so that compiled code makes a single pass over it.
    """
    halves = x.reshape(*x.shape[:-1], 2, -1)
    cos, sin = cos[:, None, None], mx.stack([-sin, sin], axis=1)[:, None]
    rotated = halves.astype(mx.float32) * cos + halves[..., ::-1, :].astype(mx.float32) * sin
    return rotated.astype(x.dtype).reshape(x.shape)


def norm_and_rotate(x: mx.array, weights: Tree, cos: mx.array, sin: mx.array) -> mx.array:
    """RMSNorm of the heads of x (B, L, H, D), rotated by the angles in cos, sin (L, D / 2)."""
    # diffusers hard-codes this eps, whatever the config's norm_eps is
    return rotate(rms_norm(x, weights, 1e-5), cos, sin)


def queries(
    x: mx.array, weights: Tree, cos: mx.array, sin: mx.array, heads: int, product: Product = linear
) -> mx.array:
    """RMS-normed, rotated queries of x (B, L, dim): (B, L, H, D)."""
    q = product(x, weights["to_q"]).reshape(*x.shape[:2], heads, -1)
    return norm_and_rotate(q, weights["norm_q"], cos, sin)


def keys_and_values(
    x: mx.array, weights: Tree, cos: mx.array, sin: mx.array, heads: int, product: Product = linear
) -> tuple[mx.array, mx.array]:
    """RMS-normed, rotated keys and the values of x (B, L, dim): (B, L, H, D) each."""
    k, v = (product(x, weights[name]).reshape(*x.shape[:2], heads, -1) for name in ("to_k", "to_v"))
    return norm_and_rotate(k, weights["norm_k"], cos, sin), v


def heads_of(
    x: mx.array,
    weights: Tree,
    cos: mx.array,
    sin: mx.array,
    heads: int,
    rows: int | None = None,
    product: Product = linear,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries of the first `rows` rows of x (B, L, dim), and all keys and values: (B, H, L, D)."""
    q = queries(x[:, :rows], weights, cos[:rows], sin[:rows], heads, product)
    q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, *keys_and_values(x, weights, cos, sin, heads, product)))
    return q, k, v


def joined_heads(out: mx.array, weights: Tree, factor: float = 1.0, product: Product = linear) -> mx.array:
    """The attention's output (B, H, L, D), multiplied by `factor`, through its last product: (B, L, dim)."""
    B, H, _, D = out.shape
    return product(scaled(out, factor).transpose(0, 2, 1, 3).reshape(B, -1, H * D), weights["to_out"][0])


def feed_forward(x: mx.array, weights: Tree, factor: float = 1.0, product: Product = linear) -> mx.array:
    """SwiGLU: w2(silu(w1 x) * w3 x); w3 x is multiplied by `factor` before the two halves are multiplied."""
    gate = product(x, weights["w1"])
    return product(silu(gate) * scaled(product(x, weights["w3"]), factor), weights["w2"])


# What a ControlNet adds to a block's output: (B, L, dim), and the scale () to multiply it by, in the sums' dtype.
Hint = tuple[mx.array, mx.array]


# A block is two pure functions of its weights, so that one compiled trace of each serves all blocks, and memory can be
# freed between the two. modulation is (4, dim): scale and gate of the attention, then of the feed-forward. Products
# are scaled by `factor`, which the norm that follows cancels.


def attend(
    x: mx.array,
    weights: Tree,
    modulation: mx.array,
    cos: mx.array,
    sin: mx.array,
    rows: int | None = None,
    shares: Shares = (),
    *,
    heads: int,
    eps: float,
    factor: float = 1.0,
    product: Product = linear,
    most: float = math.inf,
    ranks: Ranks = ALONE,
) -> mx.array:
    """The attention half of a block on x (B, L, dim), which is this machine's share of the rows; output for the first
    `rows` of them.

    There is no mask: padding attends and is attended to. Queries are computed in pieces of at most `most` FLOP.
    """
    q, k, v = attention_inputs(x, weights, modulation, cos, sin, rows, heads=heads, eps=eps, product=product)
    if shares:
        own = mx.concatenate([part.transpose(0, 2, 1, 3) for part in (k, v)], axis=-1)
        every = mx.split(ranks.gather(own, shares, apart=False), 2, axis=-1)
        k, v = (part.transpose(0, 2, 1, 3) for part in every)
    out = dot_product_attention(q, k, v, most)
    return add_attention(x, out, weights, modulation, eps=eps, factor=factor, product=product)


# The two ends of that half; training computes the gradients of each, and those of the attention between them.


def attention_inputs(
    x: mx.array,
    weights: Tree,
    modulation: mx.array,
    cos: mx.array,
    sin: mx.array,
    rows: int | None = None,
    *,
    heads: int,
    eps: float,
    product: Product = linear,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of a block on x (B, L, dim): see `heads_of`."""
    h = modulated_norm(x, weights["attention_norm1"], row(modulation, 0), eps)
    return heads_of(h, weights["attention"], cos, sin, heads, rows, product)


def add_attention(
    x: mx.array,
    out: mx.array,
    weights: Tree,
    modulation: mx.array,
    *,
    eps: float,
    factor: float = 1.0,
    product: Product = linear,
) -> mx.array:
    """x (B, L, dim) plus the attention's output (B, H, L', D), for the first L' rows."""
    h = joined_heads(out, weights["attention"], factor, product)
    gate = row(modulation, 1)
    return x[:, : h.shape[1]] + modulated_norm(h, weights["attention_norm2"], gate, eps * factor**2)


# The same half in pieces, for machines that share many rows: some keys and values travel while others are used.


def sent(
    x: mx.array,
    weights: Tree,
    modulation: mx.array,
    cos: mx.array,
    sin: mx.array,
    parts: int,
    *,
    heads: int,
    eps: float,
    product: Product = linear,
) -> tuple[mx.array, ...]:
    """A block's normed input (B, L, dim) and, for each part of the heads, its keys and values side by side:
    (B, L, heads / parts, 2D)."""
    h = modulated_norm(x, weights["attention_norm1"], row(modulation, 0), eps)
    both = mx.concatenate([*keys_and_values(h, weights["attention"], cos, sin, heads, product)], axis=-1)
    return h, *mx.split(both, ends_of(heads, parts), axis=2)


def asked(
    h: mx.array,
    weights: Tree,
    cos: mx.array,
    sin: mx.array,
    rows: int | None,
    parts: int,
    *,
    heads: int,
    product: Product = linear,
) -> list[mx.array]:
    """The queries of the first `rows` rows of a normed input (B, L, dim), for each part of the heads."""
    q = queries(h[:, :rows], weights["attention"], cos[:rows], sin[:rows], heads, product)
    return list(mx.split(q, ends_of(heads, parts), axis=2))


def ends_of(heads: int, parts: int) -> list[int]:
    """Where each part of the heads but the last ends."""
    return [heads * i // parts for i in range(1, parts)]


def feed(
    x: mx.array,
    weights: Tree,
    modulation: mx.array,
    hints: Sequence[Hint] = (),
    *,
    eps: float,
    factor: float = 1.0,
    product: Product = linear,
) -> mx.array:
    """The feed-forward half of a block on x (B, L, dim), and the hints for its rows added to the result."""
    scale, gate = row(modulation, 2), row(modulation, 3)
    h = modulated_norm(x, weights["ffn_norm1"], scale, eps)
    h = feed_forward(h, weights["feed_forward"], factor, product)
    x = x + modulated_norm(h, weights["ffn_norm2"], gate, eps * factor**2)
    for hint, strength in hints:
        x = x + strength * hint[:, : x.shape[1]].astype(strength.dtype)
    return x


def row(x: mx.array, i: int) -> mx.array:
    """x[i] as a view: MLX's own x[i] launches a kernel and copies."""
    return x[i : i + 1].reshape(x.shape[1:])


def modulated_norm(x: mx.array, weights: Tree, factor: mx.array, eps: float) -> mx.array:
    """RMSNorm times factor (dim,), in factor's dtype and in one pass: the factor is folded into the norm's weight."""
    return mx.fast.rms_norm(x, weights["weight"] * factor, eps).astype(factor.dtype)


def time_embedding(times: Sequence[float], weights: Tree, t_scale: float) -> mx.array:
    """Sinusoids of the times (N,), cosines first, through a two-layer MLP: (N, time_dim), float32."""
    half = TIME_FREQUENCIES // 2
    frequencies = mx.exp(-math.log(10000) * mx.arange(half, dtype=mx.float32) / half)
    angles = (mx.array(list(times), dtype=mx.float32) * t_scale)[:, None] * frequencies
    x = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
    hidden = linear(x, weights["mlp"][0])
    return linear(silu(hidden), weights["mlp"][2])


def patchify(latents: mx.array) -> mx.array:
    """(B, h, w, C) to tokens (B, h/2 * w/2, 4C), row by row; features are (row, column, channel)."""
    B, h, w, C = latents.shape
    x = latents.reshape(B, h // PATCH, PATCH, w // PATCH, PATCH, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, PATCH * PATCH * C)


def unpatchify(tokens: mx.array, h: int, w: int) -> mx.array:
    """The inverse of patchify."""
    B, _, features = tokens.shape
    x = tokens.reshape(B, h // PATCH, w // PATCH, PATCH, PATCH, features // PATCH**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h, w, -1)


def padding(tokens: int) -> int:
    """How many tokens are appended to this many: their number becomes a multiple of 32."""
    return -tokens % PAD_MULTIPLE


def pad_tokens(x: mx.array, pad: mx.array, extra: int) -> mx.array:
    """Append copies of the learned `pad` (1, dim) to x (B, L, dim)."""
    B, _, D = x.shape
    return mx.concatenate([x, mx.broadcast_to(pad.astype(x.dtype), (B, extra, D))], axis=1) if extra else x


def positions(caption_length: int, h: int, w: int) -> np.ndarray:
    """(frame, row, column) of every token, image first: (L, 3).

    h and w are in latent pixels; caption_length includes padding. Caption tokens, padding included, are frames 1, 2,
    3 and so on; the image is in the frame after the last of them; the image's padding is at (0, 0, 0).
    """
    rows, columns = h // PATCH, w // PATCH
    image = np.zeros((rows * columns + padding(rows * columns), 3), dtype=np.int64)
    image[: rows * columns, 0] = caption_length + 1
    image[: rows * columns, 1:] = np.indices((rows, columns)).reshape(2, -1).T
    caption = np.zeros((caption_length, 3), dtype=np.int64)
    caption[:, 0] = np.arange(1, caption_length + 1)
    return np.concatenate([image, caption])


def rope(config: TransformerConfig, caption_length: int, h: int, w: int) -> tuple[mx.array, mx.array]:
    """The `rope_table` of an image of h x w latent pixels and its padded caption."""
    return rope_table(positions(caption_length, h, w), config.axes_dims, config.rope_theta)


def modulate(
    config: TransformerConfig,
    runner: Runner,
    times: Sequence[float],
    product: Product = linear,
    beside: Sequence[str] = (),
) -> tuple[mx.array, mx.array]:
    """Everything that depends on the times (N,) = 1 - sigma, for a whole schedule at once.

    Returns the scales and gates of the modulated blocks, and of the blocks `beside` (N, blocks, 4, dim), and the scale
    of the final layer (N, dim), in the compute dtype. The sinusoids and their MLP stay in float32. The adaLN weights,
    2% of the network, are not kept in memory.
    """
    dtype = runner.dtype
    embedding = time_embedding(times, runner.once("t_embedder", mx.float32), config.t_scale)
    final = runner.once("all_final_layer.2-1.adaLN_modulation")[1]
    final_scale = 1 + product(silu(embedding).astype(dtype), final)
    embedding = embedding.astype(dtype)
    parts = []
    for name in (*config.modulated, *beside):
        parts.append(scales_and_gates(embedding, runner.once(f"{name}.adaLN_modulation")[0], product))
        runner.computed(parts[-1])
    blocks = mx.stack(parts, axis=1)
    runner.computed(blocks, final_scale)
    return blocks, final_scale


def scales_and_gates(embedding: mx.array, layer: Tree, product: Product = linear) -> mx.array:
    """A block's modulation at times whose embedding is (N, time_dim): scale and gate of each half, (N, 4, dim)."""
    x = product(embedding, layer)
    x = x.reshape(len(x), 4, -1)
    # the checkpoint's order is scale_msa, gate_msa, scale_mlp, gate_mlp; the even ones are scales
    return mx.stack([1 + x[:, 0], mx.tanh(x[:, 1]), 1 + x[:, 2], mx.tanh(x[:, 3])], axis=1)


# ---- the network


def as_it_is(function: Callable) -> Callable:
    return function


@dataclass(frozen=True)
class Stream:
    """Tokens on their way through blocks, and everything else a block takes; each block returns the next Stream.

    x is (B, L, dim); modulation (blocks, 4, dim) has the scales and gates of exactly the blocks that this walk runs;
    cos, sin (L, head / 2) are the rotary tables of its rows. Only the first `rows` rows of the last block's output are
    computed. beside has the tokens (B, L, dim) of each `Chain` that runs along; hints are what the next block adds for
    them. shares says how the rows of the whole sequence are shared: see `Ranks`.
    """

    x: mx.array
    modulation: mx.array
    cos: mx.array
    sin: mx.array
    rows: int | None = None
    beside: tuple[mx.array, ...] = ()
    hints: tuple[Hint, ...] = ()
    shares: Shares = ()

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.x, *self.beside, *(hint for hint, _ in self.hints))


@dataclass(frozen=True)
class Chain:
    """Blocks of a ControlNet that run along with the transformer's, on tokens of their own.

    Block i runs just before the transformer's block places[i] of this walk; what its `after_proj` makes of its output,
    times scale, is added to that block's. Blocks that have no place run last and add nothing. modulation is
    (blocks, 4, dim).
    """

    blocks: tuple[str, ...]
    places: tuple[int, ...]
    modulation: mx.array
    scale: float


@dataclass(frozen=True)
class Control:
    """A ControlNet's part in one step: its control image as tokens (B or 1, L, dim), and the chains that run in the
    noise refiner and in the layers."""

    tokens: mx.array
    refiner: Chain
    layers: Chain


class Controls(Protocol):
    """A ControlNet with its control image, for all steps: see `mlx_zimage.models.controlnet`."""

    @property
    def embedder(self) -> str:
        """The name of the layer that embeds the control image."""

    @property
    def blocks(self) -> Sequence[str]:
        """The names of its blocks."""

    @property
    def latents(self) -> mx.array:
        """The control image (1, h, w, channels)."""

    def control(self, tokens: mx.array, modulation: mx.array, i: int) -> Control | None:
        """Its part in step i, with its image as tokens and its blocks' scales and gates; None if it has none."""


def in_order(blocks: Sequence[str], chains: Sequence[Chain]) -> list[tuple[str, int | None, int]]:
    """The blocks of a walk and of the chains along it, in the order they run: name, chain (None for the walk itself),
    index within the walk or chain."""
    waiting = [list(enumerate(chain.blocks)) for chain in chains]
    order: list[tuple[str, int | None, int]] = []
    for at, name in enumerate(blocks):
        for k, chain in enumerate(chains):
            while waiting[k] and waiting[k][0][0] < len(chain.places) and chain.places[waiting[k][0][0]] <= at:
                i, own = waiting[k].pop(0)
                order.append((own, k, i))
        order.append((name, None, at))
    return order + [(own, k, i) for k, rest in enumerate(waiting) for i, own in rest]


def in_turns(stream: Stream) -> Iterator[Stream]:
    """Split a stream into batches of as many images as TOKENS_AT_ONCE allows."""
    B, L, _ = stream.x.shape
    together = max(1, TOKENS_AT_ONCE // max(stream.shares, default=L))  # the same on all machines
    for i in range(0, B, together):
        part = slice(i, i + together)
        beside = tuple(x[part] for x in stream.beside)
        yield replace(stream, x=stream.x[part], beside=beside) if together < B else stream


@dataclass(frozen=True)
class Caption:
    """A prompt at one image size: its refined embeddings (1, L', dim), and the rotary tables of image and caption.

    image and joint say how the rows of the image and of the joined sequence are shared; all other rows here are this
    machine's.
    """

    embedded: mx.array
    cos: mx.array
    sin: mx.array
    image: Shares = ()
    joint: Shares = ()


class Transformer:
    """The network, with its weights and compute dtype from a `Runner`.

    product multiplies by the blocks' matrices, and ranks shares the rows of each sequence. A product with side effects,
    such as recording its inputs, needs compile=False. most is the largest number of FLOP for one kernel of attention
    (see `machine.kernel_flops`). Two attributes may be set between calls: lean frees memory in the middle of each
    block, at a small cost in time, with the same numbers; factor is a power of two that keeps products in float16's
    range (see `mlx_zimage.headroom`).
    """

    set_attention_backend = Needless("MLX has only one fused attention implementation")
    compile = Needless("blocks are compiled already")

    def __init__(
        self,
        config: TransformerConfig,
        runner: Runner,
        product: Product = linear,
        ranks: Ranks = ALONE,
        compile: bool = True,
        most: float = math.inf,
    ):
        self.config = config
        self.runner = runner
        self.product = product
        self.ranks = ranks
        self.is_compiled = compile
        self.most = most
        self.sums = sum_dtype(runner.dtype)
        self.lean = False
        # the last schedule's times, the blocks beside the transformer's, and `modulate`'s result
        self._schedule: tuple | None = None
        # no reference to self here: a cycle would keep the weights in memory until Python's garbage collector runs
        self._rope = lru_cache(maxsize=4)(partial(rope, config))
        self.factor = margin(runner.dtype)

    @property
    def factor(self) -> float:
        return self._factor

    @factor.setter
    def factor(self, factor: float) -> None:
        self._factor = factor
        wrap = compiled if self.is_compiled else as_it_is
        shared: dict[str, Any] = {"eps": self.config.norm_eps, "factor": factor, "product": self.product}
        self._attend = wrap(partial(attend, heads=self.config.n_heads, most=self.most, ranks=self.ranks, **shared))
        self._feed = wrap(partial(feed, **shared))
        self._add_attention = wrap(partial(add_attention, **shared))
        split: dict[str, Any] = {"heads": self.config.n_heads, "product": self.product}
        self._sent = wrap(partial(sent, eps=self.config.norm_eps, **split))
        self._asked = wrap(partial(asked, **split))

    def modulate(self, times: Sequence[float], beside: Sequence[str] = ()) -> tuple[mx.array, mx.array]:
        """Everything that depends on the times: see the function `modulate`. The last schedule's result is cached."""
        self.forget_schedule_but(times, beside)
        if self._schedule is None:
            found = modulate(self.config, self.runner, times, self.product, beside)
            self._schedule = tuple(times), tuple(beside), found
        return self._schedule[2]

    def forget_schedule_but(self, times: Sequence[float], beside: Sequence[str] = ()) -> None:
        """Free the cached schedule, unless it is the one for these times and blocks beside the transformer's."""
        if self._schedule and self._schedule[:2] != (tuple(times), tuple(beside)):
            self._schedule = None

    def forget(self) -> None:
        """Free the cached schedule and rotary tables."""
        self._schedule = None
        self._rope.cache_clear()

    def rope(self, caption_length: int, h: int, w: int) -> tuple[mx.array, mx.array]:
        """The rotary tables of an image of h x w latent pixels and its padded caption; see the function `rope`."""
        return self._rope(caption_length, h, w)

    # A caption is embedded, then refined; an image is begun, refined, joined with its caption, and finished. Code that
    # needs the values in between, such as calibration, calls the same methods.

    def caption_stream(self, cap_feats: mx.array) -> Stream:
        """The text encoder's output (L, cap_feat_dim), embedded and padded, ready for the context refiner."""
        embedder = self.runner.tree("cap_embedder")
        x = rms_norm(cap_feats[None].astype(self.sums), embedder[0], self.config.norm_eps)
        x = self.product(x, embedder[1]).astype(self.sums)
        x = pad_tokens(x, self.runner.tree("cap_pad_token"), padding(x.shape[1]))
        # These blocks do not see the time. Multiplying by scales and gates of 1 is exact, and needs no second trace.
        ones = mx.ones((len(self.config.refiners), 4, self.config.dim), dtype=self.runner.dtype)
        return Stream(x, ones, *self.rope(x.shape[1], 0, 0))

    def embed_captions(self, prompts: Sequence[mx.array]) -> list[mx.array]:
        """Embed, pad and refine the text encoder's outputs (L, cap_feat_dim), each on its own: (1, L', dim) each."""
        return [stream.x for stream in self.run(self.config.refiners, [self.caption_stream(x) for x in prompts])]

    def captions(self, prompts: Sequence[mx.array], h: int, w: int) -> list[Caption]:
        """The text encoder's outputs (L, cap_feat_dim) for an image of h x w latent pixels."""
        return [self._caption(x, h, w) for x in self.embed_captions(prompts)]

    def _caption(self, embedded: mx.array, h: int, w: int) -> Caption:
        tokens = (h // PATCH) * (w // PATCH)
        parts, ranks = (tokens, padding(tokens), embedded.shape[1]), self.ranks.among(tokens)
        cos, sin = (ranks.own(table, parts) for table in self.rope(parts[-1], h, w))
        own = ranks.own(embedded, parts[-1:], axis=1)
        return Caption(own, cos, sin, ranks.shares(parts[:-1]), ranks.shares(parts))

    def begin(self, latents: mx.array, embedder: str = "all_x_embedder.2-1") -> tuple[mx.array, int]:
        """Latents (B, h, w, C) as embedded, padded tokens (B, L, dim), and the number of tokens before padding.

        Both are this machine's share.
        """
        tokens = patchify(latents.astype(self.runner.dtype))
        extra, ranks = padding(tokens.shape[1]), self.ranks.among(tokens.shape[1])
        x = self.product(ranks.own(tokens, tokens.shape[1:2], axis=1), self.runner.tree(embedder))
        pad = self.runner.tree("x_pad_token")
        first, end = ranks.mine(extra)
        return pad_tokens(x.astype(self.sums), pad, end - first), x.shape[1]

    def image_stream(
        self, x: mx.array, caption: Caption, modulation: mx.array, beside: Sequence[mx.array] = ()
    ) -> Stream:
        """Embedded image tokens (B, L, dim), and a control image's for each chain, ready for the noise refiner."""
        length, refiners = x.shape[1], self.config.n_refiner_layers
        along = tuple(mx.broadcast_to(own, x.shape) for own in beside)
        tables = caption.cos[:length], caption.sin[:length]
        return Stream(x, modulation[:refiners], *tables, beside=along, shares=caption.image)

    def join(self, image: Stream, caption: Caption, modulation: mx.array, rows: int) -> Stream:
        """Refined images with their caption, ready for the layers; only the images' rows leave the last layer."""
        B, refiners = image.x.shape[0], self.config.n_refiner_layers
        embedded = mx.broadcast_to(caption.embedded, (B, *caption.embedded.shape[1:]))
        x, *beside = (mx.concatenate([own, embedded], axis=1) for own in (image.x, *image.beside))
        return Stream(x, modulation[refiners:], caption.cos, caption.sin, rows, tuple(beside), shares=caption.joint)

    def finish(self, x: mx.array, final_scale: mx.array, h: int, w: int) -> mx.array:
        """From image tokens (B, L, dim) after the last layer to data minus noise (B, h, w, C), float32."""
        x = mx.fast.layer_norm(x, None, None, 1e-6) * final_scale
        x = self.product(x.astype(self.runner.dtype), self.runner.tree("all_final_layer.2-1.linear"))
        tokens = (h // PATCH) * (w // PATCH)
        shares = self.ranks.among(tokens).shares((tokens,))
        return unpatchify(self.ranks.gather(x.astype(mx.float32), shares), h, w)

    def velocity(
        self, cap_feats: mx.array, sigmas: Sequence[float] | np.ndarray, h: int, w: int
    ) -> Callable[[mx.array, int], mx.array]:
        """`velocities` for one prompt."""
        velocities = self.velocities([cap_feats], sigmas, h, w)
        return lambda latents, i: velocities(latents, i)[0]

    def velocities(
        self,
        prompts: Sequence[mx.array],
        sigmas: Sequence[float] | np.ndarray,
        h: int,
        w: int,
        controls: Sequence[Controls] = (),
        first: int = 0,
    ) -> Callable[..., list[mx.array]]:
        """The function (latents (B, h, w, C) float32, i) -> d latents / d sigma at sigmas[first + i], float32, for each
        prompt. A third argument n limits it to the first n prompts.

        prompts are the text encoder's outputs (L, cap_feat_dim). Everything that does not depend on the latents is
        computed here, once. Each call reads each block once for all prompts and images.
        """
        captions = self.captions(prompts, h, w)
        modulations, final_scales = self.modulate(times(sigmas), [name for own in controls for name in own.blocks])
        images = [self.begin(own.latents, own.embedder)[0] for own in controls]
        count_own = len(self.config.modulated)

        def velocities(latents: mx.array, i: int, count: int | None = None) -> list[mx.array]:
            modulation, active, start = row(modulations, first + i), [], count_own
            for own, tokens in zip(controls, images, strict=True):
                end = start + len(own.blocks)
                if (control := own.control(tokens, modulation[start:end], i)) is not None:
                    active.append(control)
                start = end
            # The network points from noise to data; sigma grows from data to noise.
            found = self(latents, captions[:count], modulation[:count_own], row(final_scales, first + i), active)
            return [-x for x in found]

        return velocities

    def __call__(
        self,
        latents: mx.array,
        captions: Sequence[Caption],
        modulation: mx.array,
        final_scale: mx.array,
        controls: Sequence[Control] = (),
    ) -> list[mx.array]:
        """Data minus noise (B, h, w, C) float32 for latents (B, h, w, C), once for each caption.

        modulation (blocks, 4, dim) and final_scale (dim,) are `modulate`'s results for one time.
        """
        _, h, w, _ = latents.shape
        x, tokens = self.begin(latents)
        beside = [control.tokens for control in controls]
        streams = [self.image_stream(x, caption, modulation, beside) for caption in captions]
        del x
        names, refiners = self.config.modulated, self.config.n_refiner_layers
        streams = self.run(names[:refiners], streams, [control.refiner for control in controls])
        streams = [self.join(*pair, modulation, tokens) for pair in zip(streams, captions, strict=True)]
        streams = self.run(names[refiners:], streams, [control.layers for control in controls])
        return [self.finish(stream.x, final_scale, h, w) for stream in streams]

    def run(self, blocks: Sequence[str], streams: Sequence[Stream], chains: Sequence[Chain] = ()) -> list[Stream]:
        """Run streams through the named blocks and the chains along them, in batches of as many images as
        TOKENS_AT_ONCE allows."""
        turns = [list(in_turns(stream)) for stream in streams]
        flat = [turn for stream in turns for turn in stream]
        wait = self.lean or len(flat) > len(streams)  # whatever had to be split is large
        order = in_order(blocks, chains)

        def apply(stream: Stream, weights: Tree, i: int) -> Stream:
            _, chain, own = order[i]
            if chain is None:
                return self.apply(stream, weights, own)
            return self.apply_beside(stream, weights, own, chain, chains[chain])

        names = [name for name, _, _ in order]
        ended = iter(result(self.runner.walk(names, flat, apply, without=self.config.read_once, wait=wait)))
        parts = [[next(ended) for _ in stream] for stream in turns]
        return [first if not others else joined(first, *others) for first, *others in parts]

    def apply(self, stream: Stream, weights: Tree, i: int) -> Stream:
        """Run block i of this walk on a stream."""
        rows = stream.rows if i == len(stream.modulation) - 1 else None
        x = self._block(stream.x, weights, row(stream.modulation, i), stream, rows, stream.hints)
        return replace(stream, x=x, hints=())

    def apply_beside(self, stream: Stream, weights: Tree, i: int, k: int, chain: Chain) -> Stream:
        """Run block i of a chain on its tokens, `beside[k]` of the stream; it may leave a hint."""
        x, hints = stream.beside[k], stream.hints
        block = {name: part for name, part in weights.items() if name not in ("before_proj", "after_proj")}
        if "before_proj" in weights:
            x = self.product(x, weights["before_proj"]).astype(self.sums) + stream.x
        x = self._block(x, block, row(chain.modulation, i), stream)
        if i < len(chain.places):
            hints = (*hints, (self.product(x, weights["after_proj"]), mx.array(chain.scale, self.sums)))
        return replace(stream, beside=(*stream.beside[:k], x, *stream.beside[k + 1 :]), hints=hints)

    def _block(
        self,
        x: mx.array,
        weights: Tree,
        modulation: mx.array,
        stream: Stream,
        rows: int | None = None,
        hints: Sequence[Hint] = (),
    ) -> mx.array:
        # Two ways to compute attention: a compiled function cannot queue its pieces one by one, and on one machine,
        # pieces would only add copies of keys and values, and fuse fewer operations.
        if stream.shares and (parts := self.ranks.parts(max(stream.shares))):
            x = self._attend_in_parts(x, weights, modulation, stream, rows, min(parts, self.config.n_heads))
        else:
            x = self._attend(x, weights, modulation, stream.cos, stream.sin, rows, stream.shares)
        if self.lean:
            settle(x)
        return self._feed(x, weights, modulation, hints)

    def _attend_in_parts(
        self, x: mx.array, weights: Tree, modulation: mx.array, stream: Stream, rows: int | None, count: int
    ) -> mx.array:
        """`attend`, with the heads split into `count` parts.

        Keys and values of a part travel while queries, or the attention of the part before, are computed: each piece
        is queued on its own, since MLX waits for everything that one piece needs before it starts.
        """
        h, *own = self._sent(x, weights, modulation, stream.cos, stream.sin, count)
        mx.async_eval(h, *own)
        parts = [self.ranks.gather(part, stream.shares) for part in own]
        asked = self._asked(h, weights, stream.cos, stream.sin, rows, count)
        mx.async_eval(*asked)
        found = []
        for i, (q, both) in enumerate(zip(asked, parts, strict=True), 1):
            q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, *mx.split(both, 2, axis=-1)))
            found.append(dot_product_attention(q, k, v, self.most).transpose(0, 2, 1, 3))
            if i < count:
                mx.async_eval(found[-1])
        out = found[0] if len(found) == 1 else mx.concatenate(found, axis=2)
        return self._add_attention(x, out.transpose(0, 2, 1, 3), weights, modulation)


def joined(*parts: Stream) -> Stream:
    """Streams of different images, which have come to the end of a walk, as one."""
    rows = zip(*((part.x, *part.beside) for part in parts), strict=True)
    x, *beside = (mx.concatenate([*own]) for own in rows)
    return replace(parts[0], x=x, beside=tuple(beside))
