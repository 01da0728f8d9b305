from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..dtypes import FLOATS
from ..errors import RequestError
from ..jobs import parse_size
from ..quantization import MODES
from ..request import check_size
from ..variants import TURBO
from .output import DEFAULT_DTYPE, say
from .values import FilePath, ModelName

if TYPE_CHECKING:
    from ..bench import Timing

PHASES = {
    "start": "Starting a new process, to the end of its first step:",
    "encode": "Encoding a prompt:",
    "steps": "Denoising:",
    "decode": "Decoding an image:",
}


@click.command(epilog="Example: mlx-zimage bench --model z-image-4bit --json this-machine.json")
@click.option(
    "--model",
    type=ModelName(),
    default="random",
    show_default=True,
    help="Model folder, Hugging Face id, 'pocket', or 'random' (no download).",
)
@click.option(
    "--architecture", type=click.Choice(["full", "small"]), help="Architecture of random weights.  [default: full]"
)
@click.option("--size", default=f"{TURBO.size}x{TURBO.size}", show_default=True, help="Image size in pixels.")
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    default=TURBO.steps,
    show_default=True,
    help="Number of denoising steps.",
)
@click.option(
    "--tokens",
    "caption_tokens",
    type=click.IntRange(1, 512),
    default=96,
    show_default=True,
    help="Prompt length in tokens.",
)
@click.option("--dtype", type=click.Choice(sorted(FLOATS)), help=f"Compute dtype.  [default: {DEFAULT_DTYPE}]")
@click.option("--q-bits", "bits", type=int, help="Bits of random weights.  [default: not quantized]")
@click.option(
    "--q-mode", "mode", type=click.Choice(list(MODES)), help="Quantization mode of random weights.  [default: affine]"
)
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Number of runs; the median is reported."
)
@click.option(
    "--json",
    "file",
    type=FilePath(dir_okay=False, allow_dash=True),
    help="Write the report to this file as JSON; - for stdout.",
)
def bench(model: str, architecture: str | None, size: str, repeat: int, file: Path | None, **case) -> None:
    """Time prompt encoding, denoising steps and decoding on this machine.

    A matrix product of the same width is timed for comparison. Random weights of the real architecture take as much
    time and memory as trained ones. For a model on disk, the time from process start to the first step is reported too.
    """
    say(f"Timing {model} on this machine.")
    from ..bench import Case, Timing, bench_steps, table
    from ..images.files import check_folder, write_file

    if model != "random" and architecture:
        raise RequestError(
            f"--architecture {architecture} only applies to random weights, and {model} has its own; leave it out"
        )
    sides, ratio = parse_size(size)
    if ratio:
        raise RequestError(f"bench needs a size in pixels such as 1024x768, got {size!r}")
    for name, side in sides.items():
        check_size(name, side)
    to_stdout = file == Path("-")
    if file and not to_stdout:
        check_folder(file.parent)
        if file.exists() and not file.is_file():
            raise RequestError(
                f"{file} is not a regular file, so a report cannot replace it; name another file, or - for stdout"
            )
    for event in bench_steps(model, architecture or "full", Case(**sides, **case), repeat):
        if isinstance(event, Timing):
            say(_shown(event))
        else:
            report = event
    text = json.dumps(report)
    if file and not to_stdout:
        write_file(f"{text}\n".encode(), file, overwrite=True)
    click.echo(text if to_stdout else table(report))


def _shown(timing: Timing) -> str:
    if timing.seconds is None:
        return PHASES[timing.phase]
    return f"  run {timing.done} of {timing.total}: {timing.seconds:.3g} s"
