"""Files of images: refused before work if they could not be written, claimed, and whole or not there."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import numpy as np

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
    return write(encode(pixels, path.suffix, origin), path, overwrite)


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
