"""The command line: a command reads its options, makes one call and prints what came of it.

Results go to stdout, everything else to stderr. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import click

from . import __version__
from .errors import ModelNotFoundError, ZImageError
from .quantize import MODES
from .request import RNGS, GenerateRequest

DEFAULT_MODEL = "Tongyi-MAI/Z-Image-Turbo"
ANY_SIZE = 1024  # stands in for a size until the model is open and tells its own


class Commands(click.Group):
    """Turns what the library raises into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except ZImageError as error:
            failure = click.ClickException(str(error))
            failure.exit_code = error.exit_code
            raise failure from error
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-zimage")
def main():
    """Draw pictures from prompts with Z-Image-Turbo, through MLX.

    Results are printed on stdout, progress and messages on stderr. Exit codes: 0 done, 1 failed, 2 a value that
    cannot work, 3 no such model, 4 damaged model files, 6 a result that cannot be written, 7 a folder that another
    process is writing, 8 numbers that are not finite, 130 stopped by Ctrl-C.
    """


@main.command(epilog="Example: mlx-zimage generate 'a lighthouse at dusk' --seed 7 -o lighthouse.png")
@click.argument("prompt")
@click.option(
    "-m",
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    help="A model folder, a Hugging Face id, or 'pocket', the tiny model in this package.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("image.png"),
    show_default=True,
    help="The picture's file: .png, .jpg or .webp. If it exists, NAME-1, NAME-2, ... is written.",
)
@click.option("--overwrite", is_flag=True, help="Write over the output file if it exists.")
@click.option("--width", type=int, help="In pixels, a multiple of 16.  [default: the model's size]")
@click.option("--height", type=int, help="In pixels, a multiple of 16.  [default: the model's size]")
@click.option("--steps", type=int, default=8, show_default=True, help="How often the transformer is called.")
@click.option("--seed", type=int, help="The same seed draws the same picture.  [default: chosen, and told]")
@click.option(
    "--latents",
    "latents_file",
    metavar="FILE.npy",
    type=click.Path(path_type=Path),
    help="The initial noise itself, (pictures, 16, height/8, width/8), in place of the seed's.",
)
@click.option(
    "--rng",
    type=click.Choice(RNGS),
    default="torch",
    show_default=True,
    help="Whose noise a seed gives: PyTorch's, as in diffusers and ComfyUI, or MLX's own.",
)
@click.option("--shift", type=float, help="Bends the schedule towards noise.  [default: the model's, 3.0]")
@click.option(
    "--guidance", "guidance_scale", type=float, default=0.0, show_default=True, help="0 is off; Turbo needs 0."
)
@click.option("--negative-prompt", default="", help="What to steer away from; used when guidance is above 0.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    help="What to compute in.  [default: bfloat16 on a GPU, float32 on a CPU]",
)
def generate(model, output, overwrite, width, height, seed, latents_file, dtype, **options):
    """Draw a picture of PROMPT and print its path."""
    from .image import check_output, read_latents, save

    check_output(output)
    latents = read_latents(latents_file) if latents_file else None
    request = GenerateRequest(
        **options,
        width=ANY_SIZE if width is None else width,
        height=ANY_SIZE if height is None else height,
        seed=secrets.randbits(32) if seed is None else seed,
        num_images=1 if latents is None else len(latents),
    )
    # The request is checked before the model is opened: opening may mean fetching it.
    from tqdm import tqdm

    from .pipeline import Step, ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(model, dtype=dtype)
    size = pipeline.sample_size
    request = replace(request, width=size if width is None else width, height=size if height is None else height)
    click.echo(f"Seed: {request.seed}", err=True)
    with tqdm(total=request.steps, desc="Drawing", unit="step", disable=None) as bar:
        for event in pipeline.stream(request, latents):
            if isinstance(event, Step):
                bar.update()
            else:
                print_path(save(event.pixels, output, overwrite))


@main.command(epilog="Example: mlx-zimage convert Tongyi-MAI/Z-Image-Turbo z-image-4bit --q-bits 4")
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--q-bits", "bits", type=int, help="Bits per weight: 8, 6, 5, 4 or 3.  [default: not quantized]")
@click.option("--q-group-size", "group_size", type=int, help="Weights that share a scale.  [default: the mode's]")
@click.option("--q-mode", "mode", type=click.Choice(list(MODES)), default="affine", show_default=True)
@click.option("--transformer-q-bits", "transformer_bits", type=int, help="Bits of the transformer, where they differ.")
@click.option("--text-encoder-q-bits", "text_encoder_bits", type=int, help="Bits of the text encoder, likewise.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    default="bfloat16",
    show_default=True,
    help="Of the weights that are not quantized.",
)
def convert(source, dest, **options):
    """Write SOURCE as an MLX model folder DEST and print its path.

    SOURCE is a diffusers folder, a Hugging Face id, or 'pocket'. It is converted tensor by tensor, in little memory.
    The layers that quantization hurts, and the VAE, stay in --dtype.
    """
    from tqdm import tqdm

    from .convert import convert_steps

    with tqdm(unit="B", unit_scale=True, disable=None) as bar:
        for step in convert_steps(source, dest, **options):
            bar.total = step.total_bytes
            bar.set_description(step.component, refresh=False)
            bar.update(step.done_bytes - bar.n)
    print_path(dest)


@main.command(epilog="Example: mlx-zimage info pocket")
@click.argument("folder")
def info(folder):
    """Tell what a model FOLDER holds: its networks, their sizes and how they are stored."""
    from .weights import open_checkpoint

    if folder != "pocket" and not Path(folder).expanduser().is_dir():
        raise ModelNotFoundError(f"there is no model folder {folder}")
    checkpoint = open_checkpoint(folder)
    click.echo(f"{checkpoint.folder}")
    click.echo(f"{'':14}{'parameters':>16}{'on disk':>12}  stored as")
    for component in checkpoint.components:
        parameters = sum(prod(shape) for shape in component.config.shapes().values())
        click.echo(f"{component.name:14}{parameters:16,}{_megabytes(component.nbytes):>12}  {_stored_as(component)}")
    side = checkpoint.vae.config.sample_size
    click.echo(f"draws {side}x{side} pixels unless told otherwise")


def print_path(path: Path) -> None:
    """On stdout, alone on its line, byte for byte: file names need not be valid text."""
    click.echo(os.fsencode(path))


def _stored_as(component) -> str:
    """The kinds of weights, such as "4-bit affine in groups of 64 (35 layers), bfloat16"."""
    packed = Counter(component.quantizations.values())
    kinds = [f"{q.bits}-bit {q.mode} in groups of {q.group_size} ({count} layers)" for q, count in packed.most_common()]
    helpers = {f"{layer}.{part}" for layer in component.quantizations for part in ("weight", "scales", "biases")}
    dense = {entry.dtype for name, entry in component.entries.items() if name not in helpers}
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return ", ".join(kinds + sorted(names.get(dtype, dtype) for dtype in dense))


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _show_warning(message, category, filename, lineno, file=None, line=None):
    from tqdm import tqdm

    with tqdm.external_write_mode(nolock=False):  # clears a running bar and draws it again
        click.echo(f"Warning: {message}", err=True)
