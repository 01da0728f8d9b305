"""A tiny random Z-Image checkpoint in the official layout, and the inputs that belong to the recorded arrays.

Every weight and input is a pure function of (seed, component, name), so only outputs are recorded (golden/). Names and
shapes come from the package; since the numbers depend on both, a wrong name or shape gives wrong outputs.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_zimage import ZImagePipeline
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.weights import official
from mlx_zimage.weights.hub import POCKET

GOLDEN = Path(__file__).parent / "golden"

# The official configs, scaled down.
TRANSFORMER = official.CONFIGS["transformer"] | {
    "dim": 48,
    "n_layers": 3,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 40,
    "axes_dims": [4, 6, 6],
}
# wider than 256, where the time embedding's width stops growing
WIDE_TRANSFORMER = TRANSFORMER | {
    "dim": 288,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [48, 48, 48],
    "cap_feat_dim": 24,
}
TEXT_ENCODER = official.CONFIGS["text_encoder"] | {
    "hidden_size": 40,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_window_layers": 4,
    "vocab_size": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LIGHT = {  # what differs from pocket's configs
    "transformer": {"n_layers": 2, "n_refiner_layers": 1},
    "text_encoder": {},
    "vae": {"block_out_channels": [8, 8, 16, 16]},
}
VAE = official.CONFIGS["vae"] | {"block_out_channels": [8, 16, 24, 24], "norm_num_groups": 4}
CONFIGS = {"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "vae": VAE}
SHAPES = {
    "transformer": lambda config: TransformerConfig.from_dict(config).shapes(),
    "text_encoder": lambda config: TextEncoderConfig.from_dict(config).shapes(),
    "vae": lambda config: VAEConfig.from_dict(config).shapes(),
}
KINDS = ("tiny", "wide", "faint")
# weights that write to the residual stream, which is normalized, and queries and keys, which have their own norms
FAINT = {
    "transformer": re.compile(r"_pad_token|cap_embedder\.1|x_embedder|(attention|ffn)_norm2|to_[qk]\."),
    "text_encoder": re.compile(r"embed_tokens|[qko]_proj|down_proj"),
    "vae": re.compile(r"conv_in|conv[12]\.|to_out|(conv_shortcut|samplers\.0\.conv)\.bias"),
}
FILE_STEM = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}

PROMPTS = {
    "short": "a red fox in the snow",
    "zh": "霓虹灯下的街道，写着「造相」",
    "mixed": "It's a poster: «Z-Image» 2026, naïve café ⚡️🦊\n\nsecond line   with spaces",
    "empty": "",
    "special": "a <|im_end|> inside <think> text",
    "medium": "portrait of a young woman in red, intricate embroidery, soft light, " * 3,
    "long": "a photo of a red fox sitting in the snow, soft light, detailed fur, " * 60,
    "negative": "blurry, low quality",
}
# latent height, latent width, caption length and time of each item of a batch
CASES = {
    "a_pad_both": [(12, 10, 20, 0.25)],
    "b_no_pad": [(8, 16, 32, 0.5)],
    "c_tall": [(24, 6, 45, 0.0)],
    "d_one_token": [(2, 2, 1, 1.0)],
    "e_batch_two_captions": [(12, 10, 7, 0.7), (12, 10, 40, 0.7)],
    "f_batch_two_sizes": [(8, 8, 33, 0.1), (12, 10, 5, 0.9)],
    "g_wide": [(6, 40, 3, 0.045455)],
}
WIDTH, HEIGHT = 96, 80
RUNS = {
    "t2i8": {"prompt": PROMPTS["short"], "num_inference_steps": 8, "guidance_scale": 0.0},
    "t2i4_zh": {"prompt": PROMPTS["zh"], "num_inference_steps": 4, "guidance_scale": 0.0},
    "cfg4": {
        "prompt": PROMPTS["short"],
        "negative_prompt": PROMPTS["medium"],
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
    },
    "cfg4_norm": {
        "prompt": PROMPTS["short"],
        "negative_prompt": PROMPTS["negative"],
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "cfg_normalization": 1.0,
    },
    "cfg4_trunc": {
        "prompt": PROMPTS["short"],
        "negative_prompt": PROMPTS["negative"],
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "cfg_truncation": 0.2,
    },
    "cfg1": {"prompt": PROMPTS["short"], "num_inference_steps": 2, "guidance_scale": 1.0},
}
# image to image from `photo`: strength and steps
IMAGE_RUNS = {"img2img_060": (0.6, 8), "img2img_100": (1.0, 8), "img2img_030": (0.3, 8), "img2img_029": (0.29, 7)}
IMAGE_SEED = 5
# Inpainting of a rectangle that begins and ends with a latent: diffusers takes one value of each 8x8, we the largest.
MASKED = slice(24, 64), slice(32, 80)


@dataclass(frozen=True)
class Golden:
    """Tiny checkpoints of one seed, one per kind, and the float32 arrays that diffusers computes with them.

    The checkpoints are in `root`; one that is not there yet is written when it is used.
    """

    seed: int
    root: Path
    arrays: dict[str, np.ndarray]

    @property
    def folder(self) -> Path:
        return self.kind("tiny")

    def kind(self, name: str) -> Path:
        folder = self.root / name
        return folder if folder.exists() else write_checkpoint(folder, self.seed, name)

    @cached_property
    def pipe(self) -> ZImagePipeline:
        return ZImagePipeline.from_pretrained(self.folder, dtype="float32")

    @cached_property
    def wide(self) -> ZImagePipeline:
        return ZImagePipeline.from_pretrained(self.kind("wide"), dtype="float32")

    @cached_property
    def faint(self) -> ZImagePipeline:
        return ZImagePipeline.from_pretrained(self.kind("faint"), dtype="float32")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


def weight(seed: int, component: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight with that name, scaled so that activations stay near 1."""
    key = [seed, zlib.crc32(component.encode()), zlib.crc32(name.encode())]
    z = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).standard_normal(shape, dtype=np.float32)
    if name.endswith("pad_token"):
        return z
    if name.endswith("embed_tokens.weight"):
        return 0.5 * z
    if len(shape) == 1:
        return 1.0 + 0.2 * z if name.endswith("weight") else 0.1 * z
    return z * np.float32(1.0 / math.sqrt(np.prod(shape[1:])))


def randn(seed: int, tag: str, *shape: int) -> np.ndarray:
    """Standard normal float32 input for that tag."""
    key = [seed, 777, zlib.crc32(tag.encode())]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).standard_normal(shape, dtype=np.float32)


def case_inputs(seed: int, case: str, features: int = 40) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Latents (16, h, w), caption (n, features) and time of each item of one of CASES."""
    return [
        (randn(seed, f"{case}.x{i}", 16, h, w), randn(seed, f"{case}.cap{i}.{features}", n, features), t)
        for i, (h, w, n, t) in enumerate(CASES[case])
    ]


def encoder_image(seed: int) -> np.ndarray:
    """Pixels (1, 3, 80, 96) in [-1, 1]."""
    return np.tanh(randn(seed, "vae.img", 1, 3, HEIGHT, WIDTH))


def photo() -> np.ndarray:
    """An image (80, 96, 3) uint8 to start from: smooth, with some texture."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    rgb = np.stack([x / WIDTH, y / HEIGHT, 0.5 + 0.5 * np.sin(x / 7) * np.cos(y / 5)], axis=-1)
    return (rgb * 255).round().astype(np.uint8)


def mask() -> np.ndarray:
    """The mask (80, 96) uint8 of an inpainting of `photo`."""
    array = np.zeros((HEIGHT, WIDTH), np.uint8)
    array[MASKED] = 255
    return array


def weights(seed: int, component: str, config: dict, tag: str | None = None) -> dict[str, np.ndarray]:
    """All float32 weights of a network; a tag gives a different model than the tiny one."""
    return {name: weight(seed, tag or component, name, shape) for name, shape in SHAPES[component](config).items()}


def save_component(folder: Path, component: str, arrays: dict, config: dict, dtype=mx.float32, shards: int = 1) -> None:
    """Write a component's folder as diffusers and transformers do; with an index if there is more than one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, names = FILE_STEM[component], list(arrays)
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else f"{stem}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        tensors = {name: mx.array(arrays[name]).astype(dtype) for name in part}
        mx.save_safetensors(str(folder / file), tensors, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(folder: Path, seed: int, kind: str = "tiny") -> Path:
    """The whole folder: float32 transformer and bfloat16 text encoder in shards, bfloat16 VAE in one file.

    A "wide" one has WIDE_TRANSFORMER and a text encoder to match; a "faint" one has activations so small that the
    epsilons of its norms matter, which would go unnoticed elsewhere.
    """
    transformer = WIDE_TRANSFORMER if kind == "wide" else TRANSFORMER
    text_encoder = TEXT_ENCODER | {"hidden_size": transformer["cap_feat_dim"]}
    parts = {
        "transformer": (transformer, mx.float32, 3),
        "text_encoder": (text_encoder, mx.bfloat16, 4),
        "vae": (VAE, mx.bfloat16, 1),
    }
    for component, (config, dtype, shards) in parts.items():
        tag = "wide" if (kind, component) == ("wide", "transformer") else None
        arrays = weights(seed, component, config, tag)
        if kind == "faint":
            arrays = {name: x * faintness(component, name) for name, x in arrays.items()}
        save_component(folder / component, component, arrays, config, dtype, shards)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(official.SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(official.MODEL_INDEX))
    shutil.copytree(GOLDEN / "tokenizer", folder / "tokenizer")
    return folder


def write_light_pocket(folder: Path) -> Path:
    """Pocket with fewer layers, a narrow VAE and random weights: its images show nothing, and take less time."""
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for component in LIGHT:
        lighten(folder, component)
    return folder


def lighten(folder: Path, component: str, **changed: object) -> None:
    """Replace a component of pocket with a smaller one of random weights."""
    config = json.loads((POCKET / component / "config.json").read_text()) | LIGHT[component] | changed
    save_component(folder / component, component, weights(0, component, config, "light"), config, mx.bfloat16)


def write_kinds(folder: Path, seed: int) -> Path:
    """A checkpoint of each kind, each in a folder of that name."""
    for kind in KINDS:
        write_checkpoint(folder / kind, seed, kind)
    return folder


def faintness(component: str, name: str) -> np.float32:
    """The factor that keeps the input of every norm near 1e-3."""
    if name.startswith("encoder.conv_out"):
        return np.float32(100)  # log variances far enough out to be clipped
    return np.float32(1e-3 if FAINT[component].search(name) else 1)


APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(64)


def litter(folder: Path) -> None:
    """Add files such as macOS leaves next to every file on a disk without extended attributes."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(APPLE_DOUBLE)
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._.DS_Store", ".hidden.safetensors"):
            (place / name).write_bytes(APPLE_DOUBLE)
        (place / ".cache" / "huggingface").mkdir(parents=True)
        (place / ".cache" / "huggingface" / "model.safetensors").write_bytes(b"")
