from __future__ import annotations

from contextlib import closing

import click

from .adapters import WithLoras, lora_options
from .output import print_path, progress_bar
from .values import MODEL_FORMATS, FilePath, ModelName, quantization_options, weights_dtype_option


@click.command(
    cls=WithLoras,
    epilog="Example: mlx-zimage fuse z-image-turbo --lora style.safetensors 0.8 styled --q-bits 4",
)
@click.argument("model", type=ModelName())
@click.argument("dest", type=FilePath())
@lora_options
@quantization_options
@weights_dtype_option
@click.option(
    "--format", type=click.Choice(MODEL_FORMATS), default="mlx", show_default=True,
    help="Output format, as in `mlx-zimage convert`.",
)  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Do not show progress.")
def fuse(model, dest, loras, lora_partial, quiet, **options):
    """Add LoRAs to the weights of MODEL, write the result to DEST, and print its path.

    MODEL is anything that `mlx-zimage convert` reads. LoRAs are added before weights are rounded or quantized, so the
    sum is rounded only once. `generate --lora` needs no fused model, and can change strengths at any time.
    """
    from ..convert import convert_steps
    from ..convert.choose import quantizations
    from ..convert.writer import check_absent
    from ..weights.library import register

    if not loras:
        raise click.UsageError("Missing option '--lora'; give at least one LoRA to fuse.")
    quantizations(options["bits"], options["group_size"], options["mode"])  # raises before anything is downloaded
    check_absent(dest)
    uses = [(path, 1.0 if strength is None else strength) for path, strength in loras]
    with (
        closing(convert_steps(model, dest, loras=uses, partial=lora_partial, **options)) as steps,
        progress_bar(quiet, unit="B", unit_scale=True) as bar,
    ):
        for step in steps:
            bar.total = step.total_bytes
            bar.set_description(step.component, refresh=False)
            bar.update(step.done_bytes - bar.n)
    register(dest)
    print_path(dest)
