"""Everything this package raises on purpose, each with the exit code of the command line.

    ZImageError               1   anything below
    ├── RequestError          2   a value the caller gave cannot work
    ├── ModelNotFoundError    3   no such folder, file or repository, or no network to fetch it
    ├── CheckpointError       4   the files are there, but are not what they should be
    ├── MemoryBudgetError     5   what was asked cannot be done in the memory allowed
    ├── OutputError           6   a result cannot be written: the disk is full, or the folder read-only
    ├── LockedError           7   another process is writing the same folder
    ├── NumericsError         8   the computation left the finite numbers
    └── DeviceError           9   the GPU failed, or the system stopped its work

A message names the thing, its value, what was wanted and the next move.
"""

from __future__ import annotations


class ZImageError(Exception):
    """Anything below: everything that is raised on purpose."""

    exit_code = 1


class RequestError(ZImageError, ValueError):
    """A value that the caller gave cannot work."""

    exit_code = 2


class ModelNotFoundError(ZImageError, FileNotFoundError):
    """There is no such folder, file or repository, or no network to fetch it."""

    exit_code = 3

    def __str__(self) -> str:  # FileNotFoundError would print an errno tuple
        return str(self.args[0]) if self.args else ""


class CheckpointError(ZImageError):
    """The model's files are there, but are not what they should be."""

    exit_code = 4


class MemoryBudgetError(ZImageError, MemoryError):
    """What was asked cannot be done in the memory allowed."""

    exit_code = 5


class OutputError(ZImageError, OSError):
    """A result cannot be written: the disk is full, or the folder read-only."""

    exit_code = 6

    def __str__(self) -> str:  # OSError would print an errno tuple
        return str(self.args[0]) if self.args else ""


class LockedError(ZImageError):
    """Another process is writing the same folder."""

    exit_code = 7


class NumericsError(ZImageError, ArithmeticError):
    """The computation left the finite numbers."""

    exit_code = 8


class DeviceError(ZImageError, RuntimeError):
    """The GPU failed, or the system stopped its work."""

    exit_code = 9
