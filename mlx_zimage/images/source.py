"""Read an input image, such as a photo: upright, in 8-bit sRGB, and of a size that the model generates.

Files are untrusted: only regular files in the formats below are opened, what they claim to contain is checked before
they are decoded, and whatever a decoder raises becomes a RequestError.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from ..errors import RequestError, warn
from ..request import MAX_SIZE, SIZE_MULTIPLE
from ..untrusted import open_regular
from .stream import NAMES, ImageStream, read_exif

READABLE = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")  # HEIC is read by pillow-heif
NAMED = "PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF or HEIC"


@dataclass(frozen=True)
class Limit:
    """The most that a file may have, so that reading it takes less than 1 s of one core and 200 MB."""

    megapixels: float
    megabytes: float


# As measured in examples/measurements.md, on a busy machine. A decoded pixel takes 4 bytes, and its copy in the result
# 4 more, or 1 if the image is halved. What limits each:
LIMITS = {
    "JPEG": Limit(50, 64),  # time, if its pixels are noise; its decoder halves an image row by row
    "progressive JPEG": Limit(16, 20),  # 6 bytes per pixel for all coefficients, before any is decoded
    "PNG": Limit(25, 80),
    "PNG with transparency": Limit(21, 60),  # time: with a profile, 57 ms per megapixel, and 39 if it is halved
    "PNG with transparency and 16 bits": Limit(10, 60),  # time: with a profile, 90 ms per megapixel
    "GIF": Limit(25, 80),
    "TIFF": Limit(20, 100),  # the file, which libtiff maps into memory
    "TIFF with LZMA": Limit(8, 80),  # time: 79 ms per megapixel
    "BMP": Limit(25, 110),
    "BMP with RLE": Limit(4, 2),  # time of a decoder in Python: 100 ms per megapixel, 150 ms per megabyte
    "WebP": Limit(12.5, 24),  # 8 bytes per pixel in libwebp, and 4 for a copy
    "WebP with transparency": Limit(10, 24),  # time: 80 ms per megapixel, with a profile
    "AVIF": Limit(12.5, 10),  # 3 to 6 bytes per pixel in libavif, and 3 for each of two copies; 64 ms per megabyte
    "AVIF with transparency": Limit(8, 8),  # up to 8 and 4; 98 ms per megapixel of 10 bits
    # The exception, for iPhones' photos of 48 megapixels: libheif holds the image twice, and takes 44 ms per megapixel.
    "HEIC": Limit(50, 24),
}
MAX_SIDE = 65_535  # pixels: Pillow's decoders take whole rows
MAX_PIXELS = 50_000_000  # of an image that is not from a file
FULL_COLOUR = 3  # coefficients per pixel of a progressive JPEG for which its limit holds
MAX_WHOLE = 24_000_000  # bytes of a file that its decoder reads whole
KEPT_PIXELS = 4096**2  # of what is read: larger images are halved
TILE = 1024  # pixels on a side, even; converted one by one, so that there is never a second copy of the whole
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
GREY = ("1", "L", "LA")
NUMBERS = ("I", "F")  # modes of 32 bits per pixel, whose values for black and white are unknown


def read_image(source: Any) -> Image.Image:
    """An image from a file (its path or content), from Pillow, or from an array: upright, in sRGB.

    The result is RGBA if any pixel is transparent, otherwise RGB. Arrays are (H, W), (H, W, 3) or (H, W, 4), or
    channels first as in torch, in uint8 or floats from 0 to 1. Of an animation, the first frame is read. Images of more
    than 16.8 megapixels are halved, those beyond the limit of their format refused.
    """
    if isinstance(source, Image.Image):
        return _prepared(source, "the image", own=False)
    if isinstance(source, (str, os.PathLike, bytes)):
        label = "the image" if isinstance(source, bytes) else os.fspath(source)
        raw = source if isinstance(source, bytes) else _opened(source, label)
        with _explained(label), ImageStream(raw, label, MAX_WHOLE) as stream, _open(stream) as image:
            return _prepared(image, label, own=True)
    return _prepared(_from_array(source), "the image", own=True)


def over_white(image: Image.Image) -> Image.Image:
    """An image from `read_image` without transparency: RGB, as it looks on a white page."""
    return over(image, "white")


def over(image: Image.Image, colour: str) -> Image.Image:
    """An image from `read_image` as it looks on a colour: RGB."""
    if image.mode == "RGB":
        return image
    result = Image.new("RGB", image.size, colour)
    for at, tile in _tiles(image):
        result.paste(tile, at, tile)
    return result


def digest(image: Image.Image) -> str:
    """The SHA-256 of an image's mode, size and pixels: the same whatever file it came from."""
    made = hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode())
    made.update(image.tobytes())
    return made.hexdigest()


# ---- sizes


def fit_size(size: tuple[int, int], area: int, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """The width and height, multiples of 16, at which an image of `size` (width, height) is used.

    If one side is given, the other keeps the proportions. If neither is, the image is reduced to at most `area` pixels,
    and never enlarged, unless a side has fewer than 16.
    """
    if width and height:
        return width, height
    if width:
        return width, _multiple(width * size[1] / size[0])
    if height:
        return _multiple(height * size[0] / size[1]), height
    within = [_multiple(side - side % SIZE_MULTIPLE) for side in size]  # cropped only, so that pixels are unchanged
    scale = sqrt(area / (size[0] * size[1]))
    fitted = within if scale >= 1 else [min(_multiple(size[i] * scale), within[i]) for i in (0, 1)]
    while fitted[0] * fitted[1] > area and max(fitted) > SIZE_MULTIPLE:
        fitted[fitted[1] > fitted[0]] -= SIZE_MULTIPLE
    return fitted[0], fitted[1]


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image scaled (Lanczos) and cropped at the centre to exactly this size.

    An image that is less than 16 pixels larger is only cropped, so that its pixels are unchanged.
    """
    spare = image.width - width, image.height - height
    if all(0 <= pixels < SIZE_MULTIPLE for pixels in spare):
        left, top = spare[0] // 2, spare[1] // 2
        return image.crop((left, top, left + width, top + height))
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _multiple(length: float) -> int:
    return min(max(round(length / SIZE_MULTIPLE) * SIZE_MULTIPLE, SIZE_MULTIPLE), MAX_SIZE)


# ---- files


@contextmanager
def _explained(label: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a RequestError: Pillow's raise most of Python's errors on damaged files."""
    try:
        yield
    except (RequestError, MemoryError):
        raise
    except Exception as error:
        raise RequestError(
            f"{label} is damaged or incomplete ({type(error).__name__}: {error}); copy it again, or save it as PNG"
        ) from error


def _opened(source: str | os.PathLike, label: str) -> io.RawIOBase:
    try:
        return open_regular(Path(source)).detach()
    except FileNotFoundError:
        raise RequestError(f"no image at {label}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"could not read the image {label} ({reason}); expected a {NAMED} file") from error


def _open(stream: ImageStream) -> Image.Image:
    """An image whose header has been read and checked, and which JPEG's decoder will halve if it is large."""
    Image.init()
    formats = [name for name in READABLE if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its limit is higher than ours
        try:
            image: Image.Image = Image.open(stream, formats=formats)
        except Image.DecompressionBombError as error:
            raise RequestError(f"{stream.label} has too many pixels ({error}); resize it first") from error
        except Image.UnidentifiedImageError:
            image = _open_heif(stream, formats)
    stream.opened(image)
    _check_limit(image, stream)
    if image.width * image.height > KEPT_PIXELS:
        image.draft(None, (image.width // 2, image.height // 2))  # only JPEG's decoder can
    if isinstance(image, ImageFile) and stream.kind == "BMP with RLE":
        image.fp = io.BytesIO(stream.whole())  # which its decoder reads byte by byte
    return image


def _decode(image: Image.Image) -> None:
    """Load an image. libwebp and libavif free their memory when they have decoded, before Pillow copies the pixels."""
    if isinstance(image, ImageFile) and hasattr(image, "_decoder"):
        prepare = image.load_prepare

        def load_prepare() -> None:
            image._decoder = None
            prepare()

        image.load_prepare = load_prepare  # type: ignore[method-assign]
    try:
        image.load()
    finally:  # no cycle, which would keep a decoder that failed
        vars(image).pop("load_prepare", None)


def _check_limit(image: Image.Image, stream: ImageStream) -> None:
    kind, pixels = stream.kind, image.width * image.height
    limit = LIMITS[kind]
    most = 1e6 * limit.megapixels
    if isinstance(image, JpegImageFile) and kind != "JPEG":  # fewer coefficients where colours have a lower resolution
        sampled = [across * down for _, across, down, _ in image.layer]
        most *= FULL_COLOUR * max(sampled) / sum(sampled)
    other, other_kind = ("PNG", "PNG with transparency") if image.has_transparency_data else ("JPEG", "JPEG")
    advice = {
        "JPEG": "save it at a lower quality",
        "progressive JPEG": "save it as a JPEG that is not progressive",
        "PNG with transparency and 16 bits": "save it with 8 bits",
    }
    smaller = advice.get(kind, f"save it as {other}" if not kind.startswith(other) else "resize it")
    if pixels > most:
        instead = f"{smaller}, or " if pixels <= 1e6 * LIMITS[other_kind].megapixels else ""
        width, height = (int(side * sqrt(most / pixels)) for side in image.size)
        raise RequestError(
            f"{stream.label} has {image.width}x{image.height} pixels, {pixels / 1e6:.1f} megapixels; expected at most "
            f"{most / 1e6:g} as {kind}; {instead}resize it to {width}x{height} or less"
        )
    if max(image.size) > MAX_SIDE:
        raise RequestError(
            f"{stream.label} has {image.width}x{image.height} pixels; expected at most {MAX_SIDE:,} on a side; crop it"
        )
    if stream.size > 1e6 * limit.megabytes:
        raise RequestError(
            f"{stream.label} is {stream.size / 1e6:.1f} MB; expected at most {limit.megabytes:g} MB as {kind}; "
            f"{smaller}"
        )


def _open_heif(stream: ImageStream, formats: list[str]) -> Image.Image:
    """An image that Pillow alone cannot open: a HEIC, or RequestError."""
    label = stream.label
    stream.seek(0)
    start = stream.read(16)
    brand = start[8:12] if start[4:8] == b"ftyp" else b""
    if brand in AVIF_BRANDS and "AVIF" not in Image.OPEN:
        raise RequestError(f"{label} is AVIF, which needs Pillow 11.3 or newer: pip install --upgrade pillow")
    if brand not in HEIC_BRANDS:
        kinds = [NAMES.get(name, name) for name in formats if (accept := Image.OPEN[name][1]) and accept(start) is True]
        if kinds:
            raise RequestError(
                f"{label} is a damaged, incomplete or unusual {kinds[0]}; copy it again, or save it as PNG"
            )
        raise RequestError(f"{label} is not an image that can be read; expected {NAMED}")
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise RequestError(
            f"{label} is HEIC, which needs pillow-heif: pip install 'mlx-zimage[heif]', or save the image as JPEG"
        ) from None
    stream.seek(0)
    return HeifImageFile(stream)


# ---- pixels


def _prepared(image: Image.Image, label: str, own: bool) -> Image.Image:
    """An image upright, in 8-bit sRGB, and halved if it is large. The original is left as it is; closed if `own`."""
    if image.width * image.height > MAX_PIXELS:
        raise RequestError(
            f"{label} has {image.width}x{image.height} pixels; expected at most {MAX_PIXELS:,}; resize it first"
        )
    if image.mode in NUMBERS:
        raise RequestError(f"{label} has 32-bit pixels (mode {image.mode}); expected 8 or 16 bits, so save it as PNG")
    with _explained(label):
        _decode(image) if own else image.load()
        factor = 2 if image.width * image.height > KEPT_PIXELS else 1
        result = _converted(image, _conversion(image, label, factor), factor)
        result.info = {}  # who took a photo, and where, is nobody's business
        if turned := read_exif(image, label).get(ExifTags.Base.Orientation):
            result.getexif()[ExifTags.Base.Orientation] = turned
        if own:
            image.close()  # frees its pixels before there is another copy
        ImageOps.exif_transpose(result, in_place=True)
        result.info = {}
        return result


def _converted(image: Image.Image, to_srgb: Callable[[Image.Image], Image.Image], factor: int) -> Image.Image:
    """An image converted, and reduced (box filter) by a factor of 1 or 2, a tile at a time."""
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for (left, top), tile in _tiles(image):
        tile = to_srgb(tile)
        if tile.mode == "RGBA" and result.mode == "RGB":
            result.putalpha(255)
        result.paste(tile, (left // factor, top // factor))
    return result


def _tiles(image: Image.Image) -> Iterator[tuple[tuple[int, int], Image.Image]]:
    """The parts of an image, each with its left and top."""
    for top, left in product(range(0, image.height, TILE), range(0, image.width, TILE)):
        yield (left, top), image.crop((left, top, min(left + TILE, image.width), min(top + TILE, image.height)))


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit, which Pillow's own conversion would clip; other images unchanged."""
    if not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image)
    grey = Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    grey.info = {name: value for name, value in image.info.items() if name != "transparency"}
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _conversion(image: Image.Image, label: str, factor: int) -> Callable[[Image.Image], Image.Image]:
    """What makes a part of an image RGB in sRGB, or RGBA if any pixel is transparent, and reduces it by factor."""
    mode = image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    if image.mode in GREY or image.mode.startswith("I;16"):
        mode = "L"
    if mode in ("L", "RGB") and image.has_transparency_data:
        mode += "A"
    transform = _transform(image.info.get("icc_profile"), "L" if mode == "LA" else mode, label)

    def to_srgb(tile: Image.Image) -> Image.Image:
        tile = _eight_bit(tile)
        if tile.mode != mode:  # RGB by way of RGBA, so that a palette keeps its colours
            tile = tile.convert("RGBA").convert("RGB") if mode == "RGB" else tile.convert(mode)
        if factor > 1 and mode != "LAB":  # whose channels have a sign
            tile = tile.reduce(factor)  # first, since a profile takes longer
        alpha = tile.getchannel("A") if mode in ("LA", "RGBA") else None
        if alpha and alpha.getextrema() == (255, 255):
            alpha = None
        if transform and transform.output_mode == mode:
            tile = transform.apply_in_place(tile)  # two thirds of the time; a tile is a copy
        elif transform:
            tile = transform.apply(tile if mode != "LA" else tile.getchannel("L"))
        tile = tile if tile.mode == "RGB" or (tile.mode == "RGBA" and alpha) else tile.convert("RGB")
        if alpha and tile.mode == "RGB":
            tile.putalpha(alpha)
        return tile.reduce(factor) if factor > 1 and mode == "LAB" else tile

    return to_srgb


def _transform(profile: bytes | None, mode: str, label: str) -> ImageCms.ImageCmsTransform | None:
    """From an image's colour profile to sRGB; a damaged profile is ignored with a warning."""
    try:
        if profile:
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" in ImageCms.getProfileDescription(given):
                return None  # so that its pixels are exactly the same
        elif mode == "LAB":
            given = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        else:
            return None
        result = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), mode, result)
    except (ImageCms.PyCMSError, OSError) as error:
        warn(f"{label} has a colour profile that cannot be used ({error}); its colours are read as sRGB")
        return None


def _from_array(value: Any) -> Image.Image:
    expected = "expected (H, W), (H, W, 3) or (H, W, 4), uint8 or floats from 0 to 1"
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever other libraries raise, such as for a tensor on a GPU
        raise RequestError(f"the image is not an array of pixels ({error}); {expected}") from None
    shape, channels = array.shape, (1, 3, 4)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[2] not in channels and array.shape[0] in channels:
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in channels):
        given = f"an array of shape {shape}" if shape else f"{type(value).__name__}"
        raise RequestError(f"the image is {given}; {expected}, a path, or a Pillow image")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise RequestError(f"the image has shape {shape}; expected at most {MAX_PIXELS:,} pixels")
    if array.dtype.kind == "f":
        if not ((array >= 0) & (array <= 1)).all():  # NaN fails this check, too
            raise RequestError(f"the image has values that are outside 0 to 1 or not finite; {expected}")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        raise RequestError(f"the image is an array of {array.dtype}; {expected}")
    return Image.fromarray(np.ascontiguousarray(array))
