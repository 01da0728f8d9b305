from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ModelNotFoundError
from ..sizes import size
from ..variants import TURBO
from .output import hub_bars, progress_bar, say

if TYPE_CHECKING:
    from ..weights.library import Disk

DEFAULT_MODEL = TURBO.repository


@click.group(invoke_without_command=True, epilog="Example: mlx-zimage models; mlx-zimage models rm Z-Image-Turbo-4bit")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per model.")
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models on this machine, or remove one.

    Told are the tiny model of this package, the folders that first runs converted (in MLX_ZIMAGE_HOME, by default
    ~/.cache/mlx-zimage), and the diffusers folders in the Hugging Face cache. Each name is what --model takes; but
    "embeddings" is what was kept of prompts, so that drawing one again needs no text encoder, and the scales that
    models need in float16 (in MLX_ZIMAGE_EMBEDDINGS, by default there too; "off" keeps nothing).
    """
    if ctx.invoked_subcommand:
        return
    from ..weights.library import models

    for model in models():
        if as_json:
            click.echo(json.dumps({**vars(model), "path": str(model.path)}))
        else:
            click.echo(f"{size(model.nbytes):>10}  {model.kind:10}{model.name}")


@models.command(epilog="Example: mlx-zimage models rm Z-Image-Turbo-4bit")
@click.argument("name")
def rm(name: str) -> None:
    """Remove NAME from the disk: a converted folder's name, an id in the Hugging Face cache, or "embeddings"."""
    from ..weights.library import remove

    click.echo(f"{size(remove(name))} are free again")


def first_run(repository: str, yes: bool, quiet: bool) -> Path:
    """Find the default model, or say what having it takes, ask, fetch and convert it. Returns its folder."""
    from ..weights.library import DOWNLOAD, check_space, converted, disks, plan_first_run

    found = converted(repository)
    if found:
        return found
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        raise ModelNotFoundError(
            f"no model is here yet; --yes fetches {repository} (about {DOWNLOAD / 1e9:.0f} GB) and converts it, "
            f"--model takes a folder or 'pocket'"
        )
    from ..convert import convert_steps
    from ..machine import machine_budget

    budget = machine_budget()
    hub_bars(False)  # of the configs
    plan = plan_first_run(repository, budget)
    hub_bars(not quiet)
    kept = "in bfloat16" if plan.bits is None else f"in {plan.bits} bits"
    say(f"No model is here yet. {repository} would be", quiet)
    say(f"  fetched:   {size(plan.download_bytes):>9} into {plan.cache}", quiet)
    say(f"  converted: {size(plan.converted_bytes):>9} into {plan.dest},", quiet)
    say(f"             {kept}, which suits the {size(budget)} of memory to use here", quiet)
    for disk in disks(plan):
        say(f"  disk:      {size(disk.free):>9} are free, {_afterwards(disk)}", quiet)
    check_space(disks(plan))
    say("Files that are whole stay, whenever this is stopped; the same command fetches the rest.", quiet)
    if not yes and not click.confirm("Go on?", default=True, err=True):
        raise ModelNotFoundError("nothing was fetched; --model takes a folder, a Hugging Face id, or 'pocket'")
    with progress_bar(quiet, unit="B", unit_scale=True, desc="Converting") as bar:
        for step in convert_steps(repository, plan.dest, bits=plan.bits):
            bar.total = step.total_bytes
            bar.update(step.done_bytes - bar.n)
    say("The download is needed no longer; this gives its room back:", quiet)
    say(f"  mlx-zimage models rm {repository}", quiet)
    return plan.dest


def _afterwards(disk: Disk) -> str:
    """What is left of a disk after a first run; the download may be removed then."""
    if disk.left < 0:
        return "too few"
    removed = f"; {size(disk.left + disk.download)} once the download is removed" if disk.download else ""
    return f"{size(disk.left)} afterwards{removed}"
