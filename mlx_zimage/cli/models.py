from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ModelNotFoundError, RequestError
from ..sizes import parse_memory, size
from ..variants import TURBO
from .elsewhere import CommandGroup
from .output import echo, hub_bars, progress_bar, say
from .values import ModelName

if TYPE_CHECKING:
    from ..weights.library import Disk

DEFAULT_MODEL = TURBO.repository


LIST = "`mlx-zimage models` lists them"
REMOVE = "use `mlx-zimage models rm NAME`"


@click.group(
    cls=CommandGroup,
    hints={**dict.fromkeys(("list", "ls", "show"), LIST), **dict.fromkeys(("remove", "delete", "uninstall"), REMOVE)},
    default="to show what a model contains: mlx-zimage info {}",
    invoke_without_command=True,
    epilog="Example: mlx-zimage models; mlx-zimage models rm Z-Image-Turbo-4bit",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per model.")
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models on this machine, or remove one.

    Lists the tiny model in this package, models that were converted when a command first needed them (in
    MLX_ZIMAGE_HOME, by default ~/.cache/mlx-zimage), the folders that `convert` wrote, and models in the Hugging Face
    cache. Each is listed under the name that --model takes. Those marked incomplete were not fully downloaded, or are
    missing files; those marked "only" have just some of their networks, such as a VAE that was downloaded for use with
    another model. The entry "embeddings" is the cache of encoded prompts, which lets a repeated prompt skip the text
    encoder; it also holds the factors that keep float16 from overflowing. MLX_ZIMAGE_EMBEDDINGS sets its folder (by
    default in MLX_ZIMAGE_HOME), or disables it with "off".
    """
    if ctx.invoked_subcommand:
        return
    from ..weights.library import models

    for model in models():
        if as_json:
            click.echo(json.dumps({**vars(model), "path": str(model.path)}))
        else:
            without = f"only {', '.join(model.parts)}" if model.parts else "incomplete"
            echo(f"{size(model.nbytes):>10}  {model.kind:10}{model.name}{'' if model.complete else f'  ({without})'}")


@models.command(epilog="Example: mlx-zimage models rm Z-Image-Turbo-4bit")
@click.argument("name", required=False, type=ModelName(listed_only=True))
@click.option(
    "--all", "everything", is_flag=True, help="Delete all models except folders that your own `convert` commands wrote."
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask before deleting all models.")
def rm(name: str | None, everything: bool, yes: bool) -> None:
    """Delete NAME from disk: a converted model or its folder, an id in the Hugging Face cache, or "embeddings"."""
    from ..weights.library import own, remove, remove_all

    if (name is None) != everything:
        raise click.UsageError("give the NAME of a model, or --all")
    if name:
        echo(f"Freed {size(remove(name))}")
        return
    models, kept = own()
    for model in models:
        say(f"delete  {size(model.nbytes):>10}  {model.name}")
    for model in kept:
        say(f"keep    {size(model.nbytes):>10}  {model.name}")
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        raise RequestError("nothing was deleted; --yes deletes without asking")
    if not yes and not click.confirm("Delete?", err=True):
        raise click.Abort
    echo(f"Freed {size(remove_all())}")


def first_run(repository: str, yes: bool, quiet: bool, memory: str | None = None) -> Path:
    """Return the folder of the default model; if there is none, show what it takes, ask, download and convert it."""
    from ..weights.library import DOWNLOAD, check_space, converted, disks, fetch_transformer, plan_first_run

    found = converted(repository)
    if found:
        return found
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        raise ModelNotFoundError(
            f"{repository} is not set up on this machine yet; --yes downloads it (about {DOWNLOAD / 1e9:.0f} GB) and "
            f"converts it; --model takes a folder or 'pocket' (`mlx-zimage models` lists what is here)"
        )
    from ..convert import convert_steps
    from ..machine import machine_budget

    budget = machine_budget() if memory is None else parse_memory(memory)
    hub_bars(False)  # the configs are small
    plan = plan_first_run(repository, budget)
    hub_bars(not quiet)
    stored = "bfloat16" if plan.bits is None else f"{plan.bits}-bit"
    say(f"{repository} is not set up on this machine yet. To set it up:", quiet)
    say(f"  download: {size(plan.download_bytes):>9} to {plan.cache}", quiet)
    if plan.transformer:
        say(f"            the transformer in bfloat16 from {plan.transformer.partition('@')[0]}", quiet)
    elif plan.remark:
        say(f"            the transformer in float32: {plan.remark}", quiet)
    say(f"  convert:  {size(plan.converted_bytes):>9} to {plan.dest},", quiet)
    say(f"            {stored}, chosen for a memory budget of {size(budget)}", quiet)
    for disk in disks(plan):
        say(f"  disk:     {size(disk.free):>9} free now, {_afterwards(disk)}", quiet)
    check_space(disks(plan))
    say("If interrupted, run the same command again to download the rest.", quiet)
    if not yes and not click.confirm("Continue?", default=True, err=True):
        raise ModelNotFoundError("nothing was downloaded; --model takes a folder, a Hugging Face id, or 'pocket'")
    transformer = plan.transformer
    if transformer and (fault := fetch_transformer(transformer)):
        say(f"{fault}; downloading the transformer of {repository} instead", quiet)
        transformer = None
    with progress_bar(quiet, unit="B", unit_scale=True, desc="Converting") as bar:
        for step in convert_steps(repository, plan.dest, bits=plan.bits, transformer=transformer):
            bar.total = step.total_bytes
            bar.update(step.done_bytes - bar.n)
    say("The download is no longer needed; to delete it:", quiet)
    say(f"  mlx-zimage models rm {repository}", quiet)
    if transformer:
        say(f"  mlx-zimage models rm {transformer.partition('@')[0]}", quiet)
    return plan.dest


def _afterwards(disk: Disk) -> str:
    """How much of a disk is free after a first run, and once the download is deleted."""
    if disk.left < 0:
        return "not enough"
    removed = f", {size(disk.left + disk.download)} once the download is deleted" if disk.download else ""
    return f"{size(disk.left)} afterwards{removed}"
