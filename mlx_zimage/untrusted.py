"""Reading untrusted files: regular files only, bounded JSON, and values checked and shortened for errors."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_BYTES = 8 * 2**20  # of a file that is parsed whole; configs and indexes of full-size models take 200 KB
MAX_VALUES = 500_000  # in one JSON text: the most that they can take in memory is 70 MB
MAX_DEPTH = 64
MAX_DIGITS = 100  # Python refuses to parse 4301, and transformers itself writes 31
SHA256 = re.compile(r"[0-9a-f]{64}")


def open_regular(path: Path, own: bool = False) -> BufferedReader:
    """Open a file to read its bytes. OSError if it is a FIFO or a device, which could block or never end.

    With own=True, links and other users' files are refused, too.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking, since it may be a FIFO
    fd = os.open(path, flags | os.O_NOFOLLOW if own else flags)
    state = os.fstat(fd)
    if not stat.S_ISREG(state.st_mode) or (own and state.st_uid != os.geteuid()):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file owned by this user" if own else "not a regular file", str(path))
    return os.fdopen(fd, "rb")


def read_bytes(path: Path, most: int = MAX_BYTES, own: bool = False) -> bytes:
    """The content of a regular file. OSError if it has more than `most` bytes; own as in `open_regular`."""
    with open_regular(path, own) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
    return content


def parse_json(content: bytes | str, most: int = MAX_VALUES) -> Any:
    """The value of a JSON text in UTF-8. ValueError if it is not JSON, or exceeds the limits of this module.

    most is the largest number of values that it may contain.
    """
    text = content if isinstance(content, str) else content.decode()
    if sum(map(text.count, ",[{")) > most:
        raise ValueError(f"it has more than {most:,} values")
    nested = ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    try:
        value = json.loads(text, parse_int=_whole, object_pairs_hook=_object)
    except RecursionError:
        raise nested from None
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [item for outer in level for item in _inside(outer) if isinstance(item, (dict, list))]
        if not level:
            return value
    raise nested


def brief(value: object) -> str:
    """A value to show in an error: up to 80 characters of its repr. Python refuses to print 4301 digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of more than 4300 digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_sha256(value: object) -> bool:
    """Whether a value is a SHA-256 in hexadecimal, as hashlib writes it."""
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def one_line(text: str) -> str:
    """A name to write into a file: on one line, without control characters, cut to 200 characters."""
    return " ".join("".join(x if x.isprintable() else " " for x in text[:2000]).split())[:200]


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it has the same key twice in one object")
    return values


def _inside(value: dict | list) -> Iterable[Any]:
    """The values directly inside a list or object."""
    return value.values() if isinstance(value, dict) else value
