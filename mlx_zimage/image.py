"""Pixels in and out of files, and latents in. With metadata.py the only place that knows PIL."""

from __future__ import annotations

import io
import itertools
import os
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from .errors import NumericsError, OutputError, RequestError
from .metadata import Origin, save_options
from .request import LATENT_PIXELS, GenerateRequest

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


def check_output(path: Path) -> None:
    """Refuse, before any work, a picture file that could not be written."""
    if path.is_dir():
        raise RequestError(f"{path} is a folder; name a file in it, such as {path / 'image.png'}")
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"the picture's name must end in {', '.join(FORMATS)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise RequestError(f"there is no folder {path.parent} for {path.name}; make it first")
    check_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder for pictures, if it is not there, or refuse before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} could not be made: {error.strerror}") from error
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that cannot be written to."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass  # permission bits do not tell of a read-only or special file system; this does
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be written to ({error.strerror}); choose another") from error


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


def save(pixels: np.ndarray, path: Path, overwrite: bool = False, origin: Origin | None = None) -> Path:
    """Write (H, W, 3) uint8 in the format that path's ending names; returns the path it was written to.

    The picture carries its origin, or where that is None nothing but pixels.
    """
    kind = FORMATS[path.suffix.lower()]
    options = {} if kind == "PNG" else {"quality": 95}
    if origin:
        options |= save_options(origin, kind)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind, **options)
    return write(stream.getbuffer(), path, overwrite)


def write(content: bytes | memoryview, path: Path, overwrite: bool = False, lasting: bool = True) -> Path:
    """Write a file aside and rename it, so that it is whole or not there; returns its path.

    Where path exists, the first free one of path-1, path-2, ... is taken, unless overwrite is set. lasting waits for
    the disk.
    """
    aside = None
    try:
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".mlx-zimage-", suffix=path.suffix)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            if lasting:
                os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)  # mkstemp makes private files
        if not overwrite:
            path = claim(path)
        os.replace(aside, path)  # from a name in the same folder: does not fail once the name is claimed
    except BaseException as error:
        if aside:
            Path(aside).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{path} could not be written: {error.strerror or error}") from error
        raise
    return path


def claim(path: Path) -> Path:
    """Create, empty, the first free of path, path-1, path-2, ...: no other program then takes the name."""
    for i in itertools.count():
        free = path.with_stem(f"{path.stem}-{i}") if i else path
        try:
            os.close(os.open(free, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        return free
