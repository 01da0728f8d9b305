from __future__ import annotations

import json
from pathlib import Path

import click

from ..quantize import MODES


@click.command(epilog="Example: mlx-zimage bench --model z-image-4bit --json this-machine.json")
@click.option(
    "--model", default="random", show_default=True, help="A model folder, an id, 'pocket', or random: no download."
)
@click.option(
    "--architecture", type=click.Choice(["full", "small"]), default="full", show_default=True, help="Of random weights."
)
@click.option("--size", default="1024x1024", show_default=True, help="In pixels.")
@click.option("--steps", type=click.IntRange(1, 1000), default=8, show_default=True)
@click.option("--tokens", "caption_tokens", type=click.IntRange(1, 512), default=96, show_default=True, help="Of text.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="To compute in.  [default: the machine's]"
)
@click.option("--q-bits", "bits", type=int, help="Of random weights.  [default: not quantized]")
@click.option("--q-mode", "mode", type=click.Choice(list(MODES)), default="affine", show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs; their median is told.")
@click.option("--json", "json_file", type=click.File("w", lazy=False), help="Write the report as JSON; - is stdout.")
def bench(model, architecture, size, repeat, json_file, **case):
    """Time prompt encoding, the steps and decoding on this machine, beside a matrix product of the same width.

    Random weights of the real architecture take as long and as much memory as the trained ones. With a model on disk,
    the time from the start of a process to its first step is told too.
    """
    from ..bench import Case, bench, table
    from ..errors import RequestError
    from ..jobs import parse_size
    from ..request import check_size

    sides, ratio = parse_size(size)
    if ratio:
        raise RequestError(f"bench needs a size in pixels such as 1024x768, got {size!r}")
    for name, side in sides.items():
        check_size(name, side)
    report = bench(model, architecture, Case(**sides, **case), repeat)
    if json_file:
        json_file.write(json.dumps(report) + "\n")
    if json_file is None or Path(json_file.name) != Path("<stdout>"):
        click.echo(table(report))
