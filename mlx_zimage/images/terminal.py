"""Images in terminals, with the protocol of iTerm2 (also WezTerm) or of kitty (also Ghostty)."""

from __future__ import annotations

import base64
import fcntl
import struct
import termios
from collections.abc import Mapping
from typing import BinaryIO

CHUNK = 4096  # characters of base64 that kitty accepts at a time


def protocol(environment: Mapping[str, str]) -> str | None:
    """The image protocol of the terminal with these environment variables: "iterm", "kitty" or None."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "").lower()
    if environment.get("NO_COLOR") or term == "dumb":
        return None
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return None  # multiplexers swallow both protocols
    if {"KITTY_WINDOW_ID", "GHOSTTY_RESOURCES_DIR"} & environment.keys() or program == "ghostty":
        return "kitty"
    if term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"  # the only variable that ssh passes on
    if "WEZTERM_PANE" in environment or program in ("iterm.app", "wezterm"):
        return "iterm"
    if environment.get("LC_TERMINAL", "").lower() == "iterm2":
        return "iterm"
    return None


def inline(content: bytes, protocol: str, columns: int = 0, rows: int = 0, id: int = 0) -> bytes:
    """The escape sequence that shows an image file at the cursor, scaled to columns x rows of text, or unscaled if 0.

    kitty only accepts PNG. If rows is given, kitty does not move the cursor, and replaces any image with the same id.
    """
    text = base64.b64encode(content)
    if protocol == "iterm":
        place = f";width={columns};height={rows}" if rows else ""
        return f"\033]1337;File=inline=1;size={len(content)}{place}:".encode() + text + b"\a"
    keys = "a=T,f=100,q=2," + (f"i={id},c={columns},r={rows},C=1," if rows else "")  # q=2: no reply
    chunks = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
    pieces = []
    for i, chunk in enumerate(chunks):
        head = keys.encode() if i == 0 else b""
        pieces.append(b"\033_G" + head + (b"m=1;" if i < len(chunks) - 1 else b"m=0;") + chunk + b"\033\\")
    return b"".join(pieces)


def terminal_size(stream: BinaryIO) -> tuple[int, int, float]:
    """Columns and lines of the terminal on a stream, and the aspect ratio of a cell, width / height."""
    try:
        sizes = fcntl.ioctl(stream.fileno(), termios.TIOCGWINSZ, bytes(8))
    except OSError:  # not a terminal
        sizes = bytes(8)
    lines, columns, width, height = struct.unpack("4H", sizes)
    lines, columns = lines or 24, columns or 80
    return columns, lines, (width / columns) / (height / lines) if width and height else 0.5


def cells(shape: tuple[int, ...], columns: int, rows: int, aspect: float) -> tuple[int, int]:
    """The largest size in columns and rows that keeps the proportions of an image (H, W, 3).

    aspect is the width / height of a cell.
    """
    height, width = shape[:2]
    rows = max(1, min(rows, int(columns * aspect * height / width)))
    return max(1, min(columns, round(rows * width / height / aspect))), rows
