from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..errors import RequestError
from ..variants import TURBO
from .output import printable, say
from .values import ModelName, sides, size_options


@click.group(epilog="Example: mlx.launch --hostfile hosts.json -- mlx-zimage distributed check")
def distributed() -> None:
    """Check machines that generate images together."""


@distributed.command(
    epilog="Example: mlx.launch --hostfile hosts.json -- mlx-zimage distributed check --size 2048x2048"
)
@click.option("--model", type=ModelName(), help="Also compare every byte of this model's weights.")
@size_options
@click.option(
    "--architecture",
    type=click.Choice(["full", "small"]),
    default="full",
    show_default=True,
    help="Architecture to time, with random weights.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(
    model: str | None, size: str | None, width: int | None, height: int | None, architecture: str, as_json: bool
) -> None:
    """Show the machines of a group, how fast they communicate, and how much faster they are together.

    Start it with mlx.launch, as you would `generate`. Versions or weights that differ are an error. Speeds are measured
    with a few blocks of random weights, at the size that you give.
    """
    from ..distributed import Group, preparing
    from ..survey import survey, survey_table
    from ..weights.checkpoint import open_checkpoint

    width, height = sides(size, width, height, TURBO.size)
    group = Group.launched()
    if group is None:
        raise RequestError(
            "this is the only machine; start the command on all of them with "
            "`mlx.launch --hostfile hosts.json -- mlx-zimage distributed check`"
        )
    say(f"Comparing and timing {group.size} machines; this takes a minute or more.", not group.leads)
    with preparing(group):
        checkpoint = open_checkpoint(model) if model else None
    found = survey(group, width, height, checkpoint, architecture)
    if group.leads:
        summary = asdict(found) | {"speed_up": found.speed_up}
        click.echo(json.dumps(summary) if as_json else printable(survey_table(found, width, height)))
