from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import RequestError
from ..quantization import MODES
from ..variants import TURBO
from .elsewhere import Command
from .output import printable, say
from .values import FilePath, ModelName, dtype_option, sides, size_options

if TYPE_CHECKING:
    from ..bench import Timing

PHASES = {
    "start": "Timing a new process, from its start to the end of its first step:",
    "encode": "Encoding a prompt:",
    "steps": "Denoising:",
    "decode": "Decoding an image:",
}


@click.command(cls=Command, epilog="Example: mlx-zimage bench --model z-image-4bit --json this-machine.json")
@click.option(
    "--model",
    type=ModelName(converted=True),
    default="random",
    show_default=True,
    help="Model folder, Hugging Face id, 'pocket', or 'random' (no download).",
)
@click.option(
    "--architecture", type=click.Choice(["full", "small"]), help="Architecture of random weights.  [default: full]"
)
@size_options
@click.option("--steps", type=click.IntRange(1, 1000), help="Number of denoising steps.  [default: the model's]")
@click.option(
    "--tokens",
    "caption_tokens",
    type=click.IntRange(1, 512),
    default=96,
    show_default=True,
    help="Prompt length in tokens.",
)
@dtype_option
@click.option("--q-bits", "bits", type=int, help="Bits per weight, for random weights.  [default: not quantized]")
@click.option(
    "--q-mode", "mode", type=click.Choice(list(MODES)), help="Quantization mode of random weights.  [default: affine]"
)
@click.option(
    "--count",
    "--repeat",
    "repeat",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of images; the median of their times is reported.",
)
@click.option(
    "--json",
    "file",
    type=FilePath(dir_okay=False, allow_dash=True),
    help="Write the report to this file as JSON; - for stdout.",
)
def bench(
    model: str, architecture: str | None, size: str | None, width: int | None, height: int | None, repeat: int,
    file: Path | None, **case,
) -> None:  # fmt: skip
    """Time prompt encoding, denoising steps and decoding on this machine.

    A matrix product of the model's width is timed for comparison. Random weights of the real architecture take as much
    time and memory as trained ones. For a model on disk, the time from process start to the first step is reported too.
    """
    say(f"Timing {model} on this machine.")
    from ..bench import Case, Timing, bench_steps, bench_table
    from ..images.files import check_folder, write_file
    from ..weights.checkpoint import open_headers

    if model != "random" and architecture:
        raise RequestError(
            f"--architecture {architecture} only applies to random weights, and {model} has its own; leave it out"
        )
    sides(size, width, height, TURBO.size)  # refuses what can be refused before a model is opened
    to_stdout = file == Path("-")
    if file and not to_stdout:
        check_folder(file.parent)
        if file.exists() and not file.is_file():
            raise RequestError(
                f"{file} is not a regular file, so a report cannot replace it; name another file, or - for stdout"
            )
    side = TURBO.size if model == "random" else open_headers(model).vae.config.sample_size
    width, height = sides(size, width, height, side)
    for event in bench_steps(model, architecture or "full", Case(width, height, **case), repeat):
        if isinstance(event, Timing):
            say(_shown(event))
        else:
            report = event
    text = json.dumps(report)
    if file and not to_stdout:
        write_file(f"{text}\n".encode(), file, overwrite=True)
    click.echo(text if to_stdout else printable(bench_table(report)))


def _shown(timing: Timing) -> str:
    if timing.seconds is None:
        return PHASES[timing.phase]
    return f"  run {timing.done} of {timing.total}: {timing.seconds:.3g} s"
