"""Control images made from a photo with NumPy and Pillow: edges, grey, a scribble, or the image made soft.

They look like those that ControlNet Union was trained on: white lines on black, except for "gray" and "tile".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

LOW, HIGH = 100, 200  # thresholds of the gradient's length in 8-bit units: those usually passed to OpenCV's Canny
BLUR = 1.4  # pixels, before edges are looked for
SCRIBBLE_BLUR, SCRIBBLE_WIDTH = 3.0, 5  # pixels: coarse edges, drawn with a thick pen
SOFT = 4  # the sides of a tile image are shorter by this factor


def prepared(pixels: np.ndarray, kind: str | None) -> np.ndarray:
    """An image (H, W, 3) uint8 as the control image of a kind (see request.CONTROLS); None leaves it as it is."""
    return pixels if kind is None else PREPARATIONS[kind](pixels)


def canny(pixels: np.ndarray) -> np.ndarray:
    """Edges one pixel wide (Canny 1986): the gradient's local maxima above HIGH, and those above LOW next to them."""
    return _as_rgb(_edges(pixels, BLUR) * np.uint8(255))


def gray(pixels: np.ndarray) -> np.ndarray:
    """Its luminance."""
    return _as_rgb(np.asarray(Image.fromarray(pixels).convert("L")))


def scribble(pixels: np.ndarray) -> np.ndarray:
    """Coarse edges as a thick pen would leave them."""
    lines = Image.fromarray(_edges(pixels, SCRIBBLE_BLUR) * np.uint8(255))
    return _as_rgb(np.asarray(lines.filter(ImageFilter.MaxFilter(SCRIBBLE_WIDTH))))


def tile(pixels: np.ndarray) -> np.ndarray:
    """The image without its details; a tile ControlNet adds new ones."""
    height, width = pixels.shape[:2]
    small = max(1, width // SOFT), max(1, height // SOFT)
    reduced = Image.fromarray(pixels).resize(small, Image.Resampling.BOX)
    return np.asarray(reduced.resize((width, height), Image.Resampling.BICUBIC))


def _as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _edges(pixels: np.ndarray, blur: float) -> np.ndarray:
    """Where edges are: (H, W) of 0 and 1, uint8."""
    grey = Image.fromarray(pixels).convert("L").filter(ImageFilter.GaussianBlur(blur))
    across, down = _sobel(np.asarray(grey, np.float32))
    length = np.hypot(across, down)
    peaks = length * _is_ridge(length, across, down)
    return _grown(peaks > HIGH, peaks > LOW).astype(np.uint8)


def _sobel(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of an image (H, W) across and down."""
    p = np.pad(grey, 1, mode="edge")
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    return (
        across[:-2] + 2 * across[1:-1] + across[2:],
        down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:],
    )


def _is_ridge(length: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Where the gradient is longer than at both neighbours along it (on a plateau, longer than at one of them)."""
    p = np.pad(length, 1)
    height, width = length.shape

    def beside(y: int, x: int) -> np.ndarray:
        return p[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    angle = np.round(np.arctan2(down, across) / (np.pi / 4)).astype(int) % 4  # to the nearest of four directions
    found = np.zeros(length.shape, bool)
    for direction, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        found |= (angle == direction) & (length > beside(-y, -x)) & (length >= beside(y, x))
    return found


def _grown(seeds: np.ndarray, within: np.ndarray) -> np.ndarray:
    """The 8-connected parts of `within` that contain a seed.

    Each pixel points to another pixel of its part, and eventually to the first one. Neighbours are joined in rounds;
    even a line through the whole image takes few.
    """
    p, width = np.pad(within, 1).ravel(), within.shape[1] + 2
    pixels = np.flatnonzero(p)
    number = np.cumsum(p) - 1  # of a pixel among `pixels`
    pairs = [(at := pixels[p[pixels + step]], at + step) for step in (1, width - 1, width, width + 1)]
    one, other = (number[np.concatenate(ends)] for ends in zip(*pairs, strict=True))
    first = np.arange(pixels.size)
    while one.size:
        np.minimum.at(first, np.maximum(first[one], first[other]), np.minimum(first[one], first[other]))
        while not np.array_equal(nearer := first[first], first):
            first = nearer
        apart = first[one] != first[other]
        one, other = one[apart], other[apart]
    kept = np.zeros(pixels.size, bool)
    kept[first[np.pad(seeds & within, 1).ravel()[pixels]]] = True
    p[pixels] = kept[first]
    return p.reshape(-1, width)[1:-1, 1:-1]


PREPARATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "canny": canny,
    "gray": gray,
    "scribble": scribble,
    "tile": tile,
}
