"""The command line: a command reads its options, makes one call and prints the result.

Results go to stdout, everything else to stderr. A command's module is imported when the command is called, and modules
that load MLX, NumPy or PIL only when it runs: importing those takes longer than anything else --help and completion do.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import termios
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

import click

from ..errors import OutputError, ZImageError, plain
from ..failures import explained
from ..launched import is_launched, launched_rank
from ..version import __version__
from .elsewhere import no_such_command
from .stop import Terminated, stoppable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COMMANDS = {  # name of the command and its module: the first sentence of its help
    "bench": "Time prompt encoding, denoising steps and decoding on this machine.",
    "completion": "Print or install the completion script for bash, zsh or fish.",
    "convert": "Convert SOURCE to an MLX model folder DEST and print its path.",
    "distributed": "Check machines that generate images together.",
    "doctor": "Check this machine: system, MLX build, memory, disk and MLX's arithmetic.",
    "fuse": "Add LoRAs to the weights of MODEL, write the result to DEST, and print its path.",
    "generate": "Generate one or more images from PROMPT and print their paths.",
    "info": "Show what a model folder contains, or how an image was generated.",
    "lora": "Show what a LoRA contains, or convert it for other programs.",
    "models": "List the models on this machine, or remove one.",
    "plan": "Show how MODEL would run within a memory budget, without loading it.",
    "serve": "Serve images over HTTP, to your browser and to clients of OpenAI's and AUTOMATIC1111's APIs.",
    "train": "Train a LoRA on the images in the folder DATASET, and print its path.",
    "verify": "Check every byte of a model FOLDER, or of a ControlNet's folder or file, and report any faults.",
}


@contextmanager
def _plain_usage() -> Iterator[None]:
    """Make click's own errors safe to print: they repeat what was typed."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # its message is the help
        raise
    except click.ClickException as error:
        error.message = plain(error.message)  # type: ignore[misc]
        raise


class Commands(click.Group):
    """Loads the command that is called, and turns errors and signals into one line on stderr and an exit code.

    `commands` holds placeholders with a name and the first sentence of the help: all that listing them needs.
    """

    @_plain_usage()
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            no_such_command(error.option_name, {}, ctx)
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args:
            no_such_command(args[0], self.commands, ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if command and name in COMMANDS:
            command = getattr(importlib.import_module(f".{name}", __name__), name)
        return name, command, rest

    def main(self, *args: Any, **options: Any) -> Any:
        hold_descriptors()
        return super().main(*args, **options)

    @_plain_usage()
    def invoke(self, ctx: click.Context) -> object:
        try:
            with warnings.catch_warnings(), stoppable(), explained():
                warnings.showwarning = _show_warning
                if is_launched():
                    from ..machine import avoid_cuda_graphs  # imports MLX, so only in a group

                    avoid_cuda_graphs()
                return super().invoke(ctx)
        except ZImageError as error:
            _fail(ctx, error, error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of our output is gone; click exits quietly
            if error.errno == errno.EIO and _terminal_is_closed():
                ctx.exit(128 + signal.SIGHUP)  # the signal was about to arrive
            _fail(ctx, error, OutputError.exit_code if error.errno in FULL else 1)
        except (KeyboardInterrupt, Terminated, click.Abort) as stop:
            if isinstance(stop, click.Abort) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise  # end of input at a prompt
            with suppress(OSError):  # a closed terminal takes no message
                click.echo("Stopped.", err=True)
            ctx.exit(128 + stop.args[0] if isinstance(stop, Terminated) else 130)


@click.group(
    cls=Commands,
    commands=[click.Command(name, short_help=summary) for name, summary in COMMANDS.items()],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="mlx-zimage")
def main() -> None:
    """Generate images from text with Z-Image-Turbo on MLX.

    Results go to stdout, progress and messages to stderr. Exit codes: 0 success, 1 other failure, 2 invalid
    value, 3 model not found, 4 damaged model files, 5 not enough memory, 6 output cannot be written, 7 folder
    locked by another process, 8 wrong or non-finite numbers, 9 GPU failure, 10 another machine of a group failed,
    130 stopped by Ctrl-C, 143 stopped by SIGTERM, 129 stopped because the terminal was closed.
    """


def hold_descriptors() -> None:
    """Open descriptors 0 to 2 where they are closed, as under launchd, cron or `<&-`.

    Otherwise the next files that are opened get these numbers: MLX cannot read weights from descriptor 0, and what is
    printed would be written into an image.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one


def _terminal_is_closed() -> bool:
    """Whether messages go to a terminal that was closed, where every operation fails with EIO."""
    try:
        termios.tcgetattr(2)
    except termios.error as error:
        return error.args[0] == errno.EIO
    return False


def _fail(ctx: click.Context, error: Exception, code: int) -> NoReturn:
    rank = launched_rank()  # each speaks for itself: mlx.launch ends the others once one has failed
    click.echo(f"Error{f' on rank {rank}' if rank else ''}: {plain(str(error))}", err=True)
    ctx.exit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if launched_rank():
        return  # rank 0 shows it, too

    from tqdm import tqdm  # takes as long to import as click

    with tqdm.external_write_mode():  # clears a running bar and redraws it afterwards
        click.echo(f"Warning: {plain(str(message))}", err=True)
