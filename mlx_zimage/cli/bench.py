from __future__ import annotations

import json

import click

from ..quantize import MODES


@click.command(epilog="Example: mlx-zimage bench z-image-4bit --json > this-machine.json")
@click.argument("model", default="random")
@click.option(
    "--architecture", type=click.Choice(["full", "small"]), default="full", show_default=True, help="Of random weights."
)
@click.option("--width", type=int, default=1024, show_default=True)
@click.option("--height", type=int, default=1024, show_default=True)
@click.option("--steps", type=int, default=8, show_default=True)
@click.option("--tokens", "caption_tokens", type=int, default=64, show_default=True, help="Of the prompt.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--q-bits", "bits", type=int, help="Of random weights.  [default: not quantized]")
@click.option("--q-mode", "mode", type=click.Choice(list(MODES)), default="affine", show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs; their median is told.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(model, architecture, repeat, as_json, **case):
    """Time prompt encoding, the steps and decoding on this machine, beside a matrix product of the same width.

    MODEL is a model folder, an id or 'pocket'. Left out, it is random weights of the real architecture, which take as
    long and as much memory as the trained ones, and no download.
    """
    from ..bench import Case, bench, table
    from ..request import check_size

    check_size("width", case["width"])
    check_size("height", case["height"])
    report = bench(model, architecture, Case(**case), repeat)
    click.echo(json.dumps(report) if as_json else table(report))
