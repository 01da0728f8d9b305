"""What commands share in printing."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tqdm import tqdm


def print_path(path: Path) -> None:
    """On stdout, alone on its line, byte for byte: file names need not be valid text."""
    click.echo(os.fsencode(path))


def printable(text: str) -> str:
    """Lines of a stranger's text, with control characters, which a terminal would obey, written as in Python."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def say(message: str, quiet: bool = False) -> None:
    if not quiet:
        click.echo(message, err=True)


def progress_bar(quiet: bool = False, **options) -> tqdm:
    """A bar on stderr if a person watches: rate and time left are in it."""
    from tqdm import tqdm  # here, as --help shows no bar: it takes as long to import as click

    hidden = True if quiet or sys.stderr is None else None  # None: no bar where stderr is no terminal
    return tqdm(disable=hidden, **options)


def hub_bars(shown: bool) -> None:
    """Whether the Hugging Face client shows bars on a terminal, where its user's environment leaves it open."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        utils.enable_progress_bars() if shown else utils.disable_progress_bars()


def graphics() -> str | None:
    """How the terminal on stderr shows pictures, if there is one and it can; see `terminal.protocol`."""
    from ..images.terminal import protocol

    return protocol(os.environ) if sys.stderr and sys.stderr.isatty() else None


def show_picture(path: Path) -> None:
    """In the terminal, if stderr is one that can."""
    from ..images.codec import read_pixels, to_png
    from ..images.terminal import inline

    known = graphics()
    if known:
        plain = known == "iterm" or path.suffix.lower() == ".png"
        content = path.read_bytes() if plain else to_png(read_pixels(path))
        sys.stderr.buffer.write(inline(content, known) + b"\n")
        sys.stderr.buffer.flush()
    elif os.environ.get("NO_COLOR"):
        say("NO_COLOR is set; no picture is shown.")
    else:
        say("This terminal shows no pictures; iTerm2, WezTerm, kitty and Ghostty do.")
