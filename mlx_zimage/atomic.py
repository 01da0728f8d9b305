"""Files that are whole under their name, or not there: written aside, then renamed."""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write(path: Path, save: Callable[[Path], object], overwrite: bool = True, lasting: bool = True) -> Path:
    """Have save(file) write a new file in path's folder, then give it path's name; returns the path it has.

    Where path exists, the first free one of path-1, path-2, ... is taken, unless overwrite is set. lasting waits until
    the file is on the disk. Whatever fails leaves nothing behind, and raises OSError or what save raised.
    """
    aside = path.with_name(f".mlx-zimage-{secrets.token_hex(8)}{path.suffix}")
    try:
        create(aside)
        save(aside)
        if lasting:
            sync(aside)
        if not overwrite:
            path = claim(path)
        os.replace(aside, path)  # from a name in the same folder: does not fail once the name is claimed
    finally:
        aside.unlink(missing_ok=True)
    return path


def create(path: Path) -> None:
    """Create a file, empty and with the permissions of any new file, or raise FileExistsError."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def claim(path: Path) -> Path:
    """Create, empty, the first free of path, path-1, path-2, ...: no other program then takes the name."""
    for i in itertools.count():
        free = path.with_stem(f"{path.stem}-{i}") if i else path
        try:
            create(free)
        except FileExistsError:
            continue
        return free
    raise AssertionError("unreachable")


def sync(file: Path | int) -> None:
    """Return when what was written to a file, or to its descriptor, is on the disk."""
    if isinstance(file, Path):
        fd = os.open(file, os.O_RDONLY)
        try:
            sync(fd)
        finally:
            os.close(fd)
        return
    if sys.platform == "darwin":
        with suppress(OSError):  # not every file system can
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)  # fsync stops at the drive's cache; this goes through it
            return
    os.fsync(file)
