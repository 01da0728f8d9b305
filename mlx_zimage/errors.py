"""All errors that this package raises on purpose, with the command line's exit codes.

    ZImageError               1   base class of all others
    ├── RequestError          2   an argument is invalid
    ├── ModelNotFoundError    3   no such folder, file or repository, or no network to download it
    ├── CheckpointError       4   a model's files exist, but are damaged or not as expected
    ├── MemoryBudgetError     5   a request does not fit in the memory budget
    ├── OutputError           6   a result cannot be written: the disk is full, or the folder is read-only
    ├── LockedError           7   another process is writing the same folder
    ├── NumericsError         8   a computation produced NaN or infinity
    ├── DeviceError           9   the GPU failed, or the system stopped its work
    └── GroupError           10   machines that generate images together lost one, or do not match

A message names the thing, its value, what was expected, and what to do next. `warn` issues warnings.
"""

from __future__ import annotations

import re
import sys
import warnings

MAX_MESSAGE = 4000  # characters
# What a terminal would obey, or could not show: control characters, line separators, changes of the writing direction,
# and bytes of file names that are not text.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Text on one line that is safe to print: some of it may come from an untrusted file."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE * 3 // 4]} ... {text[-MAX_MESSAGE // 4 :]}"
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the line of the caller's code that led to it, however deep in this package it arises."""
    level, frame = 1, sys._getframe().f_back
    while frame and str(frame.f_globals.get("__name__")).partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)


class ZImageError(Exception):
    """The base class of all errors that this package raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        return plain(str(self.args[0]) if self.args else "")  # subclasses of OSError would print an errno tuple


class RequestError(ZImageError, ValueError):
    """An argument is invalid."""

    exit_code = 2


class ModelNotFoundError(ZImageError, FileNotFoundError):
    """There is no such folder, file or repository, or no network to download it."""

    exit_code = 3


class CheckpointError(ZImageError):
    """A model's files exist, but are damaged or not as expected."""

    exit_code = 4


class MemoryBudgetError(ZImageError, MemoryError):
    """A request does not fit in the memory budget."""

    exit_code = 5


class OutputError(ZImageError, OSError):
    """A result cannot be written: the disk is full, or the folder is read-only."""

    exit_code = 6


class LockedError(ZImageError):
    """Another process is writing the same folder."""

    exit_code = 7


class NumericsError(ZImageError, ArithmeticError):
    """A computation produced NaN or infinity."""

    exit_code = 8


class DeviceError(ZImageError, RuntimeError):
    """The GPU failed, or the system stopped its work."""

    exit_code = 9


class GroupError(ZImageError, RuntimeError):
    """Machines that generate images together lost one of them, or do not match."""

    exit_code = 10
