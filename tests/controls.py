"""Tiny ControlNets of every published layout, and diffusers' order of running them, which only tests use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import tiny

from mlx_zimage.models.controlnet import Controlled, ControlNet, ControlNetConfig
from mlx_zimage.models.runner import Tree
from mlx_zimage.models.transformer import Caption, Chain, Control, Stream, Transformer
from mlx_zimage.weights.blocks import Blocks
from mlx_zimage.weights.controlnets import ControlNetFile, open_controlnet
from mlx_zimage.weights.joined import Joined

SIZES = {"dim": 48, "n_heads": 3, "n_kv_heads": 3, "n_refiner_layers": 2}
SIZES |= {"all_patch_size": [2], "all_f_patch_size": [1]}
CONFIGS = {
    "control_v1": SIZES | {"control_layers_places": [0, 2], "control_in_dim": 16, "add_control_noise_refiner": None},
    "control_v20": SIZES
    | {
        "control_layers_places": [0, 1, 2],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 33,
        "add_control_noise_refiner": "control_layers",
    },
    "control_v21": SIZES
    | {
        "control_layers_places": [0, 2],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 33,
        "add_control_noise_refiner": "control_noise_refiner",
    },
}
CONFIGS["control_lite"] = CONFIGS["control_v21"] | {"control_layers_places": [0]}
H, W, TOKENS, TIME, SCALE = 12, 10, 20, 0.4, 0.75  # of the recorded case


def weights(seed: int, tag: str) -> dict[str, np.ndarray]:
    shapes = ControlNetConfig.from_dict(CONFIGS[tag]).shapes()
    return {name: tiny.weight(seed, tag, name, shape) for name, shape in shapes.items()}


def write(folder: Path, seed: int, tag: str) -> Path:
    """A ControlNet's folder as diffusers saves it."""
    (folder / tag).parent.mkdir(parents=True, exist_ok=True)
    tiny.FILE_STEM["controlnet"] = "diffusion_pytorch_model"
    config = {"_class_name": "ZImageControlNetModel", **CONFIGS[tag]}
    tiny.save_component(folder / tag, "controlnet", weights(seed, tag), config)
    return folder / tag


def inputs(seed: int, tag: str) -> dict[str, np.ndarray]:
    """Latents and control (C, h, w), and a caption (n, features)."""
    return {
        "x": tiny.randn(seed, f"{tag}.x", 16, H, W),
        "cap": tiny.randn(seed, f"{tag}.cap", TOKENS, tiny.TRANSFORMER["cap_feat_dim"]),
        "control": tiny.randn(seed, f"{tag}.control", CONFIGS[tag]["control_in_dim"], H, W),
    }


def network(pipe, *opened: ControlNetFile, kind: type[Transformer] = Transformer, streamed=()) -> Transformer:
    """The pipeline's transformer, with its own weights and those of ControlNets 0, 1 and so on."""
    others = {f"controlnet{i}": one.component for i, one in enumerate(opened)}
    runner = Blocks(Joined(pipe.checkpoint.transformer, others), pipe.dtype, streamed)
    return kind(pipe.transformer.config, runner, compile=False)


def controlled(opened: ControlNetFile, control: np.ndarray, scale: float = SCALE, number: int = 0) -> Controlled:
    net = ControlNet(opened.component.config, f"controlnet{number}")
    return Controlled(net, mx.array(control).transpose(1, 2, 0)[None], [scale])


def run(transformer: Transformer, case: dict[str, np.ndarray], *controls: Controlled) -> np.ndarray:
    """Data minus noise (16, h, w) of a case."""
    latents = mx.array(case["x"]).transpose(1, 2, 0)[None]
    velocities = transformer.velocities([mx.array(case["cap"])], [1 - TIME], H, W, controls)
    return -np.array(velocities(latents, 0)[0])[0].transpose(2, 0, 1)


class AsDiffusers(Transformer):
    """Runs ControlNets in diffusers' order: what they add in the noise refiner reaches their own layers only.

    hints has what the last run added to each layer: (1, L, dim) by the layer's number.
    """

    hints: dict[int, mx.array]

    def __call__(
        self,
        latents: mx.array,
        captions: Sequence[Caption],
        modulation: mx.array,
        final_scale: mx.array,
        controls: Sequence[Control] = (),
    ) -> list[mx.array]:
        _, h, w, _ = latents.shape
        (caption,), (control,) = captions, controls
        x, tokens = self.begin(latents)
        names, refiners = self.config.modulated, self.config.n_refiner_layers
        self.apart, self.hints = None, {}
        (refined,) = self.run(
            names[:refiners], [self.image_stream(x, caption, modulation, [control.tokens])], [control.refiner]
        )
        (plain,) = self.run(names[:refiners], [self.image_stream(x, caption, modulation)])
        hinted, stream = (self.join(one, caption, modulation, tokens) for one in (refined, plain))
        self.apart = hinted.x
        (stream,) = self.run(names[refiners:], [replace(stream, beside=hinted.beside)], [control.layers])
        return [self.finish(stream.x, final_scale, h, w)]

    def apply_beside(self, stream: Stream, weights: Tree, i: int, k: int, chain: Chain) -> Stream:
        own = stream.x
        if self.apart is not None:
            stream = replace(stream, x=self.apart)
        stream = super().apply_beside(stream, weights, i, k, chain)
        if self.apart is not None:
            hint, scale = stream.hints[-1]
            self.hints[chain.places[i]] = hint * scale
        return replace(stream, x=own)


def opened(folder: Path, seed: int, tag: str) -> ControlNetFile:
    return open_controlnet(write(folder, seed, tag))
