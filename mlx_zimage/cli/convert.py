from __future__ import annotations

from contextlib import closing

import click

from ..errors import RequestError
from ..variants import MEMORIES
from .elsewhere import Command
from .models import DEFAULT_MODEL
from .output import print_path, progress_bar, say
from .values import MODEL_FORMATS, FilePath, ModelName, quantization_options, weights_dtype_option

PARTS = ("transformer", "text_encoder", "vae")
SIZES = [f"{gigabytes}GB" for gigabytes in MEMORIES]  # of --for
# options that choose bits, by name
CHOOSING = {
    **{"bits": "--q-bits", "mode": "--q-mode", "transformer_bits": "--transformer-q-bits"},
    **{"text_encoder_bits": "--text-encoder-q-bits", "target_size": "--target-size"},
}
QUANTIZATION = ("bits", "group_size", "mode", "text_encoder_bits", "transformer_bits", "recipe", "target_size")


@click.command(cls=Command, epilog="Example: mlx-zimage convert z-image-turbo z-image-4bit --q-bits 4")
@click.argument("source", type=ModelName())
@click.argument("dest", type=FilePath())
@click.option(
    "--for",
    "memory_of",
    metavar=f"[{'|'.join(SIZES)}]",
    type=click.Choice(SIZES, case_sensitive=False),
    help="Choose the bits for a Mac with this much memory.",
)
@quantization_options
@click.option(
    "--transformer-q-bits", "transformer_bits", type=int, help="Bits for the transformer.  [default: --q-bits]"
)
@click.option(
    "--text-encoder-q-bits", "text_encoder_bits", type=int, help="Bits for the text encoder.  [default: --q-bits]"
)
@weights_dtype_option
@click.option(
    "--recipe",
    type=click.Choice(["uniform", "mixed"]),
    default="uniform",
    show_default=True,
    help="'mixed' gives the more sensitive of the transformer's quantized matrices more bits than the rest.",
)
@click.option(
    "--target-size", metavar="SIZE", help="Choose bits per layer for the best result within SIZE, such as 6GB."
)
@click.option("--search", is_flag=True, help="Fit the scales by least squares: slower but more accurate.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Generate images with SOURCE to measure which weights matter: much slower, most accurate.",
)
@click.option(
    "--transformer", metavar="OTHER", type=ModelName(), help="Take the transformer from OTHER instead of SOURCE."
)
@click.option(
    "--text-encoder", metavar="OTHER", type=ModelName(), help="Take the text encoder from OTHER instead of SOURCE."
)
@click.option("--vae", metavar="OTHER", type=ModelName(), help="Take the VAE from OTHER instead of SOURCE.")
@click.option("--tokenizer", metavar="OTHER", type=ModelName(), help="Take the tokenizer from OTHER instead of SOURCE.")
@click.option(
    "--base", metavar="OTHER", type=ModelName(), help=f"Take any missing parts from OTHER.  [default: {DEFAULT_MODEL}]"
)
@click.option(
    "--variant", metavar="NAME", help="Variant of SOURCE's files, such as fp16.  [default: files without a variant]"
)
@click.option(
    "--format",
    type=click.Choice(MODEL_FORMATS),
    default="mlx",
    show_default=True,
    help="Output format: mlx (a folder for this program), diffusers (a folder) or comfyui (a single file; comfyui-fp8 "
    "and comfyui-int8 are quantized in ComfyUI's own way).",
)
@click.option(
    "--report",
    "reported",
    is_flag=True,
    help="Compare DEST with SOURCE, by layer and by generated images, and save the report in DEST.",
)
@click.option("--memory", metavar="SIZE", help="Memory budget for --calibrate and --report, such as 12GB.")
@click.option("--upload-repo", metavar="ID", help="Upload DEST and a model card to this Hugging Face repository.")
@click.option("-q", "--quiet", is_flag=True, help="Do not show progress.")
def convert(source, dest, memory_of, reported, upload_repo, quiet, **options):
    """Convert SOURCE to an MLX model folder DEST and print its path.

    SOURCE is a Hugging Face id (ID:PATH for a file or folder in its repository), 'z-image-turbo' (the official
    model as a smaller download), 'z-image', 'pocket', a folder written by diffusers, mflux, mlx-vlm or this program,
    ComfyUI's models folder, or a safetensors or GGUF file. Tensors are converted one at a time, which takes little
    memory. The VAE and a few layers that tolerate no rounding are never quantized. To resume an interrupted
    conversion, run the same command again.
    """
    from ..convert import convert_steps
    from ..convert.choose import quantizations
    from ..convert.report import check_source, check_upload, report_steps, upload
    from ..convert.writer import check_absent
    from ..weights.library import bits_for, register, smaller_parts

    memory, variant = options["memory"], options["variant"]
    if (reported or upload_repo) and options["format"] != "mlx":
        raise RequestError(f"--report and --upload-repo need --format mlx, got {options['format']}")
    if memory and not (reported or options["calibrate"]):
        raise RequestError(
            "--memory only applies to --calibrate and --report; leave it out, since converting alone takes little "
            "memory"
        )
    if reported and (others := [f"--{name}" for name in ("tokenizer", "base") if options[name]]):
        raise RequestError(f"--report generates images with SOURCE's own parts; leave out {' and '.join(others)}")
    if memory_of:
        if given := [flag for name, flag in CHOOSING.items() if options[name] not in (None, "affine")]:
            raise RequestError(f"--for chooses the bits itself; leave out {' and '.join(given)}")
        options["bits"] = bits_for(int(memory_of.removesuffix("GB")))
    quantizations(**{name: options[name] for name in QUANTIZATION})  # raises before anything is downloaded
    check_absent(dest)
    source, options["transformer"] = smaller_parts(source, options["transformer"])
    parts = {name: options[name] for name in PARTS}
    if upload_repo:
        check_upload(upload_repo)
    with closing(convert_steps(source, dest, **options)) as steps:
        if reported:
            check_source(source, memory, variant, parts)
        if options["calibrate"]:
            say("Generating images with SOURCE to calibrate; conversion starts afterwards.", quiet)
        with progress_bar(quiet, unit="B", unit_scale=True) as bar:
            for step in steps:
                bar.total = step.total_bytes
                bar.set_description(step.component, refresh=False)
                bar.update(step.done_bytes - bar.n)
    if reported:
        compared = report_steps(dest, source, memory=memory, variant=variant, parts=parts)
        with progress_bar(quiet, desc="Comparing") as bar, closing(compared) as parts:
            for part in parts:
                bar.total = part.total
                bar.update(part.done - bar.n)
    register(dest)
    if upload_repo:
        upload(dest, upload_repo)
    print_path(dest)
