"""Atomic writes: a file is written under a temporary name, then renamed, so it is either complete or absent."""

from __future__ import annotations

import itertools
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ASIDE = ".mlx-zimage-"  # prefix of temporary names; a killed process leaves such a file behind


def write(
    path: Path, save: Callable[[Path], object], overwrite: bool = True, lasting: bool = True, mode: int = 0o666
) -> Path:
    """Have save(file) write a temporary file next to path, then rename it to path; returns the final path.

    If path exists and overwrite is off, the first free one of path-1, path-2, ... is used. lasting waits until the file
    is on disk. mode is the file's, less the umask. A failure leaves nothing behind, and raises OSError or whatever save
    raised.
    """
    aside = path.with_name(f"{ASIDE}{secrets.token_hex(8)}{path.suffix}")
    try:
        create(aside, mode)
        save(aside)
        if lasting:
            sync(aside)
        if not overwrite:
            path = claim(path)
        os.replace(aside, path)  # within one folder, which cannot fail once the name is claimed
    finally:
        aside.unlink(missing_ok=True)
    return path


def create(path: Path, mode: int = 0o666) -> None:
    """Create an empty file, by default with the permissions of any new file, or raise FileExistsError."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def claim(path: Path) -> Path:
    """Create the first free one of path, path-1, path-2, ... as an empty file, so that no other program takes it."""
    for i in itertools.count():
        free = path.with_stem(f"{path.stem}-{i}") if i else path
        try:
            create(free)
        except FileExistsError:
            continue
        return free
    raise AssertionError("unreachable")


def sync(file: Path | int) -> None:
    """Wait until everything written to a file (a path or a descriptor) is on disk."""
    if isinstance(file, Path):
        fd = os.open(file, os.O_RDONLY)
        try:
            sync(fd)
        finally:
            os.close(fd)
        return
    if sys.platform == "darwin":
        import fcntl

        # On macOS, fsync stops at the drive's cache; this flushes the cache too, if the file system supports it.
        with suppress(OSError):
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)
