"""The networks of Z-Image, one file each, as pure functions over trees of weights.

A tree has the checkpoint's own names (`weights["attention"]["to_q"]["weight"]`), so a diffusers
folder loads as it is, a streamed block and a resident one take the same path, and a quantized
linear layer is simply one that has `scales` beside its `weight`.
"""

from .runner import NetworkConfig
from .text_encoder import TextEncoderConfig
from .transformer import TransformerConfig
from .vae import VAEConfig

# The folders of a model, each with the dataclass of its config.json.
NETWORKS: dict[str, type[NetworkConfig]] = {
    "transformer": TransformerConfig,
    "text_encoder": TextEncoderConfig,
    "vae": VAEConfig,
}
OPTIONAL: frozenset[str] = frozenset()  # those that a model may lack
