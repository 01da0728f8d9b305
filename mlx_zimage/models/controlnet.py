"""ControlNet Union for Z-Image: blocks that read a control image, such as an outline or a pose, beside the transformer.

Source: models/z_image_transformer2d_control.py of VideoX-Fun, the project that trained them. The blocks and the layer
that embeds the control image are the ControlNet's own; everything else, from the time embedding to the padding, is the
transformer's. The chain of `control_layers` starts from the control image's tokens and the transformer's, and what each
block adds reaches the transformer as it runs. From version 2.0 on, a chain runs in the noise refiner, too: the image
tokens that it changes are those that the layers and their chain continue with. (diffusers discards them and refines
once more without it, so its images differ; version 1 has no such chain.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config import read_config
from ..errors import CheckpointError
from .runner import NetworkConfig
from .transformer import PATCH, Chain, Control, block_shapes, linear_shapes, modulation_shapes, turned

EMBEDDER = "control_all_x_embedder.2-1"
LAYERS, REFINER = "control_layers", "control_noise_refiner"
MASKED = 33  # channels of the kinds that also read a mask (1) and the image outside it (16)
PUBLISHED_LAYERS = 30  # of the transformer that the published files are for


@dataclass(frozen=True)
class ControlNetConfig(NetworkConfig):
    """control_layers_places are the transformer's layers that get a hint, one per block; likewise for the refiner.

    add_control_noise_refiner names the blocks that run in the noise refiner: its own (version 2.1), "control_layers"
    once more (2.0), or none (version 1, whose control_noise_refiner refines the control image alone).
    """

    dim: int = 3840
    n_heads: int = 30
    n_refiner_layers: int = 2
    control_in_dim: int = 16
    norm_eps: float = 1e-5
    control_layers_places: tuple[int, ...] = ()
    control_refiner_layers_places: tuple[int, ...] = ()
    add_control_noise_refiner: str | None = None

    @classmethod
    def from_dict(cls, config: dict) -> ControlNetConfig:
        """Read config.json as diffusers writes it; refuse what this file does not implement."""
        fixed = {"all_patch_size": [PATCH], "all_f_patch_size": [1], "qk_norm": True}
        sizes = read_config(_Sizes, config, "controlnet", fixed)
        mode = config.get("add_control_noise_refiner")
        if mode not in (None, LAYERS, REFINER):
            raise CheckpointError(
                f"controlnet config: add_control_noise_refiner must be {LAYERS}, {REFINER} or null, got {mode!r}"
            )
        places = _places(config, "control_layers_places")
        refined = _places(config, "control_refiner_layers_places") if mode else ()
        if mode and max(refined) >= sizes.n_refiner_layers:
            raise CheckpointError(
                f"controlnet config: control_refiner_layers_places must be below n_refiner_layers "
                f"({sizes.n_refiner_layers}), got {list(refined)}"
            )
        if sizes.dim % (2 * sizes.n_heads):
            raise CheckpointError(f"controlnet config: dim / n_heads must be even, got {sizes.dim} / {sizes.n_heads}")
        return cls(**vars(sizes), control_layers_places=places, control_refiner_layers_places=refined,
                   add_control_noise_refiner=mode)  # fmt: skip

    @property
    def has_mask(self) -> bool:
        """Whether it also reads what inpainting keeps."""
        return self.control_in_dim == MASKED

    @property
    def refining(self) -> list[str]:
        """Names of the blocks that it has for the noise refiner alone."""
        if self.add_control_noise_refiner == LAYERS:
            return []
        return [f"{REFINER}.{i}" for i in range(self.n_refiner_layers)]

    @property
    def layers(self) -> list[str]:
        return [f"{LAYERS}.{i}" for i in range(len(self.control_layers_places))]

    @property
    def blocks(self) -> list[str]:
        """Names of all blocks in the order they run."""
        return self.refining + self.layers

    @property
    def read_once(self) -> str:
        return "adaLN_modulation"  # for the whole schedule at once: see `transformer.modulate`

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, as published."""
        d = self.dim
        shapes = linear_shapes(EMBEDDER, d, PATCH * PATCH * self.control_in_dim)
        chained = [*self.layers, *(self.refining if self.add_control_noise_refiner else ())]
        for block in self.blocks:
            shapes |= block_shapes(block, d, self.n_heads) | modulation_shapes(block, d)
            if block in chained:
                shapes |= linear_shapes(f"{block}.after_proj", d, d)
                if block.endswith(".0"):
                    shapes |= linear_shapes(f"{block}.before_proj", d, d)
        return shapes

    def sanitize(self, name: str, array: mx.array) -> mx.array:
        """A tensor (or one part of a quantized one) in the layout used for computing: see `transformer.turned`."""
        return turned(name, array, self.dim // self.n_heads)


@dataclass(frozen=True)
class _Sizes:
    dim: int = ControlNetConfig.dim
    n_heads: int = ControlNetConfig.n_heads
    n_refiner_layers: int = ControlNetConfig.n_refiner_layers
    control_in_dim: int = ControlNetConfig.control_in_dim
    norm_eps: float = ControlNetConfig.norm_eps


def _places(config: dict, name: str) -> tuple[int, ...]:
    """Layer numbers in rising order. The first is 0, since the first block starts from the tokens that enter layer
    0."""
    places = config.get(name)
    if (
        not isinstance(places, (list, tuple))
        or not 0 < len(places) <= 1000
        or not all(type(place) is int for place in places)
        or list(places) != sorted({0, *places})
    ):
        raise CheckpointError(
            f"controlnet config: {name} must be increasing whole numbers, the first 0, got {places!r:.80}"
        )
    return tuple(places)


def config_of(shapes: Mapping[str, tuple[int, ...]], layers: int = PUBLISHED_LAYERS) -> dict[str, Any]:
    """The config.json of weights that come without one, from their names and shapes.

    The published files have 6, 15 or 3 blocks, evenly spread over the transformer's 30 layers. Whether the blocks for
    the noise refiner were trained (version 2.0 was published with zeros) can only be seen in the weights:
    `weights.controlnets.is_trained`.
    """
    try:
        dim, width = shapes[f"{EMBEDDER}.weight"]
        (head,) = shapes[f"{LAYERS}.0.attention.norm_q.weight"]
        heads = dim // head
    except (KeyError, ValueError, ZeroDivisionError):
        raise CheckpointError(f"expected {EMBEDDER}.weight and {LAYERS}.0 of a ControlNet for Z-Image") from None
    count, refining = _count(shapes, LAYERS), _count(shapes, REFINER)
    mode = REFINER if f"{REFINER}.0.after_proj.weight" in shapes else None if refining else LAYERS
    refiners = refining or 2
    return {
        "dim": dim,
        "n_heads": heads,
        "n_refiner_layers": refiners,
        "control_in_dim": width // PATCH**2,
        "control_layers_places": [i * max(1, layers // count) for i in range(count)],
        "control_refiner_layers_places": [*range(refiners)] if mode else None,
        "add_control_noise_refiner": mode,
    }


def _count(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")})


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet whose weights are under a prefix among those of a transformer's runner."""

    config: ControlNetConfig
    prefix: str = "controlnet"

    @property
    def embedder(self) -> str:
        return f"{self.prefix}.{EMBEDDER}"

    @property
    def blocks(self) -> list[str]:
        return [f"{self.prefix}.{block}" for block in self.config.blocks]

    def control(self, tokens: mx.array, modulation: mx.array, scale: float) -> Control:
        """Its part in a step, at a scale: tokens (1, L, dim) of its image, modulation (blocks, 4, dim) of `blocks`."""
        config, names = self.config, self.blocks
        own = len(config.refining)
        layers = Chain(tuple(names[own:]), config.control_layers_places, modulation[own:], scale)
        if config.add_control_noise_refiner == LAYERS:
            refiner = Chain(layers.blocks, config.control_refiner_layers_places, layers.modulation, scale)
        else:
            refiner = Chain(tuple(names[:own]), config.control_refiner_layers_places, modulation[:own], scale)
        return Control(tokens, refiner, layers)


@dataclass(frozen=True)
class Controlled:
    """A ControlNet with its control image as latents (1, h, w, channels), and its scale in each step: 0 is off."""

    net: ControlNet
    latents: mx.array
    scales: Sequence[float]

    @property
    def embedder(self) -> str:
        return self.net.embedder

    @property
    def blocks(self) -> list[str]:
        return self.net.blocks

    def control(self, tokens: mx.array, modulation: mx.array, i: int) -> Control | None:
        return self.net.control(tokens, modulation, self.scales[i]) if self.scales[i] else None


def control_latents(
    channels: int, image: mx.array | None, mask: mx.array | None = None, masked: mx.array | None = None
) -> mx.array:
    """What a ControlNet with this many channels reads: (1, h, w, channels).

    image is the control image's latents (1, h, w, 16). When inpainting, mask (1, h, w, 1) is 1 where the image is kept,
    and masked are the latents of the image without the rest; a kind of 33 channels reads both, and zeros otherwise. A
    control image that is missing is zeros, too.
    """
    given = next(x for x in (image, masked) if x is not None)
    zeros = mx.zeros_like(given)
    parts = [zeros if image is None else image]
    if channels == MASKED:
        parts += [zeros[..., :1] if mask is None else mask, zeros if masked is None else masked]
    return mx.concatenate(parts, axis=-1)
