from __future__ import annotations

import click

from ..dtypes import FLOATS
from ..request import check_size
from ..sizes import tell
from ..variants import VARIANTS
from .models import DEFAULT_MODEL


@click.command(epilog="Example: mlx-zimage plan z-image-4bit --width 1024 --height 1024 --memory 6GB")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--variant", type=click.Choice(list(VARIANTS)), help="Which model it is.  [default: recognized]")
@click.option("--width", type=int, help="In pixels, a multiple of 16.  [default: the model's]")
@click.option("--height", type=int, help="In pixels, a multiple of 16.  [default: the model's]")
@click.option("--images", type=click.IntRange(1), default=1, show_default=True, help="Pictures drawn at once.")
@click.option("--tokens", type=click.IntRange(1, 512), default=512, show_default=True, help="Of the prompt.")
@click.option("--steps", type=click.IntRange(1, 1000), help="[default: the model's]")
@click.option("--dtype", type=click.Choice(sorted(FLOATS)), help="What to compute in.")
@click.option("--memory", metavar="SIZE", help="Such as 6GB.  [default: what suits this machine]")
@click.option(
    "--keep/--stage",
    " /--low-ram",
    default=None,
    help="Whether all of the model stays in memory, or each part goes when its work is done.  "
    "[default: it stays if it fits]",
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
    """Tell how MODEL would be run within a memory budget: what stays, what is read as needed, and each phase's bound.

    Reads configs and headers only.
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
    click.echo(f"{images} of {width}x{height} in {tell(plan.budget)}")
    for phase, peak in plan.peaks.items():
        click.echo(f"{phase:13}about {tell(peak)}, at most {tell(plan.rooms[phase])}")
    click.echo(f"networks     {'stay for the next picture' if plan.keep else 'go when their part is done'}")
    footprints = pipeline.planner.footprints
    for name, network in (("encoder", footprints["text_encoder"]), ("transformer", footprints["transformer"])):
        streamed = len(plan.streamed & network.blocks.keys())
        click.echo(f"{name:13}{len(network.blocks) - streamed} blocks in memory, {streamed} read when needed")
    strips = "whole" if plan.strip_bytes is None else f"by strips of {plan.strip_bytes / 1e6:.2g} MB"
    click.echo(f"decoding     {strips}")
