"""How close a converted model is to its source: by layer, by step and by image, saved in its folder.

Images of two models diverge once a step differs, so comparing a few says little. The error of the velocity is measured
at the source's latents, step by step, and varies smoothly.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log10, sqrt
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, OutputError, RequestError
from ..models import NETWORKS
from ..models.transformer import PATCH
from ..noise import initial_noise
from ..pipeline import ZImagePipeline
from ..porting import dtype_name
from ..request import GenerateRequest
from ..untrusted import one_line
from ..weights.checkpoint import open_checkpoint
from ..weights.hub import REPOSITORY_ID
from ..weights.manifest import CONVERSION, MANIFEST, read_manifest, sha256
from ..weights.official import REPOSITORY
from .calibrate import NO_PARTS
from .disk import render_json
from .rows import Tensor, read_rows
from .sources import Source, open_folder, open_source
from .writer import add_files

QUALITY, CARD = "quality.json", "README.md"
PROMPTS = (
    "a red fox in the snow, soft morning light",
    "霓虹灯下的街道，写着「造相」",
    "portrait of an old fisherman, 85mm, shallow depth of field",
    "a poster with the words GRAND OPENING",
)


@dataclass(frozen=True)
class Compared:
    """A layer or an image has been compared: `done` of `total`."""

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
    steps: int | None = None,
    dtype: str | None = None,
    memory: str | int | None = None,
    variant: str | None = None,
    parts: Mapping[str, Any] = NO_PARTS,
) -> Iterator[Compared]:
    """Compare the model in folder with its source, as for `from_pretrained`, yielding Compared as it goes.

    Both models generate an image of size x size pixels from each prompt, one model after the other; the seed is the
    prompt's index. dtype and memory are those of ZImagePipeline.from_pretrained; with a memory budget, a model that
    does not fit is streamed from disk. variant selects among the source's files; parts are where networks other than
    its own came from, by name.
    """
    folder = Path(folder).expanduser()
    ours, theirs = open_ours(folder), open_source(source, variant=variant, **parts)
    packed = []
    for component in open_checkpoint(folder).components:
        names = {f"{layer}.weight" for layer in component.quantizations}
        sources = {tensor.name: tensor for tensor in theirs.components[component.name].tensors}
        own = ours.components[component.name].tensors
        packed += [(component.name, t, sources[t.name]) for t in own if t.name in names and t.name in sources]
    total = len(packed) + 2 * len(prompts)
    layers = {}
    for i, (name, tensor, exact) in enumerate(packed, 1):
        layers[f"{name} {tensor.name}"] = weight_error(tensor, exact)
        yield Compared(tensor.name, i, total)
    pipe = ZImagePipeline.from_pretrained(source, dtype, memory, variant=variant, **parts)
    requests = _requests(pipe, prompts, size, steps)
    generated = []
    for i, request in enumerate(requests, len(packed) + 1):
        generated.append(trajectory(pipe, request))
        yield Compared(request.prompt, i, total)
    del pipe  # one model at a time
    pipe = ZImagePipeline.from_pretrained(folder, dtype=dtype, memory=memory)
    images = []
    for i, (request, reference) in enumerate(zip(requests, generated, strict=True), len(packed) + len(prompts) + 1):
        images.append({"prompt": request.prompt, "seed": request.seed} | compare(pipe, request, reference))
        yield Compared(request.prompt, i, total)
    quality = {
        "size": requests[0].width if requests else None,
        "steps": requests[0].steps if requests else steps,
        "dtype": dtype_name(pipe.dtype),
        "weight_error": {"mean": float(np.mean(list(layers.values()) or [0.0])), "layers": layers},
        "images": images,
        "pictures": images,  # its old name, for one release
    }
    add_files(folder, {QUALITY: render_json(quality), CARD: model_card(ours.conversion, quality).encode()})


def check_source(
    source: str | Path,
    memory: str | int | None = None,
    variant: str | None = None,
    parts: Mapping[str, Any] = NO_PARTS,
) -> None:
    """Raise, before any work, if `report` could not generate images with the source."""
    pipe = ZImagePipeline.from_pretrained(source, memory=memory, variant=variant, **parts)
    for request in _requests(pipe, PROMPTS):
        pipe.plan(request)


def _requests(
    pipe: ZImagePipeline, prompts: Sequence[str], size: int | None = None, steps: int | None = None
) -> list[GenerateRequest]:
    return [
        pipe.complete(GenerateRequest(prompt, size, size, seed, steps, guidance_scale=0.0))
        for seed, prompt in enumerate(prompts)
    ]


def open_ours(folder: Path) -> Source:
    if not (folder / CONVERSION).is_file():
        raise CheckpointError(f"{folder} was not written by this converter: it has no {CONVERSION}; convert it first")
    return open_folder(folder, folder.name, NETWORKS)


def weight_error(tensor: Tensor, exact: Tensor) -> float:
    """The root mean square error of a tensor, relative to the root mean square of the exact one."""
    error = power = 0.0
    for a, b in zip(read_rows(tensor, "float32"), read_rows(exact, "float32"), strict=True):
        error += float(mx.square(a - b).sum())
        power += float(mx.square(b).sum())
    return sqrt(error / power) if power else 0.0


def trajectory(pipe: ZImagePipeline, request: GenerateRequest) -> tuple[list[mx.array], np.ndarray]:
    """The latents (1, h, w, 16) before and after each step, and the pixels."""
    vae = pipe.checkpoint.vae.config
    width, height, steps = request.extent
    h, w = height // vae.scale, width // vae.scale
    noise = initial_noise(request.seed, (1, vae.latent_channels, h, w))
    states = {0: noise.transpose(0, 2, 3, 1)} | {step.index + 1: step.latents for step in pipe.denoise(request, noise)}
    return list(states.values()), pipe.decode(states[steps][0])


def compare(pipe: ZImagePipeline, request: GenerateRequest, reference: tuple[list[mx.array], np.ndarray]) -> dict:
    """Errors of a pipeline's image and of its velocity at each step, relative to the `trajectory` of another."""
    states, pixels = reference
    steps = request.extent[2]
    (*_, last), own_pixels = trajectory(pipe, request)
    _, h, w, _ = last.shape
    sigmas = pipe.checkpoint.scheduler.sigmas(steps, (h // PATCH) * (w // PATCH))
    velocity = pipe.transformer.velocity(pipe.encode(request.prompt), sigmas[:-1], h, w)
    errors = []
    for i in range(steps):
        exact = (states[i + 1] - states[i]) / float(sigmas[i + 1] - sigmas[i])
        errors.append(_relative(velocity(states[i], i), exact))
    if not pipe.plan(request).keep:
        pipe.networks.release()
    error = float(np.square(own_pixels.astype(np.float32) - pixels).mean())
    return {
        "velocity_error": errors,
        "latent_error": _relative(last, states[-1]),
        "latent_cosine": _cosine(last, states[-1]),
        "psnr_db": 10 * log10(255**2 / error) if error else None,  # None: identical images
    }


def _relative(x: mx.array, exact: mx.array) -> float:
    return sqrt(float(mx.square(x - exact).mean() / mx.square(exact).mean()))


def _cosine(a: mx.array, b: mx.array) -> float:
    return float((a * b).sum() / mx.sqrt(mx.square(a).sum() * mx.square(b).sum()))


def model_card(conversion: dict, quality: dict | None = None) -> str:
    """README.md for Hugging Face, with a table of the quality if it was measured."""
    step: dict | None = conversion
    origins: list[str] = []
    while step:
        origins.append(step.get("source", "?"))
        step = step.get("before")
    # ids on Hugging Face, perhaps with a file; files and folders are named without their path
    bases = [match[1] for origin in origins if (match := re.fullmatch(rf"({REPOSITORY_ID.pattern})(:.*)?", origin))]
    lines = ["---", "library_name: mlx", "pipeline_tag: text-to-image"]
    lines += [f"base_model: {bases[0]}"] if bases else []
    lines += ["license: apache-2.0"] if REPOSITORY in origins else []
    lines += ["tags:", "- mlx", "---", "", f"# Z-Image for MLX, from {_plain(origins[0])}", ""]
    made, dtype = (_plain(conversion.get(key, "?")) for key in ("converter", "dtype"))
    lines += [f"Written by {made}. Weights that are not quantized are {dtype}.", ""]
    lines += ["    mlx-zimage generate 'a lighthouse at dusk' --model FOLDER", ""]
    if quality:
        mean = quality["weight_error"]["mean"]
        lines += [f"Error of quantized weights: {mean:.4f} (relative root mean square, mean over the layers).", ""]
    if quality and quality["images"]:
        lines += [
            f"Images of {quality['size']}x{quality['size']} pixels in {quality['steps']} steps, compared with those of "
            f"the source; the seeds are 0, 1, ... from the top.",
            "",
            "| prompt | velocity error, mean over the steps | cosine of the final latents | PSNR of the image |",
            "|---|---|---|---|",
        ]
        for image in quality["images"]:
            psnr = "identical" if image["psnr_db"] is None else f"{image['psnr_db']:.1f} dB"
            prompt, error = one_line(image["prompt"]).replace("|", "\\|"), np.mean(image["velocity_error"])
            lines.append(f"| {prompt} | {error:.4f} | {image['latent_cosine']:.5f} | {psnr} |")
        lines.append("")
    return "\n".join(lines)


def check_upload(repository: str) -> None:
    """Raise, before any work, if an upload cannot succeed: an invalid name, or a missing or rejected token."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RequestError(f"{repository!r} is not a repository name: {_first_line(error)}") from error
    if "/" not in repository:
        raise RequestError(f"{repository!r} is not a repository name; expected OWNER/NAME")
    if get_token() is None:
        raise RequestError(
            f"uploading to {repository} needs a Hugging Face token; run `hf auth login`, or set HF_TOKEN"
        )
    try:
        HfApi().whoami()
    except HTTPError as error:
        raise OutputError(f"Hugging Face would reject an upload to {repository}: {_first_line(error)}") from error


def upload(folder: str | Path, repository: str) -> None:
    """Upload a folder written by the converter, with a model card, to Hugging Face; the repository may exist."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    folder = Path(folder).expanduser()
    ours = open_ours(folder)
    if not (folder / CARD).exists():
        add_files(folder, {CARD: model_card(ours.conversion).encode()})
    names = _listed(folder)
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=[glob.escape(name) for name in names])
    except (HFValidationError, HTTPError) as error:
        raise OutputError(
            f"{folder} is complete, but could not be uploaded to {repository}: {_first_line(error)}; "
            f"to retry, run `hf upload {repository} {folder}`"
        ) from error


def _listed(folder: Path) -> list[str]:
    """The files to upload: those in the manifest, unchanged, the manifest, and the card, which may be edited."""
    sums = read_manifest(folder)
    names = sorted({*sums, MANIFEST, CARD})
    for name in names:
        file = folder / name
        if file.is_symlink() or not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise CheckpointError(f"{file} is not a regular file inside {folder}; convert again")
        if name in sums and name != CARD and not _is_as_listed(file, sums[name]):
            raise CheckpointError(f"{file} has changed since it was converted; convert again")
    return names


def _is_as_listed(file: Path, digest: str) -> bool:
    try:
        return sha256(file) == digest
    except OSError:  # too large, or not readable
        return False


def _plain(text: str) -> str:
    """A name as Markdown shows it, without anything that could be markup."""
    return re.sub(r"[^\w ./:+-]", "", one_line(text))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
