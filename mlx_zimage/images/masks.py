"""Masks: which part of an image is regenerated (1, white) and which is kept (0, black).

The networks see a mask at the resolution of latents; the pixels outside it are pasted back at the end, exactly as they
were. Outpainting is inpainting on a larger canvas, whose new part is the mask.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ..errors import RequestError
from ..request import LATENT_PIXELS, Outpaint
from .source import cover, fit_size, over, read_image


def read_mask(source: Any, transparent: bool = False) -> Image.Image:
    """A mask from a file, Pillow or an array (see `read_image`): 8-bit grey ("L"), white where to regenerate.

    Transparent pixels count as black. With transparent=True they are the ones to regenerate, and colours are ignored,
    as in OpenAI's API.
    """
    image = read_image(source)
    if transparent:
        if image.mode != "RGBA":
            raise RequestError(
                "the mask has no transparent pixels; the part that should be regenerated must be transparent"
            )
        return image.getchannel("A").point(lambda alpha: 255 - alpha)
    return over(image, "black").convert("L")


def fit_mask(mask: Image.Image, image: tuple[int, int], width: int, height: int) -> Image.Image:
    """A mask of the size (width, height) of its image, resized with that image, or already of the final size."""
    if mask.size == (width, height):
        return mask
    if mask.size != image:
        raise RequestError(
            f"the mask has {mask.width}x{mask.height} pixels, but the image has {image[0]}x{image[1]}; expected a mask "
            f"of the same size"
        )
    return cover(mask, width, height)


def values(mask: Image.Image, grow: int = 0, soft: bool = False) -> np.ndarray:
    """A mask as an array (H, W) float32 of 0 and 1, thresholded at 0.5 as in diffusers; soft keeps the values in
    between.

    grow moves its edges outwards by that many pixels.
    """
    array = np.asarray(mask, np.float32) / 255
    if not soft:
        array = (array >= 0.5).astype(np.float32)
    if not array.any():
        raise RequestError(
            "the mask is black, so nothing would be regenerated; use white for the part that should be regenerated"
        )
    return largest_within(array, grow)


def to_latents(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) at the resolution of latents: (H / 8, W / 8), the largest value of each square of 8x8 pixels.

    So no masked pixel is in a kept latent, which would leave it unchanged.
    """
    height, width = mask.shape
    squares = mask.reshape(height // LATENT_PIXELS, LATENT_PIXELS, width // LATENT_PIXELS, LATENT_PIXELS)
    return squares.max(axis=(1, 3))


def feathered(mask: np.ndarray, feather: int) -> np.ndarray:
    """The weights (H, W), from 0 to 1, with which a regenerated image covers the original: 0 outside the mask.

    They rise over `feather` pixels inside it, or fewer if the mask is too thin. At the sides of the image, where
    nothing adjoins the mask, they do not fall.
    """
    outside = (mask == 0).astype(np.float32)
    reach = feather // 2
    while reach and largest_within(outside, 2 * reach).all():
        reach //= 2
    # Two box blurs reach as far as the core is from the edge, so that the weights outside the mask stay exactly 0.
    blurred = Image.fromarray((255 * (1 - largest_within(outside, reach))).astype(np.uint8))
    for radius in (reach // 2, reach - reach // 2):
        blurred = blurred.filter(ImageFilter.BoxBlur(radius))
    return np.asarray(blurred, np.float32) / 255


def paste(original: np.ndarray, generated: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The generated image over the original, (H, W, 3), with weights (H, W); at 0 it is exactly the original.

    The result has the original's type: uint8 is rounded.
    """
    covered = original + weights[:, :, None] * (generated.astype(np.float32) - original)
    return covered.round().astype(np.uint8) if original.dtype == np.uint8 else covered


def largest_within(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The largest value (H, W) in the square that extends this many pixels from each pixel in every direction."""
    window = 2 * pixels + 1
    for axis in (0, 1):
        row = np.moveaxis(np.pad(mask, [(pixels, pixels) if i == axis else (0, 0) for i in (0, 1)], "edge"), axis, 0)
        length, done = mask.shape[axis], 1
        while 2 * done <= window:
            row = np.maximum(row[:-done], row[done:])
            done *= 2
        rest = window - done
        mask = np.moveaxis(np.maximum(row[:length], row[rest : rest + length]), 0, axis)
    return mask


# ---- outpainting


def canvas_size(
    outpaint: Outpaint, size: tuple[int, int], area: int, width: int | None = None, height: int | None = None
) -> tuple[int, int]:
    """The width and height of the canvas for an image of `size`; without the margins, they are those of `fit_size`."""
    across, down = outpaint.left + outpaint.right, outpaint.top + outpaint.bottom
    for name, side, margins in (("width", width, across), ("height", height, down)):
        if side is not None and side <= margins:
            raise RequestError(
                f"{name} {side} leaves no room for the image: outpaint alone takes {margins} pixels; give the {name} "
                f"of the whole result"
            )
    inner = fit_size(size, area, width and width - across, height and height - down)
    return inner[0] + across, inner[1] + down


def canvas(image: Image.Image, outpaint: Outpaint, width: int, height: int) -> np.ndarray:
    """An image on a canvas, (height, width, 3) uint8, with its border extended outwards, more blurred further away."""
    inner = width - outpaint.left - outpaint.right, height - outpaint.top - outpaint.bottom
    continued = np.pad(np.asarray(cover(image, *inner)), [*_margins(outpaint), (0, 0)], "edge")
    farthest = max(asdict(outpaint).values())
    blurred = Image.fromarray(continued).filter(ImageFilter.GaussianBlur(farthest / 8))
    weights = feathered(canvas_mask(outpaint, width, height), farthest)
    return paste(continued, np.asarray(blurred), weights)


def canvas_mask(outpaint: Outpaint, width: int, height: int) -> np.ndarray:
    """1 on the new part of the canvas and 0 on the image: (height, width) float32."""
    mask = np.ones((height, width), np.float32)
    mask[outpaint.top : height - outpaint.bottom, outpaint.left : width - outpaint.right] = 0
    return mask


def _margins(outpaint: Outpaint) -> list[tuple[int, int]]:
    return [(outpaint.top, outpaint.bottom), (outpaint.left, outpaint.right)]
