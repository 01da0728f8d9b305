"""Encode pixels as image files, and decode them."""

from __future__ import annotations

import io
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import NumericsError
from .metadata import FORMATS, Origin, save_options


def to_unit(pixels: mx.array) -> np.ndarray:
    """Decoded pixels (H, W, 3), nominally in [-1, 1], to [0, 1] float32."""
    if not mx.isfinite(pixels).all().item():
        raise NumericsError("the decoded image has values that are not finite, so it was not saved; try dtype float32")
    return np.array(mx.clip(pixels.astype(mx.float32) / 2 + 0.5, 0, 1))


def to_signed(pixels: np.ndarray) -> mx.array:
    """(H, W, 3) uint8 to [-1, 1] float32, rounded as in diffusers: the inverse of `to_uint8`."""
    signed = pixels.astype(np.float32)
    signed /= 255
    signed *= 2
    signed -= 1
    return mx.array(signed)


def is_flat(unit: np.ndarray) -> bool:
    """Whether an image (H, W, 3) in [0, 1] is a single colour, or has only values of 0 and 1."""

    def flat(unit: np.ndarray) -> bool:
        pixels = rounded(unit)
        return bool((pixels == pixels[0, 0]).all() or ((unit <= 0) | (unit >= 1)).all())

    return flat(unit[::16, ::16]) and flat(unit)  # few pixels suffice to see that most images are not


def to_uint8(pixels: mx.array) -> np.ndarray:
    """Decoded pixels (H, W, 3), nominally in [-1, 1], to uint8, rounded as in diffusers."""
    return rounded(to_unit(pixels))


def rounded(unit: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] to uint8, rounded as in diffusers."""
    levels = unit * 255
    return levels.round(out=levels).astype(np.uint8)


def to_pil(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) uint8 as a PIL image."""
    return Image.fromarray(pixels)


def to_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the content of a PNG file, compressed for speed rather than size."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """(H, W, 3) uint8, enlarged by an integer factor with bicubic interpolation."""
    height, width, _ = pixels.shape
    return np.asarray(Image.fromarray(pixels).resize((factor * width, factor * height), Image.Resampling.BICUBIC))


def read_pixels(path: Path) -> np.ndarray:
    """The pixels of an image file, (H, W, 3) uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def encode(pixels: np.ndarray, ending: str, origin: Origin | None = None, quality: int = 95) -> bytes:
    """(H, W, 3) uint8 as the content of an image file; ending is its suffix, such as ".png".

    The origin is stored in the file; if it is None, the file contains only pixels. quality, from 0 to 100, is that of
    JPEG and WebP.
    """
    kind = FORMATS[ending.lower()]
    options = {} if kind == "PNG" else {"quality": quality}
    if origin:
        options |= save_options(origin, kind)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind, **options)
    return stream.getvalue()
