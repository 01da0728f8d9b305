"""The pocket model's sizes, and forward passes for training that batch prompts of one length.

The modules are diffusers' and transformers' own, so that what is trained is what is exported;
only the forward passes are written again (`test_pocket.py` compares them): diffusers' handles one
prompt at a time, and a training step needs a thousand of one shape.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

# Deliberately as in the real model: fewer key heads than query heads, heads wider in total than the hidden size,
# hidden_states[-2] (the last layer and norm are never used), attended pads. Every width that meets a quantized matrix
# is a multiple of 64.
TEXT_ENCODER = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TRANSFORMER = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 192,
    "n_layers": 4,
    "n_refiner_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 6,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 128,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [8, 12, 12],
    "axes_lens": [1024, 512, 512],
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 48, 64, 64),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 128,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
SCALING, SHIFT = VAE["scaling_factor"], VAE["shift_factor"]
LATENT_CHANNELS = VAE["latent_channels"]
PAD_TO = 32  # captions and images are padded to a multiple of this many tokens
STEPS, SCHEDULE_SHIFT = 8, 3.0


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(**VAE)


def build_text_encoder() -> Qwen3Model:
    config = Qwen3Config(
        **TEXT_ENCODER,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        use_cache=False,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )
    encoder = Qwen3Model(config)
    for name, weight in encoder.named_parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.1) if "embed" in name else nn.init.xavier_uniform_(weight)
    return encoder


def build_transformer() -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(**TRANSFORMER)
    for name, weight in transformer.named_parameters():
        if "pad_token" in name:
            nn.init.normal_(weight, std=0.02)
        elif name.endswith("bias") or "adaLN" in name:
            nn.init.zeros_(weight)
        elif name.startswith("t_embedder"):
            nn.init.normal_(weight, std=0.02)
        elif weight.ndim == 2:
            nn.init.xavier_uniform_(weight)
    width = transformer.dim
    for block in [*transformer.layers, *transformer.noise_refiner]:
        bias = block.adaLN_modulation[0].bias.data  # scale, gate, scale, gate: start with open gates
        bias[width : 2 * width] = 0.3
        bias[3 * width :] = 0.3
    nn.init.zeros_(transformer.all_final_layer["2-1"].linear.weight)
    return transformer


# ---------------------------------------------------------------- blocks
def rms_norm(x: Tensor, norm: nn.Module, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * norm.weight).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transformer's rotary embedding: neighbours (2m, 2m + 1) are rotated together."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The text encoder's: the first half of a head is rotated with the second."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def attention(layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, L, _ = x.shape
    q, k, v = (proj(x).view(B, L, layer.heads, -1) for proj in (layer.to_q, layer.to_k, layer.to_v))
    q = rotate_pairs(rms_norm(q, layer.norm_q, 1e-5), cos, sin)
    k = rotate_pairs(rms_norm(k, layer.norm_k, 1e-5), cos, sin)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return layer.to_out[0](out.transpose(1, 2).reshape(B, L, -1))


def feed_forward(layer, x: Tensor) -> Tensor:
    return layer.w2(F.silu(layer.w1(x)) * layer.w3(x))


def modulated_block(block, x: Tensor, temb: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    scale_a, gate_a, scale_f, gate_f = block.adaLN_modulation[0](temb).unsqueeze(1).chunk(4, dim=2)
    y = attention(block.attention, rms_norm(x, block.attention_norm1, 1e-5) * (1 + scale_a), cos, sin)
    x = x + gate_a.tanh() * rms_norm(y, block.attention_norm2, 1e-5)
    y = feed_forward(block.feed_forward, rms_norm(x, block.ffn_norm1, 1e-5) * (1 + scale_f))
    return x + gate_f.tanh() * rms_norm(y, block.ffn_norm2, 1e-5)


def caption_block(block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = attention(block.attention, rms_norm(x, block.attention_norm1, 1e-5), cos, sin)
    x = x + rms_norm(y, block.attention_norm2, 1e-5)
    y = feed_forward(block.feed_forward, rms_norm(x, block.ffn_norm1, 1e-5))
    return x + rms_norm(y, block.ffn_norm2, 1e-5)


def text_layer(layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, L, _ = x.shape
    size = TEXT_ENCODER["head_dim"]
    heads = layer.self_attn
    y = rms_norm(x, layer.input_layernorm, 1e-6)
    q, k, v = (proj(y).view(B, L, -1, size) for proj in (heads.q_proj, heads.k_proj, heads.v_proj))
    q = rotate_halves(rms_norm(q, heads.q_norm, 1e-6).transpose(1, 2), cos, sin)
    k = rotate_halves(rms_norm(k, heads.k_norm, 1e-6).transpose(1, 2), cos, sin)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.transpose(1, 2).repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + heads.o_proj(out.transpose(1, 2).reshape(B, L, -1))
    y = rms_norm(x, layer.post_attention_layernorm, 1e-6)
    return x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))


class Blocks:
    """The three kinds of block, as they are or compiled (one graph for each kind and shape)."""

    def __init__(self, compiled: bool = False):
        def prepare(function):
            return torch.compile(function, dynamic=False) if compiled else function

        self.modulated, self.caption, self.text = map(prepare, (modulated_block, caption_block, text_layer))
        if compiled:
            torch._dynamo.config.recompile_limit = 256


EAGER = Blocks()


# ---------------------------------------------------------------- models
@lru_cache(maxsize=64)
def image_angles(caption_length: int, rows: int, columns: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cos and sin of the image's tokens (with its pads), then of the caption's: each (L, 1, 16)."""
    image = rows * columns
    positions = torch.zeros(image + -image % PAD_TO + caption_length, 3, dtype=torch.float64)
    positions[:image, 0] = caption_length + 1
    positions[:image, 1] = torch.arange(rows).repeat_interleave(columns)
    positions[:image, 2] = torch.arange(columns).repeat(rows)
    positions[-caption_length:, 0] = torch.arange(1, caption_length + 1)  # image pads stay at 0, 0, 0
    angles = torch.cat(
        [
            positions[:, axis, None]
            / TRANSFORMER["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
            for axis, size in enumerate(TRANSFORMER["axes_dims"])
        ],
        -1,
    )[:, None].float()
    # clones, so that every table starts at a fresh address and compiled blocks see one layout
    tables = [
        f(part).clone().to(device)
        for part in angles.split([len(angles) - caption_length, caption_length])
        for f in (torch.cos, torch.sin)
    ]
    return tuple(tables)


@lru_cache(maxsize=8)
def text_angles(length: int, device: str) -> tuple[Tensor, Tensor]:
    size = TEXT_ENCODER["head_dim"]
    angles = torch.arange(length)[:, None] / 1e6 ** (torch.arange(0, size, 2) / size)
    return angles.cos().to(device), angles.sin().to(device)


def encode_text(encoder, tokens: Tensor, blocks: Blocks = EAGER) -> Tensor:
    """hidden_states[-2] of right-padded tokens (B, L): (B, L, 128). Causal, so pads don't matter."""
    # a matrix product rather than a look-up: its backward pass can be recorded in a CUDA graph
    vocabulary = torch.arange(TEXT_ENCODER["vocab_size"], device=tokens.device)
    x = (tokens[..., None] == vocabulary).to(encoder.embed_tokens.weight.dtype) @ encoder.embed_tokens.weight
    cos, sin = text_angles(tokens.shape[1], str(tokens.device))
    for layer in encoder.layers[:-1]:
        x = blocks.text(layer, x, cos, sin)
    return x


def time_features(t: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
    angles = TRANSFORMER["t_scale"] * t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def predict(
    transformer, latents: Tensor, t: Tensor, features: Tensor, lengths: Tensor, blocks: Blocks = EAGER
) -> Tensor:
    """Data minus noise, for latents (B, 16, H, W) at t (B,) = 1 - sigma.

    features (B, L, 128) with L a multiple of 32, of which the first lengths (B,) are real.
    """
    B, C, H, W = latents.shape
    rows, columns, L = H // 2, W // 2, features.shape[1]
    image = rows * columns
    cos, sin, caption_cos, caption_sin = image_angles(L, rows, columns, str(latents.device))
    temb = transformer.t_embedder.mlp(time_features(t))
    x = latents.view(B, C, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1).reshape(B, image, 4 * C)
    x = transformer.all_x_embedder["2-1"](x)
    if pads := -image % PAD_TO:
        x = torch.cat([x, transformer.x_pad_token.to(x.dtype).expand(B, pads, -1)], 1)
    for block in transformer.noise_refiner:
        x = blocks.modulated(block, x, temb, cos, sin)
    norm, project = transformer.cap_embedder
    caption = project(rms_norm(features, norm, 1e-5))
    is_pad = torch.arange(L, device=latents.device) >= lengths[:, None]
    caption = torch.where(is_pad[..., None], transformer.cap_pad_token.to(caption.dtype), caption)
    for block in transformer.context_refiner:
        caption = blocks.caption(block, caption, caption_cos, caption_sin)
    x = torch.cat([x, caption], 1)
    cos, sin = torch.cat([cos, caption_cos]), torch.cat([sin, caption_sin])
    for block in transformer.layers:
        x = blocks.modulated(block, x, temb, cos, sin)
    final = transformer.all_final_layer["2-1"]
    scale = final.adaLN_modulation[1](F.silu(temb)).unsqueeze(1)
    x = final.linear(F.layer_norm(x[:, :image], (transformer.dim,), eps=1e-6) * (1 + scale))
    return x.view(B, rows, columns, 2, 2, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)


# ---------------------------------------------------------------- sampling
def sigmas(steps: int) -> Tensor:
    """The official schedule: steps + 1 noise levels from 1 to 0."""
    u = torch.linspace(1.0, 1.0 / steps, steps)
    return torch.cat([SCHEDULE_SHIFT * u / (1 + (SCHEDULE_SHIFT - 1) * u), torch.zeros(1)])


def sample(
    encoder,
    transformer,
    noise: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    steps: int = STEPS,
    guidance: float = 0.0,
    empty: tuple[Tensor, Tensor] | None = None,
    blocks: Blocks = EAGER,
) -> Tensor:
    """Latents (B, 16, H, W) by Euler steps from noise of that shape.

    guidance is diffusers': prediction + guidance * (prediction - that of the empty prompt),
    whose tokens (B, L) and lengths (B,) are `empty`.
    """
    features = encode_text(encoder, tokens, blocks)
    if guidance:
        empty_features = encode_text(encoder, empty[0], blocks)
    x = noise.float()
    levels = sigmas(steps).tolist()
    for sigma, following in itertools.pairwise(levels):
        t = torch.full_like(lengths, 1 - sigma, dtype=torch.float32)
        out = predict(transformer, x, t, features, lengths, blocks).detach().float()
        if guidance:
            away = predict(transformer, x, t, empty_features, empty[1], blocks).detach().float()
            out = out + guidance * (out - away)
        x = x + (sigma - following) * out
    return x
