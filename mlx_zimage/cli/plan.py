from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import RequestError
from ..request import GenerateRequest, Outpaint
from ..sizes import counted, parse_memory, rounded_up, size
from ..variants import TURBO
from .adapters import WithLoras, lora_options
from .models import DEFAULT_MODEL
from .values import FilePath, LoraName, ModelName, dtype_option, keep_option, sides, size_options, variant_option

if TYPE_CHECKING:
    import mlx.core as mx

    from ..memory import Plan, Planner, Workload
    from ..weights.checkpoint import Checkpoint
    from ..weights.overlay import Extra


@click.command(cls=WithLoras, epilog="Example: mlx-zimage plan z-image-4bit --width 1024 --height 1024 --memory 6GB")
@click.argument("model", required=False, type=ModelName(converted=True))
@variant_option
@size_options
@click.option(
    "--count",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of images or, with --images, of batches.",
)
@click.option("--images", type=click.IntRange(1), default=1, show_default=True, help="Images per batch.")
@click.option("--tokens", type=click.IntRange(1, 512), default=512, show_default=True, help="Prompt length in tokens.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Number of denoising steps.  [default: the model's]")
@click.option("--image", "image_file", metavar="FILE", type=FilePath(), help="Plan for starting from this image.")
@click.option(
    "--strength", type=float, help="Fraction of the steps to run when starting from an image.  [default: 0.6]"
)
@click.option("--outpaint", metavar="SIDES", help="Plan for extending --image on these sides: left=256,top=128.")
@click.option(
    "--upscale", type=float, metavar="FACTOR", help="Plan for enlarging --image, or the image generated first."
)
@click.option("--tile", type=int, metavar="PIXELS", help="Largest side of the tiles for --upscale, as in `generate`.")
@click.option("--control-model", metavar="PATH", type=LoraName(), help="Plan for a control image with this ControlNet.")
@lora_options
@dtype_option
@click.option("--memory", metavar="SIZE", help="Memory budget, such as 6GB.  [default: based on this machine]")
@keep_option
def plan(
    model: str | None,
    variant: str | None,
    count: int,
    images: int,
    tokens: int,
    steps: int | None,
    image_file: Path | None,
    strength: float | None,
    outpaint: str | None,
    upscale: float | None,
    tile: int | None,
    control_model: str | None,
    loras: list[tuple[str, float | None]],
    lora_partial: bool,
    dtype: str | None,
    memory: str | None,
    keep: bool | None,
    **shape,
) -> None:
    """Show how MODEL would run within a memory budget, without loading it.

    Prints the peak memory of each phase, and which blocks stay in memory and which are streamed from disk. With
    --upscale, the figures are for the enlarged image. Only configs and weight headers are read, or downloaded from
    the Hugging Face hub. Without MODEL, prints a table of what the default model would need here for each number of
    bits; that needs no internet connection.
    """
    import mlx.core as mx

    from ..inputs import Inputs
    from ..machine import default_dtype, machine_budget
    from ..memory import Planner
    from ..models import CONTROLNET
    from ..pipeline import completed, workload
    from ..weights.controlnets import open_controlnet
    from ..weights.library import CHOICES, choose_bits, open_to_plan, planned

    if control_model is not None and model is None:
        raise RequestError("--control-model needs MODEL; give the model that it is for")
    sides(**shape, default=TURBO.size)  # refuses what can be refused before a model is opened
    inputs = Inputs(image=image_file)
    asked = GenerateRequest(
        "-",
        seed=0,
        steps=steps,
        num_images=images,
        strength=strength,
        outpaint=None if outpaint is None else Outpaint.of(outpaint),
        upscale=upscale,
        tile=tile,
        **inputs.digests,
    )
    asked.check_image()
    budget = machine_budget() if memory is None else parse_memory(memory)
    compute = getattr(mx, dtype or default_dtype())

    def works(checkpoint: Checkpoint) -> list[Workload]:
        """What the parts of the request need, in turn."""
        side = checkpoint.vae.config.sample_size
        given = {name: shape[name] for name in ("width", "height")}
        if shape["size"]:
            given = dict(zip(given, sides(**shape, default=side), strict=True))
        request = completed(replace(asked, **given), inputs, side, checkpoint.variant)
        extras = _extras(checkpoint, compute, loras, lora_partial)
        return [workload(part, tokens, extras) for part in request.parts]

    if model is not None:
        checkpoint = open_to_plan(model, variant)
        planner = Planner(checkpoint, compute)
        parts = works(checkpoint)
        if control_model is not None:
            opened = open_controlnet(control_model, transformer=checkpoint.transformer.config, fetch=False)
            planner.set_controlnet(opened.component, CONTROLNET)
            parts = [replace(work, from_image=True, controls=1) for work in parts]
        plans = [planner.plan(work, budget, keep) for work in parts]
        _show(planner, max(plans, key=lambda plan: plan.room), _images(parts, count))
        return
    parts = works(planned(None))
    click.echo(f"{DEFAULT_MODEL}: {_images(parts, count)}, memory budget {rounded_up(budget)}")
    click.echo(f"{'':10}{'on disk':>10}{'peak':>10}")
    sizes = {}
    for bits in CHOICES:
        checkpoint = planned(bits)
        sizes[bits] = checkpoint.nbytes
        row = _row(Planner(checkpoint, compute), parts, budget, keep)
        click.echo(f"{_stored(bits):10}{size(sizes[bits]):>10}{row}")
    machine = "this machine" if memory is None else "a machine with this budget"
    click.echo(
        f"The first `mlx-zimage generate` on {machine} converts the model to {_stored(choose_bits(sizes, budget))}."
    )


def _extras(
    checkpoint: Checkpoint, dtype: mx.Dtype, loras: list[tuple[str, float | None]], partial: bool
) -> dict[str, Extra]:
    """What LoRAs add to the memory of each network. Reads only their headers, but LoRAs on the hub are downloaded
    whole."""
    from ..weights.blocks import Blocks
    from ..weights.lora import ADAPTED, find_lora, read_lora
    from ..weights.overlay import Overlay

    networks = {name: checkpoint.networks[name] for name in ADAPTED}
    configs = {name: component.config for name, component in networks.items()}
    read = {path: read_lora(find_lora(path), configs, partial, headers=True) for path, _ in loras}
    strengths = {path: 1.0 if strength is None else strength for path, strength in loras}
    return {
        name: Overlay(Blocks(component, dtype), configs[name]).extra_of(
            {path: lora.deltas.get(name, {}) for path, lora in read.items()}, strengths
        )
        for name, component in networks.items()
    }


def _stored(bits: int | None) -> str:
    return f"{bits} bits" if bits else "bfloat16"


def _row(planner: Planner, works: list[Workload], budget: int, keep: bool | None) -> str:
    """The peak memory of these workloads, and where the weights are in the largest."""
    plan = max((planner.best(work, budget, keep) for work in works), key=lambda plan: plan.room)
    if plan.room > budget:
        return f"{'':10}  needs a budget of {rounded_up(plan.room)}"
    blocks = planner.footprints["transformer"].blocks
    streamed = len(plan.streamed & blocks.keys())
    if plan.keep:
        where = "kept in memory between images"
    elif streamed:
        where = f"{streamed} of the transformer's {len(blocks)} blocks streamed from disk in each step"
    else:
        where = "each network loaded for every image"
    return f"{size(plan.peak):>10}  {where}"


def _show(planner: Planner, plan: Plan, images: str) -> None:
    click.echo(f"{images}, memory budget {rounded_up(plan.budget)}")
    for phase, peak in plan.peaks.items():
        click.echo(f"{phase:13}about {rounded_up(peak)}, at most {rounded_up(plan.rooms[phase])}")
    click.echo(f"networks     {'kept in memory between images' if plan.keep else 'unloaded after use'}")
    footprints = planner.footprints
    shown = {"encoder": "text_encoder", "transformer": "transformer", "controlnet": "controlnet"}
    for name, network in ((name, footprints[own]) for name, own in shown.items() if own in footprints):
        streamed = len(plan.streamed & network.blocks.keys())
        kept = counted(len(network.blocks) - streamed, "block")
        click.echo(f"{name:13}{kept} in memory, {streamed} streamed from disk")
    strips = "in one piece" if plan.strip_bytes is None else f"in strips of {plan.strip_bytes / 1e6:.2g} MB"
    click.echo(f"decoding     {strips}")


def _images(works: list[Workload], count: int) -> str:
    first, last = works[0], works[-1]
    images = f"{counted(first.images * count, 'image')} of {first.width}x{first.height}"
    if len(works) > 1:
        images += f", upscaled to {last.width}x{last.height}"
    if last.tiles:
        images += f" in {counted(last.tiles.count, 'tile')}"
    return images if count == 1 else f"{images}, {first.images} at a time"
