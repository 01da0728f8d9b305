"""Requests that mflux stored, in EXIF or a JSON file next to the image. Source: mflux 0.24.0, generated_image.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..request import GenerateRequest, LoraUse
from ..untrusted import brief, parse_json
from ..variants import TURBO

CHARACTER_CODE = b"ASCII\0\0\0"  # which EXIF puts before the text of a user comment
NOT_HERE = {  # values that change an image in a way that a request here cannot, and what they are
    "image_paths": "input images",
    "masked_image_path": "a masked image",
    "depth_image_path": "a depth image",
    "redux_image_paths": "Redux",
    "controlnet_image_path": "ControlNet",
    "pid_decode": "the PiD decoder",
}


def stored(comment: bytes) -> dict[str, Any] | None:
    """mflux's values in EXIF's user comment; None if another program wrote it."""
    try:
        values = parse_json(comment.removeprefix(CHARACTER_CODE))
    except ValueError:
        return None
    return values if isinstance(values, dict) and "mflux_version" in values else None


def to_request(values: dict[str, Any]) -> tuple[GenerateRequest, str]:
    """The request, and the name of the model. RequestError if it needs what is not supported here, or is invalid.

    mflux uses MLX's noise, and its guidance is off at values up to 1. Its LoRAs are named after their files, without a
    SHA-256. If it started from an image, the request has a strength, but no image: mflux stores only its path.
    """
    for name, what in NOT_HERE.items():
        if values.get(name):
            raise RequestError(f"mflux generated it with {what} ({name}); such a request cannot be repeated here")
    guidance = values.get("guidance") or 0.0
    if "prompt" not in values or "seed" not in values:
        raise RequestError("it has no prompt or no seed, so it is not a request that mflux stored")
    request = GenerateRequest(
        prompt=values["prompt"],
        width=values.get("width"),
        height=values.get("height"),
        seed=values["seed"],
        steps=values.get("steps"),
        guidance_scale=guidance if not isinstance(guidance, (int, float)) or guidance > 1 else 0.0,
        negative_prompt=values.get("negative_prompt") or "",
        rng="mlx",
        strength=_strength(values) if values.get("image_path") else None,
        loras=_loras(values.get("lora_paths") or [], values.get("lora_scales")),
    )
    return request, str(values.get("model_path") or values.get("model") or TURBO.repository)


def _strength(values: dict[str, Any]) -> float | None:
    """The strength that runs the same steps; None if mflux ignored the image.

    mflux begins at step floor(steps * image_strength), but not before the second.
    """
    steps, strength = values.get("steps"), values.get("image_strength")
    if strength is None or strength == 0:
        return None
    if not isinstance(steps, int) or not isinstance(strength, (int, float)) or not 0 < strength < 1:
        raise RequestError(
            f"expected image_strength of at least 0 and below 1, and a number of steps, but got {brief(strength)} and "
            f"{brief(steps)}"
        )
    run = steps - max(1, int(steps * strength))
    return run / steps - 1e-9 if run > 0 else 0.0  # a hair less, so that rounding does not add a step


def _loras(paths: Any, scales: Any) -> tuple[LoraUse, ...]:
    """The LoRAs at mflux's lora_paths: files, ids, or ID:FILE."""
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise RequestError(f"lora_paths must be a list of paths, got {brief(paths)}")
    if scales is None:
        scales = [1.0] * len(paths)
    if not isinstance(scales, list) or len(scales) != len(paths):
        raise RequestError(f"lora_scales must be one number per LoRA, {len(paths)} in all, got {brief(scales)}")
    names = [Path(path.rpartition(":")[2]).stem for path in paths]
    if same := sorted({name for name in names if names.count(name) > 1}):
        twice = ", ".join(same)
        raise RequestError(
            f"mflux generated it with several LoRAs of the same name ({twice}); give all of its LoRAs with --lora"
        )
    return tuple(map(LoraUse, names, scales))
