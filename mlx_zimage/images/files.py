"""Files of images: refused before work if they could not be written, claimed, and whole or not there."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from .. import atomic
from ..errors import OutputError, RequestError
from .codec import FORMATS, encode
from .metadata import Origin


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


def save(pixels: np.ndarray, path: Path, overwrite: bool = False, origin: Origin | None = None) -> Path:
    """Write (H, W, 3) uint8 in the format that path's ending names; returns the path it was written to.

    The picture carries its origin, or where that is None nothing but pixels.
    """
    return write_file(encode(pixels, path.suffix, origin), path, overwrite)


def write_file(content: bytes, path: Path, overwrite: bool = False, lasting: bool = True) -> Path:
    """Write a file that is whole or not there; returns its path, see atomic.write."""
    try:
        return atomic.write(path, lambda file: file.write_bytes(content), overwrite, lasting)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}") from error
