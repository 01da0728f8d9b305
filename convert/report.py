"""How near a converted model is to its source: by layer, by step, by picture; written into its folder.

Pictures of two models part where a step goes another way, so a few of them say little. The velocity's error is taken
at the source's own latents, step by step, and is a smooth measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log10, sqrt
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, OutputError
from ..noise import initial_noise
from ..pipeline import ZImagePipeline
from ..request import GenerateRequest
from ..weights import COMPONENTS, open_checkpoint, read_json
from .official import REPOSITORY
from .rows import Tensor, read_rows
from .sources import CONVERSION, open_folder, open_source
from .writer import add_files, render_json

QUALITY, CARD = "quality.json", "README.md"
PROMPTS = (
    "a red fox in the snow, soft morning light",
    "霓虹灯下的街道，写着「造相」",
    "portrait of an old fisherman, 85mm, shallow depth of field",
    "a poster with the words GRAND OPENING",
)


@dataclass(frozen=True)
class Compared:
    """A layer or a picture has been compared: `done` of `total`."""

    name: str
    done: int
    total: int


def report(folder: str | Path, source: str | Path, **options) -> dict:
    """Compare the model in folder with its source and write quality.json and README.md there. See report_steps."""
    for _ in report_steps(folder, source, **options):
        pass
    return json.loads((Path(folder).expanduser() / QUALITY).read_text())


def report_steps(
    folder: str | Path,
    source: str | Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    size: int | None = None,
    steps: int = 8,
    dtype: str | None = None,
    memory: str | int | None = None,
) -> Iterator[Compared]:
    """Compare the model in folder with its source, a model folder or id, yielding Compared as it goes.

    Each prompt is drawn by both, at size x size pixels from the seed that is its place in the list. dtype and memory
    are those of ZImagePipeline.from_pretrained; a budget lets a model be read by blocks that memory would not hold.
    """
    folder = Path(folder).expanduser()
    if not (folder / CONVERSION).is_file():
        raise CheckpointError(f"{folder} was not written by this converter; nothing would tell what it is")
    theirs = open_source(source)
    ours = open_folder(folder, folder.name, COMPONENTS)
    packed = []
    for component in open_checkpoint(folder).components:
        names = {f"{layer}.weight" for layer in component.quantizations}
        exact = {tensor.name: tensor for tensor in theirs.components[component.name].tensors}
        own = ours.components[component.name].tensors
        packed += [(component.name, t, exact[t.name]) for t in own if t.name in names and t.name in exact]
    total = len(packed) + len(prompts)
    layers = {}
    for i, (name, tensor, exact) in enumerate(packed):
        layers[f"{name} {tensor.name}"] = weight_error(tensor, exact)
        yield Compared(tensor.name, i + 1, total)
    pipes = [ZImagePipeline.from_pretrained(model, dtype=dtype, memory=memory) for model in (folder, source)]
    size = pipes[1].sample_size if size is None else size
    pictures = []
    for seed, prompt in enumerate(prompts):
        request = GenerateRequest(prompt=prompt, width=size, height=size, seed=seed, steps=steps)
        pictures.append({"prompt": prompt, "seed": seed} | compare(*pipes, request))
        yield Compared(prompt, len(packed) + seed + 1, total)
    quality = {
        "size": size,
        "steps": steps,
        "weight_error": {"mean": float(np.mean(list(layers.values()) or [0.0])), "layers": layers},
        "pictures": pictures,
    }
    add_files(folder, {QUALITY: render_json(quality), CARD: model_card(ours.conversion, quality).encode()})


def weight_error(tensor: Tensor, exact: Tensor) -> float:
    """The root mean square of what a tensor is off, as a part of that of the exact one."""
    error = power = 0.0
    for a, b in zip(read_rows(tensor, "float32"), read_rows(exact, "float32"), strict=True):
        error += mx.square(a - b).sum().item()
        power += mx.square(b).sum().item()
    return sqrt(error / power) if power else 0.0


def compare(ours: ZImagePipeline, theirs: ZImagePipeline, request: GenerateRequest) -> dict:
    """How far our picture of a request is from theirs, and our velocity from theirs at each of their steps."""
    vae = theirs.checkpoint.vae.config
    h, w = request.height // vae.scale, request.width // vae.scale
    noise = initial_noise(request.seed, (1, vae.latent_channels, h, w))
    sigmas = theirs.checkpoint.scheduler.sigmas(request.steps, (h // 2) * (w // 2))
    stops = [noise.transpose(0, 2, 3, 1), *(step.latents for step in theirs.denoise(request, noise))]
    *_, last = ours.denoise(request, noise)
    velocity = ours.transformer.velocity(ours.encode(request.prompt), sigmas[:-1], h, w)
    errors = []
    for i in range(request.steps):
        exact = (stops[i + 1] - stops[i]) / float(sigmas[i + 1] - sigmas[i])
        errors.append(_relative(velocity(stops[i], i), exact))
    ours_last, theirs_last = last.latents, stops[-1]
    pixels = [pipe.decode(x[0]).astype(np.float32) for pipe, x in ((ours, ours_last), (theirs, theirs_last))]
    off = float(np.square(pixels[0] - pixels[1]).mean())
    return {
        "velocity_error": errors,
        "latent_cosine": _cosine(ours_last, theirs_last),
        "psnr_db": 10 * log10(255**2 / off) if off else None,  # None: the same picture
    }


def _relative(x: mx.array, exact: mx.array) -> float:
    return sqrt((mx.square(x - exact).mean() / mx.square(exact).mean()).item())


def _cosine(a: mx.array, b: mx.array) -> float:
    return ((a * b).sum() / mx.sqrt(mx.square(a).sum() * mx.square(b).sum())).item()


def model_card(conversion: dict, quality: dict | None = None) -> str:
    """README.md as the Hugging Face hub reads it, with the table of quality where it was measured."""
    official = conversion["source"] == REPOSITORY
    lines = ["---", "library_name: mlx", "pipeline_tag: text-to-image"]
    lines += [f"base_model: {REPOSITORY}", "license: apache-2.0"] if official else []
    lines += ["tags:", "- mlx", "---", "", f"# Z-Image for MLX, from {conversion['source']}", ""]
    lines += [f"Written by {conversion['converter']}. Weights that are not quantized are {conversion['dtype']}.", ""]
    lines += ["    mlx-zimage generate 'a lighthouse at dusk' --model FOLDER", ""]
    if quality:
        size, mean = quality["size"], quality["weight_error"]["mean"]
        lines += [
            f"Compared with its source at {size}x{size} pixels in {quality['steps']} steps. Quantized weights are off "
            f"by {mean:.4f} (relative root mean square, mean of the layers).",
            "",
            "| prompt | velocity error, mean of the steps | cosine of the final latents | PSNR of the picture |",
            "|---|---|---|---|",
        ]
        for picture in quality["pictures"]:
            psnr = "the same" if picture["psnr_db"] is None else f"{picture['psnr_db']:.1f} dB"
            prompt, error = picture["prompt"].replace("|", "\\|"), np.mean(picture["velocity_error"])
            lines.append(f"| {prompt} | {error:.4f} | {picture['latent_cosine']:.5f} | {psnr} |")
        lines.append("")
    return "\n".join(lines)


def upload(folder: str | Path, repository: str) -> None:
    """Send a folder that the converter wrote to the Hugging Face hub, with a model card; the repository may exist."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    folder = Path(folder).expanduser()
    if not (folder / CONVERSION).is_file():
        raise CheckpointError(f"{folder} was not written by this converter; nothing would tell what it is")
    if not (folder / CARD).exists():
        add_files(folder, {CARD: model_card(read_json(folder / CONVERSION)).encode()})
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HFValidationError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OutputError(f"{folder} could not be uploaded to {repository}: {reason}") from error
