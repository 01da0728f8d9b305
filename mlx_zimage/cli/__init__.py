"""The command line: a command reads its options, makes one call and prints what came of it.

Results go to stdout, everything else to stderr. A command's file is imported when the command is called, and what loads
MLX, NumPy or PIL only when it runs: they take longer than all else that --help and completion do.
"""

from __future__ import annotations

import errno
import importlib
import warnings
from typing import NoReturn, TextIO

import click

from ..errors import OutputError, ZImageError
from ..version import __version__
from .stop import Terminated, stoppable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COMMANDS = {  # the file of each has a command of that name, whose help begins so
    "bench": "Time prompt encoding, the steps and decoding on this machine, beside a matrix product of the same width.",
    "completion": "Print the script that lets SHELL complete this program's commands and options, or install it.",
    "convert": "Write SOURCE as an MLX model folder DEST and print its path.",
    "doctor": "Tell whether this machine, its system, MLX build, memory and disk will do, and test MLX's arithmetic.",
    "generate": "Draw a picture of PROMPT, or several, and print their paths.",
    "info": "Tell what a model folder holds, or how a picture was drawn.",
    "models": "List the models on this machine, or remove one.",
    "plan": "Tell how MODEL would be run within a memory budget: what stays, what is read as needed, and each phase's "
    "bound.",
    "verify": "Check every byte of a model FOLDER and print what is wrong with it.",
}


class Commands(click.Group):
    """Loads the command that is called, and turns errors and signals into one line on stderr and an exit code.

    Its `commands` have a name and the first sentence of their help: all that a list of them needs.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if command and name in COMMANDS:
            command = getattr(importlib.import_module(f".{name}", __name__), name)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> object:
        try:
            with warnings.catch_warnings(), stoppable():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except ZImageError as error:
            _fail(ctx, error, error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # whoever read the output has gone; click ends quietly
            _fail(ctx, error, OutputError.exit_code if error.errno in FULL else 1)
        except (KeyboardInterrupt, Terminated, click.Abort) as stop:
            if isinstance(stop, click.Abort) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise  # the end of the input at a question
            click.echo("Stopped.", err=True)
            ctx.exit(143 if isinstance(stop, Terminated) else 130)


@click.group(
    cls=Commands,
    commands=[click.Command(name, help=summary) for name, summary in COMMANDS.items()],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="mlx-zimage")
def main() -> None:
    """Draw pictures from prompts with Z-Image-Turbo, through MLX.

    Results are printed on stdout, progress and messages on stderr. Exit codes: 0 done, 1 failed, 2 a value that
    cannot work, 3 no such model, 4 damaged model files, 5 too little memory, 6 a result that cannot be written,
    7 a folder that another process is writing, 8 numbers that are not finite or not right, 130 stopped by Ctrl-C,
    143 by SIGTERM.
    """


def _fail(ctx: click.Context, error: Exception, code: int) -> NoReturn:
    click.echo(f"Error: {error}", err=True)
    ctx.exit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    from tqdm import tqdm  # as long to import as click

    with tqdm.external_write_mode():  # clears a running bar and draws it again
        click.echo(f"Warning: {message}", err=True)
