from __future__ import annotations

import click

from ..dtypes import FLOATS
from ..request import check_size
from ..sizes import rounded_up
from .models import DEFAULT_MODEL
from .output import DEFAULT_DTYPE


@click.command(epilog="Example: mlx-zimage plan z-image-4bit --width 1024 --height 1024 --memory 6GB")
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--variant",
    metavar="NAME",
    help="turbo or base, if the model is mistaken for the other, or the variant of its files, such as fp16.",
)
@click.option("--width", type=int, help="Width in pixels, a multiple of 16.  [default: the model's]")
@click.option("--height", type=int, help="Height in pixels, a multiple of 16.  [default: the model's]")
@click.option("--images", type=click.IntRange(1), default=1, show_default=True, help="Images per batch.")
@click.option("--tokens", type=click.IntRange(1, 512), default=512, show_default=True, help="Prompt length in tokens.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Number of denoising steps.  [default: the model's]")
@click.option(
    "--dtype",
    type=click.Choice(sorted(FLOATS)),
    help=f"Compute dtype.  [default: {DEFAULT_DTYPE}]",
)
@click.option("--memory", metavar="SIZE", help="Memory budget, such as 6GB.  [default: based on this machine]")
@click.option(
    "--keep/--stage",
    " /--low-ram",
    default=None,
    help="Keep the whole model in memory between images, or unload each network after use.  [default: keep if it fits]",
)
def plan(
    model: str,
    variant: str | None,
    width: int | None,
    height: int | None,
    images: int,
    tokens: int,
    steps: int | None,
    dtype: str | None,
    memory: str | None,
    keep: bool | None,
) -> None:
    """Show how MODEL would run within a memory budget, without loading it.

    Prints the peak memory of each phase, and which blocks stay in memory and which are streamed from disk. Only configs
    and weight headers are read.
    """
    from ..memory import Workload
    from ..pipeline import ZImagePipeline

    for name, value in (("width", width), ("height", height)):
        if value is not None:
            check_size(name, value)
    pipeline = ZImagePipeline.from_pretrained(model, dtype=dtype, memory=memory, keep=keep, variant=variant)
    width, height = width or pipeline.sample_size, height or pipeline.sample_size
    prompts = 2 if pipeline.variant.guidance_scale else 1
    work = Workload(width, height, images, tokens, steps or pipeline.variant.steps, prompts)
    plan = pipeline.planner.plan(work, pipeline.budget, keep)
    click.echo(
        f"{images} image{'s' if images > 1 else ''} of {width}x{height}, memory budget {rounded_up(plan.budget)}"
    )
    for phase, peak in plan.peaks.items():
        click.echo(f"{phase:13}about {rounded_up(peak)}, at most {rounded_up(plan.rooms[phase])}")
    click.echo(f"networks     {'kept in memory between images' if plan.keep else 'unloaded after use'}")
    footprints = pipeline.planner.footprints
    for name, network in (("encoder", footprints["text_encoder"]), ("transformer", footprints["transformer"])):
        streamed = len(plan.streamed & network.blocks.keys())
        click.echo(f"{name:13}{len(network.blocks) - streamed} blocks in memory, {streamed} streamed from disk")
    strips = "in one piece" if plan.strip_bytes is None else f"in strips of {plan.strip_bytes / 1e6:.2g} MB"
    click.echo(f"decoding     {strips}")
