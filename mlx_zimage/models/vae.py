"""The autoencoder of Z-Image (FLUX's AutoencoderKL): 16-channel latents at an eighth of the picture's size.

Source: diffusers models/autoencoders/{autoencoder_kl,vae}.py. Arrays are channels-last throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import mlx.core as mx

from ..errors import CheckpointError
from .layers import linear

EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
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
        for key, wanted in fixed.items():
            if config.get(key, wanted) != wanted:
                raise CheckpointError(f"VAE config: {key} must be {wanted}, got {config[key]}")
        names = {field.name for field in fields(cls)}
        known = {key: value for key, value in config.items() if key in names}
        known["block_out_channels"] = tuple(known.get("block_out_channels", cls.block_out_channels))
        return cls(**known)

    @property
    def scale(self) -> int:
        """Picture pixels per latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, convolutions as PyTorch stores them: (out, in, h, w)."""
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
    shapes = {}
    for level, width in enumerate(widths):
        for i in range(depth):
            shapes |= _resnet(f"{name}.{level}.resnets.{i}", in_dim, width)
            in_dim = width
        if level < len(widths) - 1:
            shapes |= _conv(f"{name}.{level}.{sampler}.0.conv", width, width)
    return shapes


def sanitize(array: mx.array) -> mx.array:
    """PyTorch's convolution layout (out, in, h, w) to MLX's (out, h, w, in); anything else as it is."""
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


# ---- the parts, small to large; x is (B, h, w, C)


def conv(x: mx.array, weights: dict, stride: int = 1, padding: int = 1) -> mx.array:
    return mx.conv2d(x, weights["weight"], stride=stride, padding=padding) + weights["bias"]


def group_norm(x: mx.array, weights: dict, groups: int) -> mx.array:
    """Normalise over (h, w, C / groups); statistics in float32, result in x's dtype."""
    B, h, w, C = x.shape
    grouped = x.astype(mx.float32).reshape(B, h * w, groups, C // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = mx.square(grouped - mean).mean(axis=(1, 3), keepdims=True)
    # scale and shift per channel, so that the picture is passed over once
    scale = mx.broadcast_to(mx.rsqrt(variance + EPS), (B, 1, groups, C // groups)).reshape(B, 1, 1, C)
    mean = mx.broadcast_to(mean, (B, 1, groups, C // groups)).reshape(B, 1, 1, C)
    scale = scale * weights["weight"].astype(mx.float32)
    shift = weights["bias"].astype(mx.float32) - mean * scale
    return (x * scale + shift).astype(x.dtype)


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def resnet(x: mx.array, weights: dict, groups: int) -> mx.array:
    h = conv(silu(group_norm(x, weights["norm1"], groups)), weights["conv1"])
    h = conv(silu(group_norm(h, weights["norm2"], groups)), weights["conv2"])
    if "conv_shortcut" in weights:
        x = conv(x, weights["conv_shortcut"], padding=0)
    return x + h


def attention(x: mx.array, weights: dict, groups: int) -> mx.array:
    """Single-head self-attention over all pixels."""
    B, h, w, C = x.shape
    y = group_norm(x, weights["group_norm"], groups).reshape(B, 1, h * w, C)
    q, k, v = (linear(y, weights[name]) for name in ("to_q", "to_k", "to_v"))
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=C**-0.5)
    return x + linear(y, weights["to_out"][0]).reshape(B, h, w, C)


def mid_block(x: mx.array, weights: dict, groups: int) -> mx.array:
    x = resnet(x, weights["resnets"][0], groups)
    x = attention(x, weights["attentions"][0], groups)
    return resnet(x, weights["resnets"][1], groups)


def downsample(x: mx.array, weights: dict) -> mx.array:
    # The original pads right and bottom only; symmetric padding would shift the picture by half a pixel.
    x = mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
    return conv(x, weights["conv"], stride=2, padding=0)


def upsample(x: mx.array, weights: dict) -> mx.array:
    return conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2), weights["conv"])


def encoder(x: mx.array, weights: dict, groups: int) -> mx.array:
    """Pixels (B, H, W, 3) in [-1, 1] to mean and log variance (B, H/8, W/8, 2 * 16)."""
    x = conv(x, weights["conv_in"])
    for level in weights["down_blocks"]:
        for weights_i in level["resnets"]:
            x = resnet(x, weights_i, groups)
        if "downsamplers" in level:
            x = downsample(x, level["downsamplers"][0])
    x = mid_block(x, weights["mid_block"], groups)
    return conv(silu(group_norm(x, weights["conv_norm_out"], groups)), weights["conv_out"])


def decoder(z: mx.array, weights: dict, groups: int) -> mx.array:
    """Unscaled latents (B, h, w, 16) to pixels (B, 8h, 8w, 3), nominally in [-1, 1]."""
    x = mid_block(conv(z, weights["conv_in"]), weights["mid_block"], groups)
    for level in weights["up_blocks"]:
        for weights_i in level["resnets"]:
            x = resnet(x, weights_i, groups)
        if "upsamplers" in level:
            x = upsample(x, level["upsamplers"][0])
    return conv(silu(group_norm(x, weights["conv_norm_out"], groups)), weights["conv_out"])


class VAE:
    """The autoencoder over a source of weights (`mlx_zimage.weights.Source`), which also says what it computes in."""

    def __init__(self, config: VAEConfig, source):
        self.config = config
        self.source = source

    def decode(self, latents: mx.array) -> mx.array:
        """Latents (B, h, w, 16), as the transformer sees them, to pixels (B, 8h, 8w, 3) float32, about [-1, 1]."""
        z = latents.astype(mx.float32) / self.config.scaling_factor + self.config.shift_factor
        x = decoder(z.astype(self.source.dtype), self.source.tree("decoder"), self.config.norm_num_groups)
        return x.astype(mx.float32)

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels (B, H, W, 3) in [-1, 1] to the mean latents (B, H/8, W/8, 16) float32 that the transformer sees."""
        mean, _ = self.encode_moments(pixels)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def encode_moments(self, pixels: mx.array) -> tuple[mx.array, mx.array]:
        """Mean and log variance (clipped to [-30, 20]) of the unscaled latents, each (B, H/8, W/8, 16), float32."""
        x = encoder(pixels.astype(self.source.dtype), self.source.tree("encoder"), self.config.norm_num_groups)
        mean, log_variance = mx.split(x.astype(mx.float32), 2, axis=-1)
        return mean, mx.clip(log_variance, -30.0, 20.0)
