from __future__ import annotations

import click

from ..errors import CheckpointError
from .output import progress_bar


@click.command(epilog="Example: mlx-zimage verify z-image-4bit")
@click.argument("folder")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(folder: str, quiet: bool) -> None:
    """Check every byte of a model FOLDER and print what is wrong with it.

    Files are compared with the checksums that `convert` wrote; headers, names, shapes and values are checked in any
    case, so a diffusers folder can be verified too, though a changed weight is then found only if it is not finite.
    Exits with 4 if anything is wrong.
    """
    from ..convert.verify import verify_steps
    from ..weights.hub import resolve
    from ..weights.manifest import read_manifest

    path = resolve(folder)
    faults = 0
    with progress_bar(quiet, unit="B", unit_scale=True, desc="Verifying") as bar:
        for step in verify_steps(path):
            bar.total = step.total_bytes
            bar.update(step.done_bytes - bar.n)
            if step.fault:
                faults += 1
                with bar.external_write_mode():
                    click.echo(f"{step.name}: {step.fault}")
    if faults:
        raise CheckpointError(f"{path} is damaged: {faults} fault{'s' if faults > 1 else ''} found")
    checked = "every checksum" if read_manifest(path) else "headers and values; it has no checksums"
    click.echo(f"{path} is whole ({checked})")
