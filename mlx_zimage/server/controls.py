"""Control images in requests: our own field `control`, and the units of A1111's ControlNet extension.

Both become a list of the controls of a GenerateRequest, which do not name their images yet, and the images' files.
"""

from __future__ import annotations

from typing import Any

from ..request import CONTROLS
from ..untrusted import brief
from .errors import Refusal
from .messages import Model
from .service import decoded

MAX_CONTROLS = 4  # per request: each is one more run of the ControlNet in every step
PARTS = ("kind", "scale", "start", "end", "image")
UNIT = {"weight": "scale", "guidance_start": "start", "guidance_end": "end"}  # of A1111's extension
MODULES = {"openpose": "pose", "dw": "pose", "mlsd": "lines"}  # what it calls kinds that have another name here

ControlsAndImages = tuple[list[dict[str, Any]], tuple[bytes | None, ...]]


def controls_of(given: Any) -> ControlsAndImages:
    """The controls in the field `control`: an object, or a list of them."""
    uses = given if isinstance(given, list) else [given]
    for use in uses:
        if not isinstance(use, dict) or not {*use} <= {*PARTS}:
            what = f"control must be an object with keys from {', '.join(PARTS)}, or a list of such objects"
            raise Refusal(400, f"{what}, got {brief(use)}", param="control")
    return _read([{name: value for name, value in use.items() if value is not None} for use in uses], "control")


def units_of(scripts: Any, image: bytes | None) -> ControlsAndImages:
    """The controls in the field `alwayson_scripts`; those without an image of their own are shown the one given."""
    extension = next((value for name, value in _items(scripts) if name.lower() == "controlnet"), None)
    units = dict(_items(extension)).get("args", [])
    if not isinstance(units, list) or not all(isinstance(unit, dict) for unit in units):
        raise Refusal(400, f"the args of controlnet must be a list of objects, got {brief(units)}")
    uses = []
    for unit in units:
        if unit.get("enabled", True) is not True:
            continue
        use = {ours: unit[name] for name, ours in UNIT.items() if unit.get(name) is not None}
        # such as tile_resample, one of the extension's variants of tile
        module = str(unit.get("module") or "none").lower().partition("_")[0]
        if module != "none":
            use["kind"] = MODULES.get(module, module)
        shown = unit.get("image") or unit.get("input_image") or image
        shown = shown.get("image") if isinstance(shown, dict) else shown
        if shown is None:
            raise Refusal(400, "a ControlNet unit has no image; give one")
        uses.append({**use, "image": shown})
    return _read(uses, "controlnet")


def check_controls(controls: ControlsAndImages, model: Model) -> None:
    """Refuse controls for a model that has no ControlNet."""
    if controls[0] and model.controlnet is None:
        raise Refusal(
            400,
            f"{model.name} is served without a ControlNet; leave the control images out, or start the server with "
            f"--control-model",
            param="control",
        )


def _read(uses: list[dict[str, Any]], name: str) -> ControlsAndImages:
    if len(uses) > MAX_CONTROLS:
        raise Refusal(400, f"{name} must have at most {MAX_CONTROLS} images, got {len(uses)}", param=name)
    fields, images = [], []
    for use in uses:
        kind, image = use.pop("kind", None), use.pop("image", None)
        if kind not in (None, *CONTROLS):
            known = ", ".join(CONTROLS)
            raise Refusal(400, f"{name}: the kind must be one of {known}, got {brief(kind)}", param=name)
        fields.append({**use, "prepare": kind})
        images.append(image if image is None or isinstance(image, bytes) else decoded(image, f"{name}: image"))
    return fields, tuple(images)


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []
