"""The ControlNet of a pipeline: loading it, and what it reads in a request.

    pipe.load_controlnet("Z-Image-Turbo-Fun-Controlnet-Union-2.1-lite-2602-8steps.safetensors")
    pipe("a lighthouse", control_image="outline.png", controlnet_conditioning_scale=0.9)
    pipe.unload_controlnet()

A pipeline has one at a time; a request may use several control images with it, whose effects add up.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .detectors import LIBRARIES, check_library, detected
from .errors import RequestError
from .images.codec import to_signed
from .images.controls import prepared
from .inputs import NONE, Inputs
from .models.controlnet import MASKED, Controlled, ControlNet, control_latents
from .networks import CONTROLNET_PREFIX, Phase
from .request import LATENT_PIXELS, GenerateRequest
from .weights.controlnets import ControlNetFile, open_controlnet

if TYPE_CHECKING:
    from .networks import Networks
    from .turns import Turns
    from .variants import Variant


class ControlNetMethods:
    """A pipeline's methods for its ControlNet."""

    networks: Networks
    turns: Turns
    controlnet: ControlNetFile | None

    if TYPE_CHECKING:

        @property
        def variant(self) -> Variant: ...

    def load_controlnet(self, source: str | Path, kind: str | None = None) -> ControlNetFile:
        """Load a ControlNet Union for Z-Image, for requests that have control images; it replaces any loaded before.

        source is a safetensors file as published, a folder as diffusers or `convert` writes it, a Hugging Face id, or
        id:file. kind says what it was trained for, if its name does not: "plain", or some of "8-steps", "tile" and
        "base" separated by commas. Only defaults and warnings depend on it. Raises CheckpointError unless it fits the
        model; its weights are read when first used.
        """
        opened = open_controlnet(source, kind, self.networks.transformer.config)
        with self.turns.computing():
            self.networks.set_controlnet(opened.component)
        self.controlnet = opened
        return opened

    def unload_controlnet(self) -> None:
        """Unload the ControlNet, and free its memory."""
        with self.turns.computing():
            self.networks.set_controlnet(None)
        self.controlnet = None

    def _steps_for_controls(self, request: GenerateRequest) -> GenerateRequest:
        """The request with the steps that its ControlNet needs, if it has none and the model's own would not do."""
        if request.steps is not None or self.controlnet is None:
            return request
        return replace(request, steps=None if self.variant.takes_guidance else self.controlnet.steps)

    def _with_controlnet(self, request: GenerateRequest, inputs: Inputs) -> GenerateRequest:
        """The request with the ControlNet's scale where a control has None, and its fingerprint; checked."""
        opened = self.controlnet
        if opened is None:
            raise RequestError(
                "the request has controls, but no ControlNet is loaded; load_controlnet loads one "
                "(--control-model on the command line)"
            )
        scaled = [replace(use, scale=opened.scale) if use.scale is None else use for use in request.controls]
        request = replace(request, controls=tuple(use for use in scaled if use.scale))
        if request.controlnet not in (None, opened.fingerprint):
            raise RequestError(
                f"the request expects the ControlNet with fingerprint {request.controlnet}, but {opened.name} has "
                f"{opened.fingerprint}; load the one that the request expects"
            )
        request = replace(request, controlnet=opened.fingerprint if request.controls else None)
        for part in request.parts:
            part.check_controls()
        if any(use.image is None for use in request.controls) and not opened.component.config.has_mask:
            raise RequestError(
                f"a control without an image needs a ControlNet that reads a mask ({MASKED} channels), but "
                f"{opened.name} reads {opened.component.config.control_in_dim}; give a control image"
            )
        for use in request.controls:
            check_library(use.prepare)
        if inputs is not NONE:
            inputs.check_controls(request.control_images, *request.extent[:2])
        return request

    def _shown(self, part: GenerateRequest, inputs: Inputs) -> list[np.ndarray | None]:
        """The control images of a part of a request, after their preparation: (height, width, 3) uint8."""
        found: list[np.ndarray | None] = []
        for use in part.controls:
            image = None if use.image is None else inputs.control(use.image, *part.extent[:2])
            if image is not None:
                image = detected(image, use.prepare) if use.prepare in LIBRARIES else prepared(image, use.prepare)
            found.append(image)
        return found

    def _controls(
        self,
        part: GenerateRequest,
        shown: list[np.ndarray | None],
        pixels: np.ndarray | None,
        mask: np.ndarray | None,
        steps: int,
    ) -> Generator[Phase, None, list[Controlled]]:
        """What the ControlNet is shown in a part of a request that starts from these pixels, if any, and runs this many
        steps.

        shown are its control images.
        """
        assert self.controlnet is not None  # checked in `complete`
        config, encode = self.controlnet.component.config, self.networks.encode_image
        kept = outside = None
        if config.has_mask and pixels is not None and mask is not None:
            hidden = mask >= 0.5
            kept = mx.array((~hidden)[::LATENT_PIXELS, ::LATENT_PIXELS].astype(np.float32))[None, :, :, None]
            signed = np.array(to_signed(pixels))
            outside = yield from encode(mx.array(np.where(hidden[..., None], np.float32(0), signed))[None])
        found, net = [], ControlNet(config, CONTROLNET_PREFIX)
        for use, given in zip(part.controls, shown, strict=True):
            image = None
            if given is not None:
                image = yield from encode(to_signed(given)[None])
            latents = control_latents(config.control_in_dim, image, kept, outside)
            mx.eval(latents)  # the next event may be requested from another thread
            found.append(Controlled(net, latents, use.scales(steps)))
        return found
