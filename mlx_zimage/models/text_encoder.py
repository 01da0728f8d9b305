"""The Qwen3 text encoder: token ids to the hidden states that Z-Image was trained on.

Source: transformers models/qwen3/modeling_qwen3.py. Z-Image uses `hidden_states[-2]`, the output of the
second-to-last layer without the final norm, so the last layer and `model.norm` are never read.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..config import read_config
from ..errors import CheckpointError
from .layers import Product, linear, margin, result, rms_norm, scaled, silu, sum_dtype
from .runner import NetworkConfig, Runner, Tree


@dataclass(frozen=True)
class TextEncoderConfig(NetworkConfig):
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    vocab_size: int = 151936

    @classmethod
    def from_dict(cls, config: dict) -> TextEncoderConfig:
        """Read text_encoder/config.json as written by transformers 4 or 5; refuse what is not implemented."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"text encoder config: rope_parameters must be an object, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        flat = {**config, "rope_type": kind, **{key: rope[key] for key in rope.keys() & {"rope_theta"}}}
        fixed = {
            "attention_bias": False,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_type": "default",
        }
        read = read_config(cls, flat, "text encoder", fixed)
        if read.num_attention_heads % read.num_key_value_heads or read.num_hidden_layers < 2:
            raise CheckpointError(
                f"text encoder config: expected num_attention_heads to be a multiple of num_key_value_heads, and "
                f"num_hidden_layers to be at least 2, got {read.num_attention_heads}, {read.num_key_value_heads} and "
                f"{read.num_hidden_layers}"
            )
        if read.head_dim % 2:
            raise CheckpointError(f"text encoder config: head_dim must be even, got {read.head_dim}")
        return read

    @property
    def used_layers(self) -> int:
        return self.num_hidden_layers - 1

    @property
    def blocks(self) -> list[str]:
        """Names of the layers in the order they run; the last one never runs."""
        return [f"model.layers.{i}" for i in range(self.used_layers)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, as transformers stores it."""
        d, head = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * head, self.num_key_value_heads * head
        shapes = {"model.embed_tokens.weight": (self.vocab_size, d), "model.norm.weight": (d,)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}"
            shapes |= {
                f"{layer}.input_layernorm.weight": (d,),
                f"{layer}.post_attention_layernorm.weight": (d,),
                f"{layer}.self_attn.q_proj.weight": (q, d),
                f"{layer}.self_attn.k_proj.weight": (kv, d),
                f"{layer}.self_attn.v_proj.weight": (kv, d),
                f"{layer}.self_attn.o_proj.weight": (d, q),
                f"{layer}.self_attn.q_norm.weight": (head,),
                f"{layer}.self_attn.k_norm.weight": (head,),
                f"{layer}.mlp.gate_proj.weight": (self.intermediate_size, d),
                f"{layer}.mlp.up_proj.weight": (self.intermediate_size, d),
                f"{layer}.mlp.down_proj.weight": (d, self.intermediate_size),
            }
        return shapes

    def spare(self) -> dict[str, tuple[int, ...]]:
        return {"lm_head.weight": (self.vocab_size, self.hidden_size)}

    def sanitize(self, name: str, array: mx.array) -> mx.array:
        """The tensor itself: stored and computed in the same layout."""
        return array

    @property
    def read_once(self) -> str:
        return ""

    def stays(self, name: str) -> bool:
        return False  # outside the layers there is only the embedding, and only single rows of it are read

    def named(self, name: str) -> str:
        # saving transformers' Qwen3Model instead of Qwen3ForCausalLM drops the prefix
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"

    def unused(self, name: str) -> bool:
        """Whether a tensor cannot affect hidden_states[-2], and may be missing."""
        last = f"model.layers.{self.num_hidden_layers - 1}."
        return name in ("model.norm.weight", "lm_head.weight") or name.startswith(last)


def attention(x: mx.array, weights: Tree, config: TextEncoderConfig, product: Product = linear) -> mx.array:
    """Causal grouped-query attention on x (1, L, hidden) with RMS-normed, rotated queries and keys."""
    B, L, _ = x.shape

    def heads(name: str) -> mx.array:
        return product(x, weights[f"{name}_proj"]).reshape(B, L, -1, config.head_dim)

    def rotated(name: str) -> mx.array:
        y = rms_norm(heads(name), weights[f"{name}_norm"], config.rms_norm_eps).transpose(0, 2, 1, 3)
        return mx.fast.rope(y, config.head_dim, traditional=False, base=config.rope_theta, scale=1.0, offset=0)

    q, k, v = rotated("q"), rotated("k"), heads("v").transpose(0, 2, 1, 3)
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=config.head_dim**-0.5, mask="causal")
    return product(out.transpose(0, 2, 1, 3).reshape(B, L, -1), weights["o_proj"])


def mlp(x: mx.array, weights: Tree, factor: float = 1.0, product: Product = linear) -> mx.array:
    """SwiGLU; the `up` half is multiplied by `factor` before the two halves are multiplied."""
    gate = product(x, weights["gate_proj"])
    return product(silu(gate) * scaled(product(x, weights["up_proj"]), factor), weights["down_proj"])


def layer(
    x: mx.array, weights: Tree, config: TextEncoderConfig, factor: float = 1.0, product: Product = linear
) -> mx.array:
    """One layer on x (1, L, hidden); products in the feed-forward are scaled by `factor`."""
    h = rms_norm(x, weights["input_layernorm"], config.rms_norm_eps)
    x = x + attention(h, weights["self_attn"], config, product)
    h = rms_norm(x, weights["post_attention_layernorm"], config.rms_norm_eps)
    # undo the factor in x's dtype, whose range is large enough
    return x + scaled(mlp(h, weights["mlp"], factor, product).astype(x.dtype), 1 / factor)


@dataclass(frozen=True)
class Hidden:
    """Hidden states x (1, L, hidden) on their way through the layers."""

    x: mx.array

    @property
    def arrays(self) -> tuple[mx.array]:
        return (self.x,)


class TextEncoder:
    """The network, with its weights and compute dtype from a `Runner`.

    product multiplies by the layers' matrices. Two attributes may be set between calls: lean frees memory after each
    layer, which costs a few milliseconds per prompt, with the same numbers; factor is a power of two that keeps
    products in float16's range (see `mlx_zimage.headroom`).
    """

    def __init__(self, config: TextEncoderConfig, runner: Runner, product: Product = linear):
        self.config = config
        self.runner = runner
        self.product = product
        self.lean = False
        self.factor = margin(runner.dtype)

    def __call__(self, ids: Sequence[int]) -> mx.array:
        """hidden_states[-2] of one prompt's ids (L,): (L, hidden_size), in the compute dtype, or float32 for float16.

        Padding is left out: under causal attention, padding on the right cannot change the tokens before it. Only the
        prompt's rows of the embedding (0.8 GB in the full model) are read.
        """
        return result(self.steps(ids))

    def steps(self, ids: Sequence[int]) -> Generator[int, None, mx.array]:
        """The same, yielding the number of layers done after each one."""
        x = self.runner.rows("model.embed_tokens.weight", ids)[None].astype(sum_dtype(self.runner.dtype))
        (hidden,) = yield from self.runner.walk(self.config.blocks, [Hidden(x)], self._apply, wait=self.lean)
        return hidden.x[0]

    def _apply(self, hidden: Hidden, weights: Tree, i: int) -> Hidden:
        return Hidden(layer(hidden.x, weights, self.config, self.factor, self.product))
