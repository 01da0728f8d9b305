"""Weights that change while they are in use: noticed at every read, so that no image is made from them.

A model may be converted again, synced or removed while it generates. MLX reads what is there by then: zeros, or the
bytes of another tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError


@dataclass(frozen=True)
class Version:
    """What distinguishes one version of a file from another."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # which nothing can set back

    @classmethod
    def of(cls, file: Path) -> Version:
        state = file.stat()
        return cls(state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


class Stored(Protocol):
    """Something in a file, and the file's version when its header was read; None is not checked."""

    @property
    def file(self) -> Path: ...
    @property
    def version(self) -> Version | None: ...


@contextmanager
def unchanged(stored: Iterable[Stored]) -> Iterator[None]:
    """Raise CheckpointError if the files of what is read within the block are not those whose headers were read."""
    files = {each.file: each.version for each in stored}
    try:
        yield
    except (RuntimeError, OSError) as error:
        for file, version in files.items():
            _check(file, version)
        if isinstance(error, OSError) or str(error).startswith(("[read]", "[load")):  # MLX's errors about files
            raise CheckpointError(f"{' or '.join(map(str, files))} cannot be read ({error}); check the disk") from error
        raise
    for file, version in files.items():
        _check(file, version)


def _check(file: Path, version: Version | None) -> None:
    try:
        found = Version.of(file)
    except OSError as error:
        raise CheckpointError(
            f"{file} was there when the model was opened, but cannot be read now ({error.strerror}); "
            "open the model again"
        ) from error
    if version not in (None, found):
        raise CheckpointError(
            f"{file} was changed while it was in use, perhaps by a conversion, a download or a sync; wait until "
            f"that is done, then open the model again"
        )
