"""ControlNets on a command line: `--control [KIND:]FILE --control-model PATH`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ModelNotFoundError, RequestError
from ..request import CONTROLS, ControlUse, GenerateRequest
from ..sizes import counted, size
from .output import hub_bars, say
from .values import LoraName

if TYPE_CHECKING:
    from ..images.metadata import Origin
    from ..pipeline import ZImagePipeline
    from .given import Given

# What `--control` offers to download: the smallest, and made for Turbo's 8 steps.
CONTROLNET_REPOSITORY = "alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union-2.1"
LITE = f"{CONTROLNET_REPOSITORY}:Z-Image-Turbo-Fun-Controlnet-Union-2.1-lite-2602-8steps.safetensors"
LITE_BYTES = 2_016_616_960  # of its weights in bfloat16
INPAINT = "inpaint"
TAKES = "--control-model takes a file, a folder, a Hugging Face id or id:file"


control_kind_option = click.option(
    "--control-kind",
    metavar="TRAITS",
    help="What --control-model was trained for, if its name does not say (not the KIND in `generate --control`): "
    "plain, or one or more of 8-steps, tile and base, separated by commas.",
)


def control_options(command: Any) -> Any:
    """The options of ControlNets."""
    options = (
        click.option(
            "--control", "control_files", metavar="[KIND:]FILE", multiple=True,
            help="Follow this control image: edges, a pose, a depth map or whatever else the ControlNet was trained "
            f"on. KIND ({', '.join(CONTROLS)}) makes it from a photo first. With --mask, give '{INPAINT}' instead of "
            "FILE to show the ControlNet only the part of the image that the mask keeps.  [repeatable]",
        ),
        click.option(
            "--control-model", metavar="PATH", type=LoraName(),
            help="ControlNet Union to use: a file, a folder, a Hugging Face id or id:file.  [default: the lite one for "
            "8 steps; asks before downloading it]",
        ),
        click.option(
            "--control-scale", "control_scales", type=float, multiple=True, metavar="SCALE",
            help="How closely to follow the control images: one SCALE for all, or one for each.  [default: the "
            "ControlNet's own, 0.75 to 1]",
        ),
        click.option(
            "--control-start", type=float, metavar="FRACTION",
            help="Start following after this fraction of the steps.  [default: 0]",
        ),
        click.option(
            "--control-end", type=float, metavar="FRACTION",
            help="Stop following after this fraction of the steps.  [default: 1]",
        ),
        control_kind_option,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def controls_given(
    given: Given,
    files: Sequence[str],
    scales: Sequence[float],
    start: float | None,
    end: float | None,
    old: Origin | None,
) -> list[dict]:
    """The controls that the options describe, for a request. Those that an old image also has keep its settings."""
    if len(scales) > 1 and len(scales) != len(files):
        raise RequestError(
            f"--control-scale must be given once, or once for each --control ({len(files)} in all), got {len(scales)}"
        )
    found, waiting = [], [*old.request.controls] if old else []
    for i, text in enumerate(files):
        use = _use(given, text, waiting)
        values = {"scale": scales[min(i, len(scales) - 1)] if scales else None, "start": start, "end": end}
        found.append(use | {name: value for name, value in values.items() if value is not None})
    return [asdict(ControlUse.of(use)) for use in found]


def _use(given: Given, text: str, waiting: list[ControlUse]) -> dict:
    """The control that one `--control` describes. It takes the place of the first of those waiting with the same image
    and, if it names a kind, the same kind."""
    kind, _, file = text.partition(":")
    is_kind = bool(file) and kind in CONTROLS
    if text == INPAINT and not os.path.exists(text):
        digest = None
    elif ":" in text and not is_kind and not os.path.exists(os.path.expanduser(text)):
        raise RequestError(f"--control must be FILE, or KIND:FILE with one of {', '.join(CONTROLS)}, got {text!r}")
    else:
        digest = given.add_control(Path(os.path.expanduser(file if is_kind else text)))
    same = (use for use in waiting if use.image == digest and (not is_kind or use.prepare == kind))
    if (before := next(same, None)) is not None:
        waiting.remove(before)
        return asdict(before)
    return {"image": digest, "prepare": kind if is_kind else None}


def check_old_controls(old: Origin, path: Path | None) -> None:
    """Require the control images that an old image was generated from."""
    if old.request.control_images:
        count = len(old.request.controls)
        what = f"{count} control images; pass them with --control, in the same order"
        one = "a control image; pass it with --control"
        raise RequestError(f"{path} was generated from {what if count > 1 else one}")


def choose_control(
    source: str | None, kind: str | None, is_used: bool, model: str | None, yes: bool, quiet: bool
) -> str | None:
    """The ControlNet to load, if it is used: the one given, pocket's own, or the lite one, which is offered."""
    if is_used:
        return source or ("pocket" if model == "pocket" else _lite(yes, quiet))
    for name, value in (("--control-model", source), ("--control-kind", kind)):
        if value is not None:
            raise RequestError(f"{name} needs a control image; give one with --control")
    return None


def load_control(
    pipeline: ZImagePipeline, source: str | None, kind: str | None, old: Origin | None, image: Path | None, quiet: bool
) -> None:
    """Load the chosen ControlNet, if any, and say what it is."""
    if source is None:
        return
    opened = pipeline.load_controlnet(source, kind)
    say(f"ControlNet {opened}", quiet)
    if old and old.request.controlnet not in (None, opened.fingerprint):
        warnings.warn(f"{opened.name} is not the ControlNet that {image} was generated with", stacklevel=2)


def _lite(yes: bool, quiet: bool) -> str:
    from ..weights.controlnets import find_controlnet

    if not yes and not (sys.stdin and sys.stdin.isatty()):
        raise ModelNotFoundError(
            f"--control needs a ControlNet; --yes downloads {LITE} ({size(LITE_BYTES)}) if it is not on this machine; "
            f"{TAKES}"
        )
    hub_bars(False)  # the configs are small
    path, repository = find_controlnet(LITE)
    hub_bars(not quiet)
    missing = repository.to_fetch([path]) if repository else 0
    if missing:
        say(f"--control needs a ControlNet. The download of {LITE} takes {size(missing)}.", quiet)
        if not yes and not click.confirm("Continue?", default=True, err=True):
            raise ModelNotFoundError(f"nothing was downloaded; {TAKES}")
    return LITE


def control_notes(request: GenerateRequest, pipeline: ZImagePipeline) -> Iterator[str]:
    """The notes on a request whose model or steps do not suit its ControlNet."""
    opened = pipeline.controlnet
    if opened is None or not request.controls:
        return
    variant, steps = pipeline.variant, request.extent[2]
    if opened.kind.traits is not None and ("base" in opened.kind) != variant.takes_guidance:
        other = "base" if "base" in opened.kind else "Turbo"
        yield f"{opened.name} was trained for {other} Z-Image, but this model is {variant.name}; the image may be worse"
    elif opened.steps is not None and steps < opened.steps and not variant.takes_guidance:
        yield (
            f"{opened.name} was not trained for as few as {counted(steps, 'step')}, so the image may be soft; use "
            f"--steps {opened.steps}, or a ControlNet for 8 steps"
        )
    elif "8-steps" in opened.kind and steps > 2 * variant.steps:
        yield f"{opened.name} was trained for 8 steps, so {steps} may not give a better image"
