"""Printing, shared by the commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UNSAFE, plain
from ..images.terminal import inline, protocol

if TYPE_CHECKING:
    from tqdm import tqdm


def print_path(path: Path) -> None:
    """Print a path on stdout, on its own line: byte for byte, since names need not be text, but with unsafe characters
    escaped in a terminal."""
    if sys.stdout is not None and sys.stdout.isatty():
        click.echo(plain(str(path)).encode(sys.stdout.encoding, "backslashreplace"))
    else:
        click.echo(os.fsencode(path))


def printable(text: str) -> str:
    """Untrusted text, such as a prompt, with everything escaped that a terminal would obey, except newlines."""
    return UNSAFE.sub(lambda match: match[0] if match[0] == "\n" else ascii(match[0])[1:-1], text)


def echo(text: str) -> None:
    """Print a line on stdout."""
    click.echo(plain(text))


def say(message: str, quiet: bool = False) -> None:
    """Print a message on stderr."""
    if not quiet:
        click.echo(printable(message), err=True)


def progress_bar(quiet: bool = False, **options) -> tqdm:
    """A progress bar on stderr, if that is a terminal, with rate and time left."""
    from tqdm import tqdm  # takes as long to import as click, and --help needs no bar

    hidden = True if quiet or sys.stderr is None else None  # None: hidden unless stderr is a terminal
    return tqdm(disable=hidden, **options)


def hub_bars(shown: bool) -> None:
    """Show or hide the Hugging Face client's progress bars, unless HF_HUB_DISABLE_PROGRESS_BARS is set."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        utils.enable_progress_bars() if shown else utils.disable_progress_bars()


def graphics() -> str | None:
    """The image protocol of the terminal on stderr, or None; see `terminal.protocol`."""
    return protocol(os.environ) if sys.stderr and sys.stderr.isatty() else None


def show_image(path: Path) -> None:
    """Show an image inline if stderr is a terminal that supports it."""
    from ..images.codec import read_pixels, to_png

    shown_by = graphics()
    if shown_by:
        as_it_is = shown_by == "iterm" or path.suffix.lower() == ".png"
        content = path.read_bytes() if as_it_is else to_png(read_pixels(path))
        sys.stderr.buffer.write(inline(content, shown_by) + b"\n")
        sys.stderr.buffer.flush()
    elif os.environ.get("NO_COLOR"):
        say("NO_COLOR is set; not showing images.")
    else:
        say("This terminal cannot show images; use iTerm2, WezTerm, kitty or Ghostty.")
