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
            return place(aside, path)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def create(path: Path, mode: int = 0o666) -> None:
    """Create an empty file, by default with the permissions of any new file, or raise FileExistsError."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def place(aside: Path, path: Path) -> Path:
    """Give a file the first free name of path, path-1, path-2, ...; its temporary name may remain as well.

    In one step, so that an interruption leaves no empty file, and no other program's file is replaced.
    """
    for i in itertools.count():
        free = path.with_stem(f"{path.stem}-{i}") if i else path
        try:
            os.link(aside, free)
            return free
        except FileExistsError:
            continue
        except OSError:  # exFAT and some network disks have no links
            if _take(aside, free):
                return free
    raise AssertionError("unreachable")


def _take(aside: Path, free: Path) -> bool:
    """Rename a file, unless the new name is taken: returns whether it was free.

    The name is claimed first with an empty file, which is removed if the rename fails.
    """
    since = aside.stat().st_mtime_ns
    try:
        create(free)
        os.replace(aside, free)
        return True
    except FileExistsError:
        return False
    except BaseException:
        with suppress(OSError):
            state = free.stat()
            if not state.st_size and state.st_mtime_ns >= since:
                free.unlink()
        raise


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
