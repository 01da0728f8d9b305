from __future__ import annotations

import json
import os
from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..dtypes import STORED
from ..errors import CheckpointError, ModelNotFoundError
from ..sizes import counted, size
from ..weights.names import check_sampler, foreign_kind, places
from .elsewhere import Command
from .output import echo, printable
from .values import ModelName

if TYPE_CHECKING:
    from ..weights.component import Component


@click.command(cls=Command, epilog="Example: mlx-zimage info pocket; mlx-zimage info image.png")
@click.argument("source", type=ModelName(converted=True))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(source: str, as_json: bool) -> None:
    """Show what a model folder contains, or how an image was generated.

    SOURCE is a model folder, a Hugging Face id, 'pocket', or an image written by `generate`. For a model: what it was
    converted from, and its networks, their sizes and how they are stored; only its headers are downloaded. For an
    image: everything that `generate --from` needs to generate it again.
    """
    path = Path(source)
    if os.path.isfile(path) and path.suffix.lower() not in (".safetensors", ".gguf"):
        from ..images.metadata import parameters, read_origin

        origin = read_origin(path)
        click.echo(origin.to_json() if as_json else printable(parameters(origin)))
        return
    from ..images.metadata import FORMATS

    if path.suffix.lower() in FORMATS and not path.is_dir():
        raise ModelNotFoundError(
            f"no model folder or image at {source}; `mlx-zimage models` lists the models on this machine"
        )
    from ..weights.checkpoint import read_conversion
    from ..weights.controlnets import is_controlnet

    if is_controlnet(source):
        _print_controlnet(source, as_json)
        return
    try:
        model = describe(source)
    except CheckpointError:
        contents = os.path.isfile(path) and _contents(path)
        if not contents:
            raise
        conversion = read_conversion(path)
        if as_json:
            click.echo(json.dumps({"file": str(path), "conversion": conversion or None, "networks": contents}))
        else:
            echo(str(path))
            _print_conversion(conversion)
            _print_networks(contents)
        return
    to_fetch = model["bytes_to_fetch"]
    if as_json:
        click.echo(json.dumps(model))
        return
    echo(f"{source}, of which {size(to_fetch)} has not been downloaded" if to_fetch else model["folder"])
    _print_conversion(model["conversion"])
    _print_networks(model["networks"])
    side = model["sample_size"]
    echo(f"default size: {side}x{side} pixels")


def _print_conversion(conversion: dict | None) -> None:
    if conversion:
        how = "".join(f", {part}" for part in _how(conversion))
        echo(f"converted from {_origin(conversion)} by {conversion.get('converter', 'another converter')}{how}")


def _print_controlnet(source: str, as_json: bool) -> None:
    from ..weights.controlnets import open_controlnet

    opened = open_controlnet(source, fetch=False)
    network = _network(opened.component)
    if as_json:
        traits = None if opened.kind.traits is None else sorted(opened.kind.traits)
        known = {"controlnet": opened.name, "version": opened.version, "trained_for": traits}
        defaults = {"scale": opened.scale, "steps": opened.steps}
        click.echo(json.dumps({**known, **defaults, "networks": {opened.component.name: network}}))
        return
    echo(str(opened))
    _print_networks({opened.component.name: network})
    echo(f"default scale: {opened.scale:g}")
    if opened.steps:
        echo(f"default steps on Turbo: {opened.steps}")


def _print_networks(networks: dict[str, dict]) -> None:
    echo(f"{'':14}{'parameters':>16}{'on disk':>12}  stored as")
    for name, network in networks.items():
        nbytes, kinds = size(network["bytes"]), ", ".join(network["stored_as"])
        bits = f": {network['bits_per_weight']:.2f} bits per weight" if len(network["stored_as"]) > 1 else ""
        echo(f"{name:14}{network['parameters']:16,}{nbytes:>12}  {kinds}{bits}")


def _contents(file: Path) -> dict[str, dict]:
    """The networks in a single file that cannot be used unconverted, or whose architecture is not known."""
    from ..convert.comfyui import declared
    from ..convert.files import stored_weights
    from ..weights.component import read_metadata
    from ..weights.parts import read_single

    networks: dict[str, dict] = {}
    entries = read_single(file)
    check_sampler(entries, file)
    if foreign_kind(entries):
        return networks
    metadata = [read_metadata(file)]
    layers = declared(entries, metadata, str(file))
    for name, tensor in stored_weights(entries, metadata, str(file)).items():
        kind = layers.get(name.removesuffix(".weight"), {}).get("format", entries[name].dtype)
        for place in places(name) or []:
            if place.part:
                continue
            network = networks.setdefault(place.component, {"parameters": 0, "bytes": 0, "kinds": set()})
            network["parameters"] += prod(tensor.shape)
            network["bytes"] += tensor.nbytes
            network["kinds"].add(STORED.get(kind, kind))
    return {
        name: {
            "parameters": network["parameters"],
            "bytes": network["bytes"],
            "bits_per_weight": 8 * network["bytes"] / network["parameters"],
            "stored_as": sorted(network["kinds"]),
        }
        for name, network in networks.items()
    }


def describe(source: str) -> dict:
    """What `info` shows about a model, ready for JSON."""
    from ..weights.checkpoint import fingerprint, read_conversion
    from ..weights.library import open_to_plan

    checkpoint = open_to_plan(source)
    to_fetch = checkpoint.to_download
    return {
        "folder": str(checkpoint.folder),
        "conversion": read_conversion(checkpoint.folder) or None,
        "variant": checkpoint.variant.name,
        "sample_size": checkpoint.vae.config.sample_size,
        "fingerprint": None if to_fetch else fingerprint(checkpoint),
        "bytes_to_fetch": to_fetch,
        "networks": {component.name: _network(component) for component in checkpoint.components},
    }


def _network(component: Component) -> dict:
    parameters = sum(prod(shape) for shape in component.config.shapes().values())
    return {
        "parameters": parameters,
        "bytes": component.nbytes,
        "bits_per_weight": 8 * component.nbytes / parameters,
        "stored_as": _stored_as(component),
    }


def _origin(conversion: dict) -> str:
    before = conversion.get("before")
    return conversion.get("source", "an unknown source") + (f" (from {_origin(before)})" if before else "")


def _how(conversion: dict) -> list[str]:
    """What `convert` or `fuse` was asked for, besides bits."""
    quantization = conversion.get("quantization", {})
    asked = {
        "with a mixed recipe": quantization.get("recipe") == "mixed",
        "with a custom recipe": quantization.get("recipe") == "custom",
        "calibrated on generated images": quantization.get("calibrated"),
        "with scales fitted by least squares": quantization.get("search") and not quantization.get("calibrated"),
    }
    target = quantization.get("target_bytes")
    within = [f"with a target size of {size(target)}"] if target else []
    loras = conversion.get("loras")
    fused = [f"with {counted(len(loras), 'LoRA')}"] if loras and isinstance(loras, list) else []
    return fused + within + [part for part, was in asked.items() if was]


def _stored_as(component: Component) -> list[str]:
    """The kinds of weights, such as "4-bit affine in groups of 64 (35 layers)" and "bfloat16"."""
    packed = Counter(component.quantizations.values())
    kinds = [
        f"{q.bits}-bit {q.mode} in groups of {q.group_size} ({counted(count, 'layer')})"
        for q, count in packed.most_common()
    ]
    helpers = {f"{layer}.{part}" for layer in component.quantizations for part in ("weight", "scales", "biases")}
    dense = {entry.dtype for name, entry in component.entries.items() if name not in helpers}
    return kinds + sorted(STORED.get(dtype, dtype) for dtype in dense)
