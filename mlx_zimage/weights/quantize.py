"""Which layers are quantized, by the converter and in random weights."""

from __future__ import annotations

import re

from ..errors import RequestError
from ..quantization import Quantization

# The blocks' attention and feed-forward matrices hold 98% of the parameters. Everything else (padding, norms,
# embedders, adaLN, final layer, the whole VAE) is small or sensitive, and stays in high precision.
QUANTIZED = {
    "transformer": re.compile(
        r"(layers|noise_refiner|context_refiner)\.\d+\."
        r"(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])\.weight"
    ),
    "controlnet": re.compile(
        r"control_(layers|noise_refiner)\.\d+\."
        r"(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123]|(before|after)_proj)\.weight"
    ),
    "text_encoder": re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"),
}


def tensor_quantization(
    component: str, name: str, shape: tuple[int, ...], quantization: Quantization | None
) -> Quantization | None:
    """The quantization of one tensor, given its network's; None if it stays dense."""
    pattern = QUANTIZED.get(component)
    if quantization is None or pattern is None or not pattern.fullmatch(name):
        return None
    if shape[-1] % quantization.group_size:
        raise RequestError(
            f"{component} {name} is {shape[-1]} wide, which is not a multiple of the group size "
            f"{quantization.group_size}; choose a smaller group size"
        )
    return quantization
