"""Pixels in and out of files, and latents in. With metadata.py the only place that knows PIL."""

from __future__ import annotations

import io
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import NumericsError, RequestError
from ..request import LATENT_PIXELS, GenerateRequest
from .metadata import Origin, save_options

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def to_uint8(pixels: mx.array) -> np.ndarray:
    """Decoded pixels (H, W, 3), nominally in [-1, 1], to uint8 as diffusers rounds them."""
    if not mx.isfinite(pixels).all().item():
        raise NumericsError("the decoded picture is not finite; nothing was drawn. Try dtype float32")
    unit = np.clip(np.array(pixels, dtype=np.float32) / 2 + 0.5, 0, 1)
    return (unit * 255).round().astype(np.uint8)


def to_pil(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) uint8 as a PIL image."""
    return Image.fromarray(pixels)


def to_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the content of a PNG file, made quickly rather than small."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """(H, W, 3) uint8, so many times as high and wide, without steps."""
    height, width, _ = pixels.shape
    return np.asarray(Image.fromarray(pixels).resize((factor * width, factor * height), Image.Resampling.BICUBIC))


def read_pixels(path: Path) -> np.ndarray:
    """A picture file's pixels, (H, W, 3) uint8."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def check_latents_size(path: Path, latents: np.ndarray, request: GenerateRequest) -> None:
    """Refuse latents (B, C, h, w) that do not fit the size that a request names."""
    h, w = latents.shape[2:]
    if (w * LATENT_PIXELS, h * LATENT_PIXELS) != (request.width, request.height):
        raise RequestError(
            f"{path} holds latents of shape {latents.shape}, which are for {w * LATENT_PIXELS}x{h * LATENT_PIXELS} "
            f"pixels, but {request.width}x{request.height} were asked for"
        )


def read_latents(path: Path) -> np.ndarray:
    """Initial latents from a .npy file: (B, 16, height / 8, width / 8) numbers. Never unpickles."""
    try:
        with open(path, "rb") as stream:
            latents = np.lib.format.read_array(stream, allow_pickle=False)
    except FileNotFoundError:
        raise RequestError(f"there is no latents file {path}; numpy.save writes one") from None
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise RequestError(f"{path} is no .npy file of numbers ({error}); numpy.save writes one") from error
    if latents.dtype.kind not in "fiu" or latents.ndim != 4 or not latents.size:
        raise RequestError(
            f"{path} holds {latents.dtype} of shape {latents.shape}; wanted numbers of shape "
            f"(pictures, channels, height / 8, width / 8)"
        )
    return latents


def encode(pixels: np.ndarray, ending: str, origin: Origin | None = None) -> bytes:
    """(H, W, 3) uint8 as the content of a file whose name has that ending, such as ".png".

    The picture carries its origin, or where that is None nothing but pixels.
    """
    kind = FORMATS[ending.lower()]
    options = {} if kind == "PNG" else {"quality": 95}
    if origin:
        options |= save_options(origin, kind)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind, **options)
    return stream.getvalue()
