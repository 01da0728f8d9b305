"""Z-Image with a ControlNet, as VideoX-Fun trains it, in plain torch: one image, one caption, no class of any library.

Follows videox_fun/models/z_image_transformer2d_control.py step by step on dicts of tensors, in float32.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import layer_norm, linear, pad, silu

Weights = dict[str, torch.Tensor]


def forward(w: Weights, config: dict, c: Weights, control_config: dict, x, cap, control, time: float, scale: float):
    """Data minus noise (16, h, w) for latents x (16, h, w), a caption (n, features) and a control (channels, h, w)."""
    _, h, width = x.shape
    temb = time_embedding(w, time * config["t_scale"])
    image = padded(linear(patches(x), w["all_x_embedder.2-1.weight"], w["all_x_embedder.2-1.bias"]), w["x_pad_token"])
    embedder = "control_all_x_embedder.2-1"
    k = padded(linear(patches(control), c[f"{embedder}.weight"], c[f"{embedder}.bias"]), w["x_pad_token"])
    caption = rms(cap, w["cap_embedder.0.weight"])
    caption = padded(linear(caption, w["cap_embedder.1.weight"], w["cap_embedder.1.bias"]), w["cap_pad_token"])
    at_image, at_caption = angles(config, *positions(len(caption), h // 2, width // 2, len(image)))
    at_all = torch.cat([at_image, at_caption])

    def own(name: str, x, at, modulated: bool = True):
        return block(w, name, x, at, config["n_heads"], temb if modulated else None)

    def chain(name: str, count: int, k, x, at):
        """The hints of a chain of control blocks, and its last block's output."""
        hints = []
        for i in range(count):
            if i == 0:
                k = linear(k, c[f"{name}.0.before_proj.weight"], c[f"{name}.0.before_proj.bias"]) + x
            k = block(c, f"{name}.{i}", k, at, config["n_heads"], temb)
            hints.append(linear(k, c[f"{name}.{i}.after_proj.weight"], c[f"{name}.{i}.after_proj.bias"]))
        return hints, k

    mode, places = control_config["add_control_noise_refiner"], control_config["control_layers_places"]
    hints: list[torch.Tensor] = []
    if mode == "control_layers":
        hints, k = chain("control_layers", len(places), k, image, at_image)
    elif mode == "control_noise_refiner":
        hints, k = chain("control_noise_refiner", config["n_refiner_layers"], k, image, at_image)
    else:
        for i in range(config["n_refiner_layers"]):
            k = block(c, f"control_noise_refiner.{i}", k, at_image, config["n_heads"], temb)
    for i in range(config["n_refiner_layers"]):
        image = own(f"noise_refiner.{i}", image, at_image)
        if mode and i in control_config["control_refiner_layers_places"]:
            image = image + scale * hints[control_config["control_refiner_layers_places"].index(i)]
    for i in range(config["n_refiner_layers"]):
        caption = own(f"context_refiner.{i}", caption, at_caption, modulated=False)
    unified = torch.cat([image, caption])
    hints, _ = chain("control_layers", len(places), torch.cat([k, caption]), unified, at_all)
    for i in range(config["n_layers"]):
        unified = own(f"layers.{i}", unified, at_all)
        if i in places:
            unified = unified + scale * hints[places.index(i)]
    final = "all_final_layer.2-1"
    factor = 1 + linear(silu(temb), w[f"{final}.adaLN_modulation.1.weight"], w[f"{final}.adaLN_modulation.1.bias"])
    out = layer_norm(unified, unified.shape[-1:], eps=1e-6) * factor
    out = linear(out, w[f"{final}.linear.weight"], w[f"{final}.linear.bias"])[: h // 2 * (width // 2)]
    return out.reshape(h // 2, width // 2, 2, 2, 16).permute(4, 0, 2, 1, 3).reshape(16, h, width)


def block(w: Weights, name: str, x, at, heads: int, temb=None):
    w = {key.removeprefix(f"{name}."): value for key, value in w.items() if key.startswith(f"{name}.")}
    scale_a = gate_a = scale_f = gate_f = torch.ones(())
    if temb is not None:
        modulation = linear(temb, w["adaLN_modulation.0.weight"], w["adaLN_modulation.0.bias"])
        scale_a, gate_a, scale_f, gate_f = modulation.chunk(4)
        scale_a, gate_a, scale_f, gate_f = 1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()
    y = attention(w, rms(x, w["attention_norm1.weight"]) * scale_a, at, heads)
    x = x + gate_a * rms(y, w["attention_norm2.weight"])
    y = rms(x, w["ffn_norm1.weight"]) * scale_f
    y = silu(linear(y, w["feed_forward.w1.weight"])) * linear(y, w["feed_forward.w3.weight"])
    return x + gate_f * rms(linear(y, w["feed_forward.w2.weight"]), w["ffn_norm2.weight"])


def attention(w: Weights, x, at, heads: int):
    def split(name: str):
        return linear(x, w[f"attention.to_{name}.weight"]).reshape(len(x), heads, -1)

    q, k = (turn(rms(split(name), w[f"attention.norm_{name}.weight"]), at) for name in "qk")
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), split("v"))
    return linear(out.reshape(len(x), -1), w["attention.to_out.0.weight"])


def turn(x, at):
    """Adjacent features of x (L, heads, d) as complex numbers, turned by angles (L, d / 2)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(at), at)[:, None]).flatten(-2)


def positions(caption: int, rows: int, columns: int, image: int):
    grid = torch.cartesian_prod(torch.tensor([caption + 1]), torch.arange(rows), torch.arange(columns)).reshape(-1, 3)
    numbers = torch.stack([torch.arange(1, caption + 1), torch.zeros(caption), torch.zeros(caption)], dim=-1)
    return pad(grid, (0, 0, 0, image - len(grid))), numbers


def angles(config: dict, *places):
    def of(place):
        parts = []
        for axis, dim in enumerate(config["axes_dims"]):
            frequencies = 1 / config["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            parts.append(place[:, axis, None].double() * frequencies)
        return torch.cat(parts, dim=-1).float()

    return map(of, places)


def time_embedding(w: Weights, t: float):
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    e = torch.cat([torch.cos(t * frequencies), torch.sin(t * frequencies)])
    e = silu(linear(e, w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"]))
    return linear(e, w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"])


def patches(x):
    C, h, w = x.shape
    return x.reshape(C, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).reshape(-1, 4 * C)


def padded(x, token):
    return torch.cat([x, token.expand(-len(x) % 32, -1)])


def rms(x, weight):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * weight
