from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from ..weights import official
from .elsewhere import CommandGroup
from .output import echo, print_path
from .values import FilePath, LoraName, ModelName

if TYPE_CHECKING:
    from ..weights.lora import Lora


@click.group(
    cls=CommandGroup,
    hints=dict.fromkeys(("list", "ls"), "LoRAs are not stored: `generate --lora FILE` reads one from any path"),
    default="to show what a LoRA contains: mlx-zimage lora info {}",
    epilog="Example: mlx-zimage lora info style.safetensors",
)
def lora() -> None:
    """Show what a LoRA contains, or convert it for other programs."""


def with_model(command: Any) -> Any:
    return click.option(
        "--model", type=ModelName(), help="The model that the LoRA is for.  [default: Z-Image's published architecture]"
    )(command)


@lora.command(epilog="Example: mlx-zimage lora info style.safetensors")
@click.argument("file", type=LoraName())
@with_model
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(file: str, model: str | None, as_json: bool) -> None:
    """Show the dialect, rank, alpha, layers and trigger words of a LoRA, and which keys do not match the model.

    FILE is a safetensors file, a PEFT folder, a Hugging Face id, or id:file.
    """
    from ..weights.lora import describe

    found = describe(_read(file, model, partial=True))
    if as_json:
        click.echo(json.dumps(found))
        return
    echo(f"{found['file']}: {found['dialect']}")
    for network, kinds in found["networks"].items():
        for kind, count in kinds.items():
            echo(f"{network:14}{count:5} {kind}")
    for label in ("ranks", "alphas", "scales", "targets", "trigger_words", "ignored", "unmatched"):
        values = found[label]
        if values:
            shown = ", ".join(map(str, values[:5]))
            echo(f"{label.replace('_', ' ')}: {shown}" + (f" and {len(values) - 5} more" if len(values) > 5 else ""))


@lora.command(epilog="Example: mlx-zimage lora convert style.safetensors style-comfyui.safetensors --to comfyui")
@click.argument("file", type=LoraName())
@click.argument("out", type=FilePath())
@click.option("--to", type=click.Choice(["comfyui", "diffusers"]), required=True, help="The program that will read it.")
@with_model
def convert(file: str, out: Path, to: str, model: str | None) -> None:
    """Write the LoRA FILE to OUT with the names that another program expects, and print its path."""
    from ..weights.lora_writer import write_lora

    if out.exists():
        raise RequestError(f"{out} already exists; choose another name")
    if out.suffix != ".safetensors":
        raise RequestError(f"{out} must end with .safetensors")
    write_lora(_read(file, model, partial=False), out, to)
    print_path(out)


def _read(file: str, model: str | None, partial: bool) -> Lora:
    from ..models import NETWORKS
    from ..weights.checkpoint import open_headers
    from ..weights.lora import ADAPTED, find_lora, read_lora

    if model is None:
        configs = {name: NETWORKS[name].from_dict(official.CONFIGS[name]) for name in ADAPTED}
    else:
        checkpoint = open_headers(model)
        configs = {name: checkpoint.networks[name].config for name in ADAPTED}
    return read_lora(find_lora(file), configs, partial)
