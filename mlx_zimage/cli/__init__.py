"""The command line: a command reads its options, makes one call and prints what came of it.

Results go to stdout, everything else to stderr. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress

import click

from .. import __version__
from ..errors import OutputError, ZImageError
from .bench import bench
from .completion import completion
from .convert import convert
from .doctor import doctor
from .generate import generate
from .info import info
from .models import models
from .plan import plan
from .verify import verify

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Terminated(BaseException):
    """SIGTERM came."""


class Commands(click.Group):
    """Turns what the library raises, and signals, into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context):
        try:
            with warnings.catch_warnings(), stoppable():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except ZImageError as error:
            failure = click.ClickException(str(error))
            failure.exit_code = error.exit_code
            raise failure from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # whoever read the output has gone; click ends quietly
            failure = click.ClickException(str(error))
            failure.exit_code = OutputError.exit_code if error.errno in FULL else 1
            raise failure from error
        except (KeyboardInterrupt, Terminated, click.Abort) as stop:
            if isinstance(stop, click.Abort) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise  # the end of the input at a question
            click.echo("Stopped.", err=True)
            ctx.exit(143 if isinstance(stop, Terminated) else 130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-zimage")
def main():
    """Draw pictures from prompts with Z-Image-Turbo, through MLX.

    Results are printed on stdout, progress and messages on stderr. Exit codes: 0 done, 1 failed, 2 a value that
    cannot work, 3 no such model, 4 damaged model files, 5 too little memory, 6 a result that cannot be written,
    7 a folder that another process is writing, 8 numbers that are not finite or not right, 130 stopped by Ctrl-C,
    143 by SIGTERM.
    """


for command in (generate, convert, info, verify, models, plan, doctor, bench, completion):
    main.add_command(command)


@contextmanager
def stoppable():
    """SIGTERM raises Terminated within, as Ctrl-C does KeyboardInterrupt, so that what is under way is undone.

    Within the hub's client either one ends the process, since the client would first wait for the files under way, of
    many gigabytes. Afterwards the signals mean what they meant.
    """

    def stop(number, frame):
        while frame:
            if frame.f_globals.get("__name__", "").startswith("huggingface_hub"):
                with suppress(OSError):
                    os.write(2, b"\nStopped.\n")
                try:
                    drop_downloads()
                finally:
                    os._exit(128 + number)
            frame = frame.f_back
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, stop)
    if before[signal.SIGINT] is not signal.SIG_IGN:  # as in the background of a shell
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def drop_downloads() -> None:
    """Remove the files that the hub's client is writing in this process, but for those that another could go on with.

    Newer clients give each file of each process a name of its own: DIGEST.12345678.incomplete. The process cannot go on
    afterwards: it can open no more files, nor log.
    """
    logging.disable()
    highest = max(map(int, os.listdir("/dev/fd"))) + 100  # with what other threads open before the next line
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for number in range(highest):
        with suppress(OSError):
            if sys.platform == "darwin":
                path = os.fsdecode(fcntl.fcntl(number, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
            else:
                path = os.readlink(f"/dev/fd/{number}")
            if re.search(r"\w\.[0-9a-f]{8}\.incomplete$", path):
                os.unlink(path)
    time.sleep(0.2)  # in which other threads rename what was whole, and closed


def _show_warning(message, category, filename, lineno, file=None, line=None):
    from tqdm import tqdm

    with tqdm.external_write_mode():  # clears a running bar and draws it again
        click.echo(f"Warning: {message}", err=True)
