"""The picture while it is drawn: latents to a small picture, which is shown in the terminal or written to a file.

A latent pixel's colour is nearly a linear function of its 16 numbers. `colours_of` finds it for a model's own VAE, from
what the VAE's encoder makes of a colour chart. On the pocket model, what it shows of the first of 8 steps correlates
with the finished picture by 0.94, and from the third on by 0.96.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from ..atomic import claim
from ..request import LATENT_PIXELS
from .codec import enlarge, to_png
from .files import write_file
from .terminal import cells, inline, terminal_size

PATCHES, PATCH = 4, 32  # of the chart: patches a side, and pixels a side of each
ENLARGED = 2  # a preview's pixels per latent pixel
MAX_ROWS = 20  # lines of text that a preview takes at most

# ---- latents to a small picture


def chart() -> np.ndarray:
    """Squares of one colour each, of black, full and half of red, green and blue: (128, 128, 3) in [-1, 1]."""
    levels = np.random.default_rng(0).integers(-1, 2, (PATCHES, PATCHES, 3))
    return np.kron(levels, np.ones((PATCH, PATCH, 1))).astype(np.float32)


def colours_of(encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The colours of a VAE's latents: (17, 3), one row a channel and the constant; see `sketch`.

    encode makes latents (h, w, 16) of pixels (H, W, 3) in [-1, 1]; it is called once, for a picture of 128x128 pixels.
    """
    pixels = chart()
    latents = encode(pixels)
    h, w, channels = latents.shape
    scale = len(pixels) // h
    wanted = pixels.reshape(h, scale, w, scale, 3).mean((1, 3)).reshape(-1, 3)
    known = np.concatenate([latents.reshape(-1, channels), np.ones((h * w, 1))], axis=1)
    return np.linalg.lstsq(known, wanted, rcond=None)[0].astype(np.float32)


def sketch(latents: mx.array, colours: np.ndarray) -> np.ndarray:
    """Clean latents (B, h, w, 16), or a guess at them, to small pictures side by side: (h, B w, 3) uint8."""
    B, h, w, channels = latents.shape
    pixels = np.array(latents).reshape(-1, channels) @ colours[:-1] + colours[-1]
    pixels = np.clip((pixels / 2 + 0.5) * 255, 0, 255).round().astype(np.uint8)
    return pixels.reshape(B, h, w, 3).transpose(1, 0, 2, 3).reshape(h, B * w, 3)


def blank(width: int, height: int, images: int) -> np.ndarray:
    """The grey preview of images of width x height pixels before the first step."""
    return np.full((height // LATENT_PIXELS, images * width // LATENT_PIXELS, 3), 128, np.uint8)


# ---- where it is shown


class View:
    """Where a request is watched: called with each preview, then with the finished pictures, then closed."""

    def __call__(self, pixels: np.ndarray) -> None:
        """Show a preview, (H, W, 3) uint8."""
        raise NotImplementedError

    def finish(self, pixels: np.ndarray) -> None:
        """Show a finished picture, (H, W, 3) uint8."""

    def close(self) -> None:
        """Take away what was for the time of drawing only."""


class Screen(View):
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


class Sheet(View):
    """A picture file that each call replaces, whole, and that goes once the picture is finished."""

    def __init__(self, path: Path):
        """The first free one of path, path-1, ... is taken."""
        self.path = claim(path)

    def __call__(self, pixels: np.ndarray) -> None:
        write_file(to_png(enlarge(pixels, ENLARGED)), self.path, overwrite=True, lasting=False)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


class Album(View):
    """A folder in which every call leaves a picture file, name-1.png and so on."""

    def __init__(self, folder: Path, name: str):
        self.names = (folder / f"{name}-{i}.png" for i in itertools.count(1))

    def __call__(self, pixels: np.ndarray) -> None:
        write_file(to_png(enlarge(pixels, ENLARGED)), next(self.names), lasting=False)
