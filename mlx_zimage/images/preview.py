"""Previews of an image during denoising: latents to a small image, shown in the terminal or written to a file.

The colour of a latent pixel is nearly a linear function of its 16 channels. `colours_of` fits that function for the
model's own VAE, by encoding a colour chart. On the pocket model, the correlation of the preview with the finished image
is 0.94 after the first of 8 steps, and 0.96 from the third on.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from ..request import LATENT_PIXELS
from .codec import enlarge, to_png
from .files import make_folder, write_file
from .terminal import cells, inline, terminal_size

PATCHES, PATCH = 4, 32  # of the chart: patches per side, and pixels per side of a patch
ENLARGED = 2  # a preview's pixels per latent pixel
MAX_ROWS = 20  # terminal lines that a preview takes at most

# ---- latents to a small image


def chart() -> np.ndarray:
    """Squares of random colours, each channel 0, half or full: (128, 128, 3) in [-1, 1]."""
    levels = np.random.default_rng(0).integers(-1, 2, (PATCHES, PATCHES, 3))
    return np.kron(levels, np.ones((PATCH, PATCH, 1))).astype(np.float32)


def colours_of(encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The linear map from a VAE's latents to colours: (17, 3), one row per channel and a constant; see `sketch`.

    encode maps pixels (H, W, 3) in [-1, 1] to latents (h, w, 16); it is called once, with an image of 128x128 pixels.
    """
    pixels = chart()
    latents = encode(pixels)
    h, w, channels = latents.shape
    scale = len(pixels) // h
    targets = pixels.reshape(h, scale, w, scale, 3).mean((1, 3)).reshape(-1, 3)
    inputs = np.concatenate([latents.reshape(-1, channels), np.ones((h * w, 1))], axis=1)
    return np.linalg.lstsq(inputs, targets, rcond=None)[0].astype(np.float32)


def sketch(latents: mx.array, colours: np.ndarray) -> np.ndarray:
    """Clean latents (B, h, w, 16), or an estimate of them, to small images side by side: (h, B w, 3) uint8."""
    B, h, w, channels = latents.shape
    pixels = np.array(latents).reshape(-1, channels) @ colours[:-1] + colours[-1]
    pixels = np.clip((pixels / 2 + 0.5) * 255, 0, 255).round().astype(np.uint8)
    return pixels.reshape(B, h, w, 3).transpose(1, 0, 2, 3).reshape(h, B * w, 3)


def blank(width: int, height: int, images: int) -> np.ndarray:
    """The grey preview of images of width x height pixels before the first step."""
    return np.full((height // LATENT_PIXELS, images * width // LATENT_PIXELS, 3), 128, np.uint8)


# ---- showing previews


class View:
    """Shows a request in progress: called with each preview, then with the finished images, then closed."""

    def __call__(self, pixels: np.ndarray) -> None:
        """Show a preview, (H, W, 3) uint8."""
        raise NotImplementedError

    def finish(self, pixels: np.ndarray) -> None:
        """Show a finished image, (H, W, 3) uint8."""

    def close(self) -> None:
        """Delete what was only needed during generation."""


class TerminalView(View):
    """Shows each image in place of the last one, on the terminal lines above the cursor."""

    _ids = itertools.count(os.getpid() % 2**16 * 2**8 + 1)  # distinct from the images of other programs

    def __init__(self, stream: BinaryIO, protocol: str):
        self.stream = stream
        self.protocol = protocol
        self.rows = 0
        self.id = next(self._ids)

    def __call__(self, pixels: np.ndarray) -> None:
        """Show (H, W, 3) uint8. The cursor must be where the last call left it, at the start of a line."""
        columns, lines, aspect = terminal_size(self.stream)
        columns, rows = cells(pixels.shape, columns, self.rows or min(MAX_ROWS, lines - 3), aspect)
        if not self.rows:
            self.stream.write(b"\n" * rows)  # scrolls first, if necessary
            self.rows = rows
        up, down = f"\033[{self.rows}A\0337".encode(), f"\0338\033[{self.rows}B".encode()
        self.stream.write(up + inline(to_png(pixels), self.protocol, columns, rows, self.id) + down)
        self.stream.flush()

    def finish(self, pixels: np.ndarray) -> None:
        """Show a finished image in place of the previews; the next image goes below it."""
        if self.rows:
            self.stream.write(f"\033[{self.rows}A\033[J\033[{self.rows}B".encode())
        self(pixels)
        self.rows, self.id = 0, next(self._ids)


class FileView(View):
    """An image file that each call replaces, and that is deleted when the image is finished."""

    def __init__(self, path: Path):
        """Uses the first of path, path-1, ... that does not exist when this is first called."""
        make_folder(path.parent)
        self.path = path
        self.written = False

    def __call__(self, pixels: np.ndarray) -> None:
        self.path = write_file(to_png(enlarge(pixels, ENLARGED)), self.path, overwrite=self.written, lasting=False)
        self.written = True

    def close(self) -> None:
        if self.written:
            self.path.unlink(missing_ok=True)


class FolderView(View):
    """A folder in which every call writes an image file: name-1.png, name-2.png, ..."""

    def __init__(self, folder: Path, name: str):
        self.names = (folder / f"{name}-{i}.png" for i in itertools.count(1))

    def __call__(self, pixels: np.ndarray) -> None:
        write_file(to_png(enlarge(pixels, ENLARGED)), next(self.names), lasting=False)
