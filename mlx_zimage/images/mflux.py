"""Requests that mflux stored, in EXIF or a JSON file next to the image. Source: mflux 0.24.0, generated_image.py."""

from __future__ import annotations

import json
from typing import Any

from ..errors import RequestError
from ..request import GenerateRequest
from ..variants import TURBO

PREFIX = b"ASCII\0\0\0"  # of its user comment
NOT_HERE = {  # values that change an image in a way that a request here cannot, and what they are
    "lora_paths": "a LoRA",
    "image_path": "an image to start from",
    "image_paths": "images to start from",
    "masked_image_path": "a mask",
    "depth_image_path": "a depth image",
    "redux_image_paths": "Redux",
    "controlnet_image_path": "ControlNet",
    "pid_decode": "the PiD decoder",
}


def stored(comment: bytes) -> dict[str, Any] | None:
    """mflux's values in EXIF's user comment; None if another program wrote it."""
    try:
        values = json.loads(comment.removeprefix(PREFIX))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and "mflux_version" in values else None


def to_request(values: dict[str, Any]) -> tuple[GenerateRequest, str]:
    """The request, and the name of the model. RequestError if it needs what is not supported here, or is invalid.

    mflux uses MLX's noise, and its guidance is off up to 1.
    """
    for name, what in NOT_HERE.items():
        if values.get(name):
            raise RequestError(f"mflux generated it with {what} ({name}), which is not supported here")
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
    )
    return request, str(values.get("model_path") or values.get("model") or TURBO.repository)
