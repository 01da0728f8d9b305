"""The autoencoder of Z-Image (FLUX's AutoencoderKL): 16-channel latents at an eighth of the image's width and height.

Source: diffusers models/autoencoders/{autoencoder_kl,vae}.py. Arrays are channels-last throughout.

A full-size tensor inside the decoder can be larger than the transformer, so layers work on `Rows`: a tensor given by a
function that computes any range of its rows. Convolutions ask for the neighbouring rows too, normalization first sums
its statistics over the whole image, and a tensor that does not fit is computed again instead of kept. The result is
that of decoding the whole image at once, without tiles and their seams; a GPU with enough memory does just that.

Several machines each compute their rows of the image, and the few beyond them that convolutions reach; only the sums
for normalization, what the middle block's attention attends to, and the finished rows are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import mlx.core as mx

from ..config import read_config
from ..errors import CheckpointError
from ..machine import backend
from ..needless import Needless
from .layers import compiled, linear, result, settle, silu
from .runner import ALONE, NetworkConfig, Ranks, Runner, Tree

EPS = 1e-6
SCORES = 2**28  # bytes of scores that are in memory at a time: a fraction of a second on any GPU
CPU_STRIP = 2**22  # bytes of a tensor per strip on a CPU


@dataclass(frozen=True)
class VAEConfig(NetworkConfig):
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    sample_size: int = 1024

    @classmethod
    def from_dict(cls, config: dict) -> VAEConfig:
        """Read vae/config.json; refuse what this file does not implement."""
        fixed = {
            "in_channels": 3,
            "out_channels": 3,
            "act_fn": "silu",
            "mid_block_add_attention": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "latents_mean": None,
            "latents_std": None,
        }
        read = read_config(cls, config, "VAE", fixed)
        if any(width % read.norm_num_groups for width in read.block_out_channels):
            raise CheckpointError(
                f"VAE config: every one of block_out_channels {list(read.block_out_channels)} must be a multiple of "
                f"norm_num_groups {read.norm_num_groups}"
            )
        return read

    @property
    def scale(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def blocks(self) -> list[str]:
        """Empty: no part is read one by one."""
        return []

    @property
    def encoder_blocks(self) -> int:
        return len(self.block_out_channels) * self.layers_per_block

    @property
    def decoder_blocks(self) -> int:
        return len(self.block_out_channels) * (self.layers_per_block + 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint; convolutions in PyTorch's layout, (out, in, h, w)."""
        widths, top = self.block_out_channels, self.block_out_channels[-1]
        return {
            **_conv("encoder.conv_in", widths[0], 3),
            **_levels("encoder.down_blocks", "downsamplers", widths[0], widths, self.layers_per_block),
            **_mid_block("encoder.mid_block", top),
            **_norm("encoder.conv_norm_out", top),
            **_conv("encoder.conv_out", 2 * self.latent_channels, top),
            **_conv("decoder.conv_in", top, self.latent_channels),
            **_mid_block("decoder.mid_block", top),
            **_levels("decoder.up_blocks", "upsamplers", top, widths[::-1], self.layers_per_block + 1),
            **_norm("decoder.conv_norm_out", widths[0]),
            **_conv("decoder.conv_out", 3, widths[0]),
        }

    @property
    def read_once(self) -> str:
        return ""

    def stays(self, name: str) -> bool:
        return name.startswith("decoder.")  # the encoder is unloaded after use

    def sanitize(self, name: str, array: mx.array) -> mx.array:
        """A tensor in the layout used for computing; kernels from PyTorch's (out, in, h, w) to that of `convolve`."""
        return kernel(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array


def _conv(name: str, out_dim: int, in_dim: int, kernel: int = 3) -> dict:
    return {f"{name}.weight": (out_dim, in_dim, kernel, kernel), f"{name}.bias": (out_dim,)}


def _norm(name: str, dim: int) -> dict:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _resnet(name: str, in_dim: int, out_dim: int) -> dict:
    shapes = {
        **_norm(f"{name}.norm1", in_dim),
        **_conv(f"{name}.conv1", out_dim, in_dim),
        **_norm(f"{name}.norm2", out_dim),
        **_conv(f"{name}.conv2", out_dim, out_dim),
    }
    return shapes if in_dim == out_dim else shapes | _conv(f"{name}.conv_shortcut", out_dim, in_dim, 1)


def _mid_block(name: str, dim: int) -> dict:
    shapes = {**_resnet(f"{name}.resnets.0", dim, dim), **_resnet(f"{name}.resnets.1", dim, dim)}
    shapes |= _norm(f"{name}.attentions.0.group_norm", dim)
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        layer = f"{name}.attentions.0.{layer}"
        shapes |= {f"{layer}.weight": (dim, dim), f"{layer}.bias": (dim,)}
    return shapes


def _levels(name: str, sampler: str, in_dim: int, widths: tuple[int, ...], depth: int) -> dict:
    shapes: dict[str, tuple[int, ...]] = {}
    for level, width in enumerate(widths):
        for i in range(depth):
            shapes |= _resnet(f"{name}.{level}.resnets.{i}", in_dim, width)
            in_dim = width
        if level < len(widths) - 1:
            shapes |= _conv(f"{name}.{level}.{sampler}.0.conv", width, width)
    return shapes


# ---- tensors by rows


@dataclass(frozen=True)
class Rows:
    """A tensor (B, height, w, C) that may be too large to keep in memory: `get(a, b)` computes its rows a to b - 1.

    forget(a) says that rows before a will not be asked for again. Only the rows from `first` up to, but not including,
    `end` can be asked for; on several machines, that is a part of the tensor.
    """

    height: int
    get: Callable[[int, int], mx.array]
    forget: Callable[[int], None]
    first: int
    end: int

    @classmethod
    def of(cls, x: mx.array, height: int | None = None, first: int = 0) -> Rows:
        """x, which may be some rows of a larger tensor."""
        height, end = height or x.shape[1], first + x.shape[1]
        return cls(height, lambda a, b: x[:, a - first : b - first], lambda a: None, first, end)

    def map(self, function: Callable[[mx.array], mx.array]) -> Rows:
        """The tensor that `function`, applied pixel by pixel, makes of this one."""
        return replace(self, get=lambda a, b: function(self.get(a, b)))

    def only(self, first: int, end: int) -> Rows:
        return replace(self, first=max(first, self.first), end=min(end, self.end))

    def all(self) -> mx.array:
        """All available rows."""
        return self.get(self.first, self.end)


class Strips:
    """How many rows are computed at a time, and whether intermediate tensors are kept or computed again.

    strip_bytes limits one strip of one tensor. If it is None, every tensor is kept; held_bytes then limits a strip, so
    that it is small enough for a CPU's caches or a GPU's time limit. If held_bytes is None, too, whole images are
    computed at once.

    Images with `rows` rows of latents, and tensors at their other scales, are shared by ranks.
    """

    def __init__(
        self, strip_bytes: int | None = None, held_bytes: int | None = None, ranks: Ranks = ALONE, rows: int = 1
    ):
        self.holds = strip_bytes is None
        self.strip_bytes = held_bytes if self.holds else strip_bytes
        self.ranks = ranks
        self.rows = rows

    def own(self, x: Rows, reach: int = 0) -> Rows:
        """This machine's rows of x, and up to `reach` more above and below."""
        first, end = (edge * x.height // self.rows for edge in self.ranks.mine(self.rows))
        return x.only(first - reach, end + reach)

    def gather(self, x: mx.array, height: int) -> mx.array:
        """All rows of a tensor, of which every machine has its own."""
        return self.ranks.gather(x, tuple(rows * height // self.rows for rows in self.ranks.shares((self.rows,))))

    def bounds(self, x: Rows, most: int | None = None) -> list[tuple[int, int]]:
        """The strips of x, as (first row, end row), of at most `most` bytes each, whatever the other limit allows."""
        limits = [limit for limit in (self.strip_bytes, most) if limit]
        rows = x.end - x.first
        if not limits:
            return [(x.first, x.end)]
        row = x.get(x.first, x.first + 1)  # lazy: only its size is needed
        count = min(rows, -(-rows * row.nbytes // min(limits)))
        edges = [x.first + round(i * rows / count) for i in range(count + 1)]
        return list(pairwise(edges))

    def each(self, x: Rows, function: Callable) -> Iterator[tuple[tuple[int, int], Any]]:
        """The bounds of each strip of x, and the array or arrays that function makes of it, evaluated in turn."""
        for bound in self.bounds(x):
            made = function(x.get(*bound))
            settle(made)
            yield bound, made

    def hold(self, x: Rows) -> Rows:
        """Compute x strip by strip and keep it in memory. Rows of its inputs that are no longer needed are freed."""
        strips = {}
        for bound, strip in self.each(x, lambda rows: rows):
            strips[bound] = strip
            x.forget(bound[1])
        if len(strips) == 1:
            return Rows.of(strip, x.height, x.first)

        def get(a: int, b: int) -> mx.array:
            parts = [strip[:, max(a - c, 0) : b - c] for (c, d), strip in strips.items() if c < b and a < d]
            return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

        def forget(before: int) -> None:
            for a, b in [bound for bound in strips if bound[1] <= before]:
                del strips[a, b]

        return replace(x, get=get, forget=forget)

    def hold_if_small(self, x: Rows) -> Rows:
        """Keep x in memory if it fits in one strip, or if everything is kept; otherwise compute it on each request."""
        return self.hold(x) if self.holds or len(self.bounds(x)) == 1 else x

    def moments(self, x: Rows, groups: int) -> tuple[mx.array, mx.array]:
        """Mean and variance over (h, w, C / groups) of the whole tensor: each (B, 1, groups, 1) float32."""
        own = self.own(x)
        if self.strip_bytes is None:
            rows = [row_moments(own.all(), groups)]
        else:
            rows = [made for _, made in self.each(own, partial(row_moments, groups=groups))]
        # a row's moments do not depend on the strip or the machine it is in, so neither do the image's
        both = (mx.concatenate(list(part), axis=1) for part in zip(*rows, strict=True))
        means, variances = (self.gather(part, x.height) for part in both)
        mean = means.mean(axis=1, keepdims=True)
        return mean, (variances + mx.square(means - mean)).mean(axis=1, keepdims=True)


# ---- the parts, small to large


@compiled
def squared_distance(rows: mx.array, mean: mx.array) -> mx.array:
    return mx.square(rows.astype(mx.float32) - mean)


def row_moments(rows: mx.array, groups: int) -> tuple[mx.array, mx.array]:
    """Mean and variance of each row of (B, h, w, C) over (w, C / groups): each (B, h, groups, 1) float32.

    Computed for each channel first, since GPUs are fast at many short sums and slow at a few long ones. Channels, and
    rows in Strips.moments, are combined with Chan's formula for variances, which never subtracts large numbers.
    """
    B, h, _, _ = rows.shape
    means = rows.astype(mx.float32).mean(axis=2, keepdims=True)
    variances = squared_distance(rows, means).mean(axis=2).reshape(B, h, groups, -1)
    means = means.reshape(B, h, groups, -1)
    mean = means.mean(axis=3, keepdims=True)
    return mean, (variances + mx.square(means - mean)).mean(axis=3, keepdims=True)


@compiled
def affine(rows: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (rows * scale + shift).astype(rows.dtype)


@compiled
def affine_silu(rows: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return silu(affine(rows, scale, shift))


@cache
def streams() -> list[mx.ThreadLocalStream]:
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(2)]


def in_halves(function: Callable, rows: mx.array, *args: mx.array) -> mx.array:
    """Apply function to both halves of rows (B, h, w, C) in parallel: MLX's CPU build is multi-threaded only in matrix
    products."""
    parts = []
    for stream, part in zip(streams(), mx.split(rows, [rows.shape[1] // 2], axis=1), strict=True):
        with mx.stream(stream):
            parts.append(function(part, *args))
    return mx.concatenate(parts, axis=1)


def kernel(weight: mx.array) -> mx.array:
    """A convolution's weight (out, h, w, in) as `convolve` takes it, in one piece: GPUs copy views at every call.

    MLX's Winograd kernels for Metal are known to take gigabytes of scratch memory and to have many times the rounding
    error. A flipped convolution never uses them, so on Metal kernels are kept flipped, and `convolve` flips them back.
    """
    return mx.contiguous(weight[:, ::-1, ::-1] if backend() == "metal" else weight)


def convolve(x: mx.array, weights: Tree, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> mx.array:
    if backend() == "metal":
        return mx.conv_general(x, weights["weight"], stride=stride, padding=padding, flip=True) + weights["bias"]
    return mx.conv2d(x, weights["weight"], stride=stride, padding=padding) + weights["bias"]


def sum_of_products(x: mx.array, kernels: mx.array, bias: mx.array, padding: tuple[int, int]) -> mx.array:
    """A 3x3 convolution as nine matrix products of shifted views of x; kernels are (3 * 3 * out, in).

    For float32 on a CPU, where MLX's own convolution first copies each pixel's nine neighbours, which takes about
    twice as long and nine times the memory. Not for 16 bits, where MLX's CPU build is slow at products and the sums
    would be rounded.
    """
    above, left = padding
    x = mx.pad(x, [(0, 0), (above, above), (left, left), (0, 0)])
    B, h, w, C = x.shape
    pixels = x.reshape(B, h * w, C)
    # Each output row is followed by two pixels that belong to no row; the last two would lie outside x.
    count = (h - 2) * w - 2
    total = bias
    for i, kernel in enumerate(mx.split(kernels, 9)):
        shift = i // 3 * w + i % 3
        total = mx.addmm(total, pixels[:, shift : shift + count], kernel.T)
    out = total.shape[-1]
    return mx.as_strided(total, (B, h - 2, w - 2, out), (count * out, w * out, out, 1))


def conv(x: Rows, weights: Tree) -> Rows:
    """3x3 convolution, zero-padded by 1."""
    apply, weight = partial(convolve, weights=weights), weights["weight"]
    if backend() == "cpu" and weight.dtype == mx.float32:
        # each of the nine kernels is contiguous, which saves a copy in the products
        kernels = weight.transpose(1, 2, 0, 3).reshape(-1, weight.shape[-1])
        apply = partial(sum_of_products, kernels=kernels, bias=weights["bias"])

    def get(a: int, b: int) -> mx.array:
        above, below = int(a == 0), int(b == x.height)
        rows = x.get(a - 1 + above, b + 1 - below)
        if above and below:
            return apply(rows, padding=(1, 1))
        if above or below:
            rows = mx.pad(rows, [(0, 0), (above, below), (0, 0), (0, 0)])
        return apply(rows, padding=(0, 1))

    # the outermost row of those given lacks a neighbour, unless the image ends there
    first, end = x.first + (x.first > 0), x.end - (x.end < x.height)
    return Rows(x.height, get, lambda a: x.forget(a - 1), first, end)


def upsample(x: Rows, weights: Tree) -> Rows:
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def get(a: int, b: int) -> mx.array:
        rows = x.get(a // 2, (b + 1) // 2)
        B, h, w, C = rows.shape
        rows = mx.broadcast_to(rows[:, :, None, :, None], (B, h, 2, w, 2, C)).reshape(B, 2 * h, 2 * w, C)
        return rows[:, a % 2 : a % 2 + b - a]

    doubled = Rows(2 * x.height, get, lambda a: x.forget(a // 2), 2 * x.first, 2 * x.end)
    return conv(doubled, weights["conv"])


def downsample(x: Rows, weights: Tree) -> Rows:
    """3x3 convolution of stride 2."""

    def get(a: int, b: int) -> mx.array:
        # The original pads only right and bottom; symmetric padding would shift the image by half a pixel.
        end = min(2 * b + 1, x.height)
        rows = mx.pad(x.get(2 * a, end), [(0, 0), (0, 2 * b + 1 - end), (0, 1), (0, 0)])
        return convolve(rows, weights["conv"], stride=2)

    end = x.height // 2 if x.end == x.height else (x.end - 1) // 2
    return Rows(x.height // 2, get, lambda a: x.forget(2 * a), (x.first + 1) // 2, end)


def group_norm(x: Rows, weights: Tree, groups: int, strips: Strips, then: Callable = affine) -> Rows:
    """Normalize over (h, w, C / groups) of the whole image; statistics in float32, result in x's dtype."""
    mean, variance = strips.moments(x, groups)
    width = weights["weight"].size // groups
    # one scale and one shift per channel, so that one pass over the image is enough
    scale = mx.repeat(mx.rsqrt(variance + EPS), width, axis=3).flatten(2)[:, :, None] * weights["weight"]
    shift = weights["bias"] - mx.repeat(mean, width, axis=3).flatten(2)[:, :, None] * scale
    if backend() == "cpu":
        then = partial(in_halves, then)
    return x.map(lambda rows: then(rows, scale, shift))


def resnet(x: Rows, weights: Tree, groups: int, strips: Strips) -> Rows:
    x = strips.hold_if_small(x)
    h = conv(group_norm(x, weights["norm1"], groups, strips, affine_silu), weights["conv1"])
    h = strips.hold_if_small(replace(h, forget=lambda a: None))  # x is needed again
    h = conv(group_norm(h, weights["norm2"], groups, strips, affine_silu), weights["conv2"])
    shortcut = x.map(lambda rows: convolve(rows, weights["conv_shortcut"])) if "conv_shortcut" in weights else x

    def forget(before: int) -> None:
        shortcut.forget(before - 2)  # two convolutions reach two rows back; h.forget allows for that itself
        h.forget(before)

    total = replace(h, get=lambda a, b: shortcut.get(a, b) + h.get(a, b), forget=forget)
    return strips.hold(total)


def attention(x: Rows, weights: Tree, groups: int, strips: Strips) -> Rows:
    """Single-head self-attention of x to all pixels of the image."""
    rows = x.all()
    B, h, w, C = rows.shape
    normed = group_norm(Rows.of(rows, x.height, x.first), weights["group_norm"], groups, strips)
    y = strips.gather(strips.own(normed).all(), x.height)
    k, v = (linear(y.reshape(B, 1, -1, C), weights[name]) for name in ("to_k", "to_v"))
    q = linear(y[:, x.first : x.end].reshape(B, 1, -1, C), weights["to_q"])
    # Queries are independent, so they too go in strips: no backend has a fused kernel for heads this wide, and all
    # scores of a strip are in memory.
    scores = Rows.of(mx.broadcast_to(mx.zeros((), mx.float32), (B, h * w, 1, k.shape[2])))
    parts = []
    for a, b in strips.bounds(scores, SCORES):
        parts.append(mx.fast.scaled_dot_product_attention(q[:, :, a:b], k, v, scale=C**-0.5))
        settle(parts[-1])
    y = linear(mx.concatenate(parts, axis=2), weights["to_out"][0])
    return Rows.of(rows + y.reshape(B, h, w, C), x.height, x.first)


def mid_block(x: Rows, weights: Tree, groups: int, strips: Strips) -> Rows:
    x = resnet(x, weights["resnets"][0], groups, strips)
    x = attention(x, weights["attentions"][0], groups, strips)
    return resnet(x, weights["resnets"][1], groups, strips)


def encoder(x: mx.array, weights: Tree, groups: int, strips: Strips) -> Generator[int, None, mx.array]:
    """Pixels (B, H, W, 3) in [-1, 1] to mean and log variance (B, H/8, W/8, 2 * 16).

    Yields the number of blocks done, up to the config's `encoder_blocks`.
    """
    levels = weights["down_blocks"]
    h = conv(strips.own(Rows.of(x), encoder_reach(len(levels), len(levels[0]["resnets"]))), weights["conv_in"])
    done = 0
    for level in levels:
        for block in level["resnets"]:
            h = resnet(h, block, groups, strips)
            done += 1
            yield done
        if "downsamplers" in level:
            h = strips.hold(downsample(h, level["downsamplers"][0]))
    h = mid_block(h, weights["mid_block"], groups, strips)
    h = conv(group_norm(h, weights["conv_norm_out"], groups, strips, affine_silu), weights["conv_out"])
    return strips.gather(strips.own(h).all(), h.height)


def decoder(z: mx.array, weights: Tree, groups: int, strips: Strips) -> Generator[int, None, mx.array]:
    """Unscaled latents (B, h, w, 16) to pixels (B, 8h, 8w, 3), nominally in [-1, 1].

    Yields the number of blocks done, up to the config's `decoder_blocks`.
    """
    levels = weights["up_blocks"]
    x = conv(strips.own(Rows.of(z), decoder_reach(len(levels), len(levels[0]["resnets"]))), weights["conv_in"])
    x = mid_block(x, weights["mid_block"], groups, strips)
    done = 0
    for level in levels:
        for block in level["resnets"]:
            x = resnet(x, block, groups, strips)
            done += 1
            yield done
        if "upsamplers" in level:
            x = upsample(x, level["upsamplers"][0])
    x = conv(group_norm(x, weights["conv_norm_out"], groups, strips, affine_silu), weights["conv_out"])
    return strips.gather(strips.hold(strips.own(x)).all(), x.height)


def decoder_reach(levels: int, depth: int) -> int:
    """How many more rows of latents than its own a machine needs above and below: what the convolutions reach."""
    rows = 1  # conv_out
    for level in range(levels):  # from the last to the first
        rows += 2 * depth
        if level < levels - 1:
            rows = rows // 2 + 1  # upsample
    return rows + 5  # mid_block and conv_in


def encoder_reach(levels: int, depth: int) -> int:
    """The same for the encoder, in pixels."""
    rows = 5  # conv_out and mid_block
    for level in range(levels):
        rows += 2 * depth
        if level < levels - 1:
            rows = 2 * rows + 1  # downsample
    return rows + 1  # conv_in


def moments(encoded: mx.array) -> tuple[mx.array, mx.array]:
    """The mean and the clipped log variance that an encoder's output consists of, float32."""
    mean, log_variance = mx.split(encoded.astype(mx.float32), 2, axis=-1)
    return mean, mx.clip(log_variance, -30.0, 20.0)


def strip_within(config: VAEConfig, dtype: mx.Dtype, most: float) -> int | None:
    """Bytes of a strip that any convolution computes within `most` FLOP; None if there is no limit."""
    return None if most == math.inf else int(most / convolution_flops(config) * dtype.size)


def convolution_flops(config: VAEConfig) -> int:
    """FLOP per output number of the most expensive convolution."""
    return 2 * 9 * max(config.block_out_channels)


class VAE:
    """The autoencoder, with its weights and compute dtype from a `Runner`.

    strip_bytes limits the working memory (see Strips); None is fastest. A convolution of more than `most` FLOP is
    computed in strips even then (see `machine.kernel_flops`). ranks share the rows of an image if it has enough of them
    that each rank then has less to compute.
    """

    enable_tiling = Needless("images are decoded in strips if memory is short")
    enable_slicing = Needless("images are decoded one at a time")

    def __init__(
        self,
        config: VAEConfig,
        runner: Runner,
        strip_bytes: int | None = None,
        most: float = math.inf,
        ranks: Ranks = ALONE,
    ):
        self.config = config
        self.runner = runner
        self.strip_bytes = strip_bytes
        self.most = most
        self.ranks = ranks

    def decode(self, latents: mx.array) -> mx.array:
        """Latents (B, h, w, 16), as the transformer sees them, to pixels (B, 8h, 8w, 3) float32, about [-1, 1]."""
        return result(self.decode_steps(latents))

    def decode_steps(self, latents: mx.array) -> Generator[int, None, mx.array]:
        """`decode`, yielding the number of blocks done after each one."""
        z = latents.astype(mx.float32) / self.config.scaling_factor + self.config.shift_factor
        return (yield from decoder(*self._inputs(z, "decoder"))).astype(mx.float32)

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels (B, H, W, 3) in [-1, 1] to mean latents (B, H/8, W/8, 16) float32, as the transformer sees them."""
        return result(self.encode_steps(pixels))

    def encode_steps(self, pixels: mx.array, noise: mx.array | None = None) -> Generator[int, None, mx.array]:
        """`encode`, yielding the number of blocks done after each one.

        With noise (B, H/8, W/8, 16), standard normal, the latents are a sample of their distribution instead of its
        mean.
        """
        mean, log_variance = moments((yield from encoder(*self._inputs(pixels, "encoder"))))
        z = mean if noise is None else mean + mx.exp(log_variance / 2) * noise
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def _inputs(self, x: mx.array, name: str) -> tuple:
        held = CPU_STRIP if backend() == "cpu" else strip_within(self.config, self.runner.dtype, self.most)
        levels, depth = len(self.config.block_out_channels), self.config.layers_per_block
        rows, reach = x.shape[1], decoder_reach(levels, depth + 1)
        if name == "encoder":
            rows, reach = rows // self.config.scale, -(-encoder_reach(levels, depth) // self.config.scale)
        most = max(self.ranks.shares((rows,)), default=rows)
        strips = Strips(self.strip_bytes, held, self.ranks if most + 2 * reach < rows else ALONE, rows)
        return x.astype(self.runner.dtype), self.runner.tree(name), self.config.norm_num_groups, strips
