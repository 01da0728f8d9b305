from __future__ import annotations

import click

from ..errors import CheckpointError
from ..sizes import counted
from ..weights.manifest import read_manifest
from .elsewhere import Command
from .output import echo, progress_bar
from .values import ModelName


@click.command(cls=Command, epilog="Example: mlx-zimage verify z-image-4bit")
@click.argument("folder", type=ModelName(converted=True))
@click.option("-q", "--quiet", is_flag=True, help="Do not show progress.")
def verify(folder: str, quiet: bool) -> None:
    """Check every byte of a model FOLDER, or of a ControlNet's folder or file, and report any faults.

    Files are compared with the checksums written by `convert`. Headers, names, shapes and values are always checked,
    so a diffusers folder can be verified too, but without checksums a changed weight is only detected if it is not
    finite. The exit code is 4 if anything is wrong.
    """
    from ..convert.verify import fetch_all, verify_steps

    path = fetch_all(folder)
    faults = 0
    with progress_bar(quiet, unit="B", unit_scale=True, desc="Verifying") as bar:
        for step in verify_steps(path):
            bar.total = step.total_bytes
            bar.update(step.done_bytes - bar.n)
            if step.fault:
                faults += 1
                with bar.external_write_mode():
                    echo(f"{step.name}: {step.fault}")
    if faults:
        raise CheckpointError(f"{path} is damaged: {counted(faults, 'fault')} found; download or convert it again")
    checked = "all checksums match" if read_manifest(path) else "headers and values only; no checksums to compare with"
    echo(f"{path} is intact ({checked})")
