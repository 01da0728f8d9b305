"""Files read and written past the system's cache, and writes that last.

A model is larger than many a machine's memory and passes once. Left in the cache it pushes out all else, and that
took longer than reading it: 11.5 GB at 0.3 GB/s instead of 1.2, on the virtual machine where this was measured.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import CheckpointError


def read_bytes(file: Path, offset: int, count: int) -> np.ndarray:
    """Some bytes of a file, uint8."""
    # Read, not mapped: touched pages of a mapped file count as resident until the system takes them back.
    content = np.empty(count, np.uint8)
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            got = 0
            while got < count and (more := stream.readinto(memoryview(content)[got:])):
                got += more
            drop_cache(stream.fileno(), offset, count)
    except OSError as error:
        raise CheckpointError(f"{file} could not be read: {error.strerror or error}") from error
    if got != count:
        raise CheckpointError(f"{file} became shorter while it was read")
    return content


def drop_cache(fd: int, offset: int = 0, count: int = 0) -> None:
    """Have the system forget what it keeps of some bytes of a file, by default of all; where it takes such advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
