"""Sizes and counts, to and from text."""

from __future__ import annotations

import re
from math import ceil

from .errors import RequestError
from .untrusted import brief

MOST = 10**15  # bytes; larger numbers would overflow counters
LEAST = 10**6  # bytes: a smaller number was probably meant as MB or GB
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_memory(text: str | int) -> int:
    """ "6GB", "800 MB", "4GiB" or a number of bytes."""
    return parse_bytes(text, "memory must be a size such as 6GB or 800MB")


def parse_bytes(text: str | int, expected: str) -> int:
    """Bytes from an int, or from text with a decimal (GB) or binary (GiB) unit; expected begins the error message."""
    if isinstance(text, int) and not isinstance(text, bool):
        if LEAST <= text <= MOST:
            return text
        expected += ", or a number of bytes, at least 1,000,000"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG]i?B)\s*", text, re.IGNORECASE) if isinstance(text, str) else None
    nbytes = float(match[1]) * UNITS[match[2].upper()] if match else 0
    if not 0 < nbytes <= MOST:
        raise RequestError(f"{expected}, got {brief(text)}")
    return int(nbytes)


def counted(count: int, noun: str) -> str:
    """ "1 image", or "3 images"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def size(nbytes: int) -> str:
    """Bytes as text, with two decimals."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def rounded_up(nbytes: int) -> str:
    """Bytes as text with up to two decimals, rounded up, so that the result is a budget that works."""
    unit, name = (10**9, "GB") if nbytes >= 10**9 else (10**6, "MB")
    return f"{ceil(100 * nbytes / unit) / 100:g} {name}"
