from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from ..errors import RequestError
from ..quantization import MODES
from .models import DEFAULT_MODEL
from .output import print_path, progress_bar, say


@click.command(epilog="Example: mlx-zimage convert Tongyi-MAI/Z-Image-Turbo z-image-4bit --q-bits 4")
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--q-bits", "bits", type=int, help="Bits per weight: 8, 6, 5, 4, 3 or 2.  [default: not quantized]")
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
@click.option(
    "--recipe",
    type=click.Choice(["uniform", "mixed"]),
    default="uniform",
    show_default=True,
    help="mixed gives the transformer's most sensitive matrices more bits than the rest.",
)
@click.option("--target-size", metavar="SIZE", help="Such as 6GB: each layer gets the bits that are best within it.")
@click.option("--search", is_flag=True, help="Fit the scales by least squares: slower, and nearer to the source.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Draw with SOURCE first and pack what its pictures need: much slower, and nearest.",
)
@click.option("--text-encoder", metavar="SOURCE", help="Where the text encoder comes from, if not from SOURCE.")
@click.option("--vae", metavar="SOURCE", help="Where the VAE comes from, if not from SOURCE.")
@click.option("--tokenizer", metavar="SOURCE", help="Where the tokenizer comes from, if not from SOURCE.")
@click.option("--base", metavar="SOURCE", help=f"What gives all that is still missing.  [default: {DEFAULT_MODEL}]")
@click.option(
    "--format",
    type=click.Choice(["mlx", "diffusers", "comfyui"]),
    default="mlx",
    show_default=True,
    help="mlx is a folder for this program; diffusers (a folder) and comfyui (one file) lead back.",
)
@click.option(
    "--report",
    "reported",
    is_flag=True,
    help="Compare DEST with SOURCE, by layer and by pictures, and write it into DEST.",
)
@click.option("--memory", metavar="SIZE", help="What drawing for --calibrate and --report may use, such as 12GB.")
@click.option("--upload-repo", metavar="ID", help="Send DEST, with a model card, to this repository of the hub.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only the folder's path.")
def convert(source, dest, reported, upload_repo, quiet, **options):
    """Write SOURCE as an MLX model folder DEST and print its path.

    SOURCE is a diffusers folder, a Hugging Face id, 'pocket', a folder of this program's or of mflux, or a safetensors
    or GGUF file. It is converted tensor by tensor, in little memory. The layers that quantization hurts, and the VAE,
    stay in --dtype. A conversion that was killed goes on where it was when the same command is given again.
    """
    from ..convert import convert_steps
    from ..convert.report import check_source, check_upload, report_steps, upload

    memory = options["memory"]
    if (reported or upload_repo) and options["format"] != "mlx":
        raise RequestError(f"--report and --upload-repo are for folders of this program's, not {options['format']}")
    if memory and not (reported or options["calibrate"]):
        raise RequestError("--memory is for --calibrate and --report; a conversion needs little")
    given = [f"--{name.replace('_', '-')}" for name in ("text_encoder", "vae", "tokenizer", "base") if options[name]]
    if reported and given:
        raise RequestError(f"--report compares with SOURCE alone; leave {' and '.join(given)} out")
    if upload_repo:
        check_upload(upload_repo)
    with closing(convert_steps(source, dest, **options)) as steps:
        if reported:
            check_source(source, memory)
        if options["calibrate"]:
            say("Drawing with the source to calibrate; the conversion follows.", quiet)
        with progress_bar(quiet, unit="B", unit_scale=True) as bar:
            for step in steps:
                bar.total = step.total_bytes
                bar.set_description(step.component, refresh=False)
                bar.update(step.done_bytes - bar.n)
    if reported:
        with progress_bar(quiet, desc="Comparing") as bar, closing(report_steps(dest, source, memory=memory)) as parts:
            for part in parts:
                bar.total = part.total
                bar.update(part.done - bar.n)
    if upload_repo:
        upload(dest, upload_repo)
    print_path(dest)
