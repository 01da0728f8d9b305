"""The networks of Z-Image, one file each, as pure functions over trees of weights.

A tree uses the checkpoint's own names (`weights["attention"]["to_q"]["weight"]`), so a diffusers
folder loads without conversion, streamed and resident blocks take the same code path, and a quantized
linear layer is simply one with `scales` next to its `weight`.
"""

from .controlnet import ControlNetConfig
from .runner import NetworkConfig
from .text_encoder import TextEncoderConfig
from .transformer import TransformerConfig
from .vae import VAEConfig

# A model's folders, each with the dataclass for its config.json.
NETWORKS: dict[str, type[NetworkConfig]] = {
    "transformer": TransformerConfig,
    "text_encoder": TextEncoderConfig,
    "vae": VAEConfig,
}
CONTROLNET = "controlnet"  # a network that a model does not contain: it is loaded beside one
ALL_NETWORKS: dict[str, type[NetworkConfig]] = {**NETWORKS, CONTROLNET: ControlNetConfig}
