"""The picture while it is drawn: latents to a small picture, which is shown in the terminal or written to a file.

A latent pixel's colour is nearly a linear function of its 16 numbers. `fit` finds it for a model's own VAE, from what
the VAE's encoder makes of a colour chart. On the pocket model, what it shows of the first of 8 steps correlates with
the finished picture by 0.94, and from the third on by 0.96.

Terminals show pictures by iTerm2's protocol (WezTerm too) or by kitty's (Ghostty too).
"""

from __future__ import annotations

import base64
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from ..atomic import claim
from ..models.vae import VAE
from ..weights.blocks import Blocks
from .codec import enlarge, to_png
from .files import write

PATCHES, PATCH = 4, 32  # of the chart: patches a side, and pixels a side of each
STRIP_BYTES = 2**18  # little memory, whatever the budget: the chart is small
ENLARGED = 2  # a preview's pixels per latent pixel
CHUNK = 4096  # characters of base64 that kitty takes at a time
MAX_ROWS = 20  # lines of text that a preview takes at most

# ---- latents to a small picture


def chart() -> np.ndarray:
    """Squares of one colour each, of black, full and half of red, green and blue: (128, 128, 3) in [-1, 1]."""
    levels = np.random.default_rng(0).integers(-1, 2, (PATCHES, PATCHES, 3))
    return np.kron(levels, np.ones((PATCH, PATCH, 1))).astype(np.float32)


def fit(vae: VAE) -> np.ndarray:
    """The colours of a VAE's latents: (17, 3), one row a channel and the constant; see `sketch`.

    Encodes the chart once, a picture of 128x128 pixels, and keeps none of the encoder's weights.
    """
    encoder = VAE(vae.config, Blocks(vae.runner.weights, vae.runner.dtype), STRIP_BYTES)
    pixels, scale = chart(), vae.config.scale
    latents = np.array(encoder.encode(mx.array(pixels)[None])[0])
    mx.clear_cache()
    h, w, channels = latents.shape
    wanted = pixels.reshape(h, scale, w, scale, 3).mean((1, 3)).reshape(-1, 3)
    known = np.concatenate([latents.reshape(-1, channels), np.ones((h * w, 1))], axis=1)
    return np.linalg.lstsq(known, wanted, rcond=None)[0].astype(np.float32)


def sketch(latents: mx.array, colours: np.ndarray) -> np.ndarray:
    """Clean latents (B, h, w, 16), or a guess at them, to small pictures side by side: (h, B w, 3) uint8."""
    B, h, w, channels = latents.shape
    pixels = np.array(latents).reshape(-1, channels) @ colours[:-1] + colours[-1]
    pixels = np.clip((pixels / 2 + 0.5) * 255, 0, 255).round().astype(np.uint8)
    return pixels.reshape(B, h, w, 3).transpose(1, 0, 2, 3).reshape(h, B * w, 3)


# ---- where it is shown


class Screen:
    """A picture in a terminal, which the next one replaces in its place: the lines above the cursor's."""

    _ids = itertools.count(os.getpid() % 2**16 * 2**8 + 1)  # other programs' pictures are left alone

    def __init__(self, stream: BinaryIO, protocol: str):
        self.stream = stream
        self.protocol = protocol
        self.rows = 0
        self.id = next(self._ids)

    def __call__(self, pixels: np.ndarray) -> None:
        """Show (H, W, 3) uint8. The cursor must stand where it stood after the last call, at the start of a line."""
        columns, lines, aspect = terminal_size(self.stream)
        columns, rows = cells(pixels.shape, columns, self.rows or min(MAX_ROWS, lines - 3), aspect)
        if not self.rows:
            self.stream.write(b"\n" * rows)  # scrolls, if need be, before a place is taken
            self.rows = rows
        up, down = f"\033[{self.rows}A\0337".encode(), f"\0338\033[{self.rows}B".encode()
        self.stream.write(up + inline(to_png(pixels), self.protocol, columns, rows, self.id) + down)
        self.stream.flush()

    def finish(self, pixels: np.ndarray) -> None:
        """Show a finished picture in the place, where it stays; the next one takes a new place."""
        if self.rows:
            self.stream.write(f"\033[{self.rows}A\033[J\033[{self.rows}B".encode())
        self(pixels)
        self.rows, self.id = 0, next(self._ids)

    def close(self) -> None:
        pass


class Sheet:
    """A picture file that each call replaces, whole, and that goes once the picture is finished."""

    def __init__(self, path: Path):
        """The first free one of path, path-1, ... is taken."""
        self.path = claim(path)

    def __call__(self, pixels: np.ndarray) -> None:
        write(to_png(enlarge(pixels, ENLARGED)), self.path, overwrite=True, lasting=False)

    def finish(self, pixels: np.ndarray) -> None:
        pass

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


class Album:
    """A folder in which every call leaves a picture file, name-1.png and so on."""

    def __init__(self, folder: Path, name: str):
        self.names = (folder / f"{name}-{i}.png" for i in itertools.count(1))

    def __call__(self, pixels: np.ndarray) -> None:
        write(to_png(enlarge(pixels, ENLARGED)), next(self.names), lasting=False)

    def finish(self, pixels: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


# ---- pictures in terminals


def protocol(environment: Mapping[str, str]) -> str | None:
    """What the terminal of these environment variables understands: "iterm", "kitty" or None."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "").lower()
    if environment.get("NO_COLOR") or term == "dumb":
        return None
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return None  # a multiplexer swallows both
    if {"KITTY_WINDOW_ID", "GHOSTTY_RESOURCES_DIR"} & environment.keys() or program == "ghostty":
        return "kitty"
    if term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"  # the one variable that ssh passes on
    if "WEZTERM_PANE" in environment or program in ("iterm.app", "wezterm"):
        return "iterm"
    if environment.get("LC_TERMINAL", "").lower() == "iterm2":
        return "iterm"
    return None


def inline(content: bytes, protocol: str, columns: int = 0, rows: int = 0, id: int = 0) -> bytes:
    """The bytes that show a file at the cursor, in so many columns and rows of text; 0 is its own size.

    kitty shows PNG only. If rows are given, it leaves the cursor, and replaces the last picture of the same id.
    """
    text = base64.b64encode(content)
    if protocol == "iterm":
        place = f";width={columns};height={rows}" if rows else ""
        return f"\033]1337;File=inline=1;size={len(content)}{place}:".encode() + text + b"\a"
    keys = "a=T,f=100,q=2," + (f"i={id},c={columns},r={rows},C=1," if rows else "")  # without an answer
    chunks = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
    pieces = []
    for i, chunk in enumerate(chunks):
        head = keys.encode() if i == 0 else b""
        pieces.append(b"\033_G" + head + (b"m=1;" if i < len(chunks) - 1 else b"m=0;") + chunk + b"\033\\")
    return b"".join(pieces)


def terminal_size(stream) -> tuple[int, int, float]:
    """Columns and lines of the terminal of a stream, and the width of a column per height of a line."""
    import fcntl
    import struct
    import termios

    try:
        sizes = fcntl.ioctl(stream.fileno(), termios.TIOCGWINSZ, bytes(8))
    except OSError:  # no terminal
        sizes = bytes(8)
    lines, columns, width, height = struct.unpack("4H", sizes)
    lines, columns = lines or 24, columns or 80
    return columns, lines, (width / columns) / (height / lines) if width and height else 0.5


def cells(shape: tuple[int, ...], columns: int, rows: int, aspect: float) -> tuple[int, int]:
    """The most columns and rows in which a picture (H, W, 3) keeps its shape; columns are `aspect` as wide as high."""
    height, width = shape[:2]
    rows = max(1, min(rows, int(columns * aspect * height / width)))
    return max(1, min(columns, round(rows * width / height / aspect))), rows
