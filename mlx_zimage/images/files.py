"""Writing image files: paths are checked before any work, and a file is written completely or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from .. import atomic
from ..errors import OutputError, RequestError
from .codec import encode
from .metadata import FORMATS, Origin


def check_output(path: Path) -> None:
    """Raise, before any work, if an image could not be written to path."""
    check_name(path)
    check_folder(path.parent)


def check_name(path: Path) -> None:
    """Raise if path is a folder, or does not end as an image's name does."""
    if path.is_dir():
        raise RequestError(f"{path} is a folder; name a file in it, such as {path / 'image.png'}")
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"the image file name must end in {' or '.join(FORMATS)}, got {path.name!r}")


def make_folder(folder: Path) -> None:
    """Create a folder for images if it does not exist. Raises if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"could not create the folder {folder}: {error.strerror}") from error
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Raise, before any work, if a folder cannot be written to or, if it does not exist, created."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass  # unlike permission bits, this also detects read-only and special file systems
    except OSError as error:
        raise OutputError(f"cannot write to the folder {folder} ({error.strerror}); choose another") from error


def save(pixels: np.ndarray, path: Path, overwrite: bool = False, origin: Origin | None = None) -> Path:
    """Write (H, W, 3) uint8 in the format given by the suffix of path; returns the path written, see atomic.write.

    The origin is stored in the file; if it is None, the file contains only pixels.
    """
    return write_file(encode(pixels, path.suffix, origin), path, overwrite)


def write_file(content: bytes, path: Path, overwrite: bool = False, lasting: bool = True) -> Path:
    """Write a file completely or not at all, in a new folder if need be; returns the path written, see atomic.write."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return atomic.write(path, lambda file: file.write_bytes(content), overwrite, lasting)
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror or error}") from error
