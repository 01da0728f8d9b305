"""The two records the converter writes next to a model: SHA256SUMS, the manifest, and conversion.json, the origin.

The manifest lists the checksum of every other file, in the format of `sha256sum -c`.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from ..untrusted import brief, open_regular, read_bytes

MANIFEST = "SHA256SUMS"
CONVERSION = "conversion.json"  # what the folder was made from, and how
CONVERSION_KEY = "mlx_zimage_conversion"  # of the same in the metadata of a single file
# Bytes to hash: of a file, and of all files of a model, which in float32 takes 41 GB. A sparse one may have terabytes.
MAX_HASHED = 64 * 10**9
MAX_FILES = 2000  # in a manifest: a model in float32 has 100


def sha256(file: Path, most: int = MAX_HASHED) -> str:
    """A file's SHA-256, in hexadecimal. OSError if it has more than `most` bytes."""
    with open_regular(file) as stream:
        if os.fstat(stream.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(file))
        return hashlib.file_digest(stream, "sha256").hexdigest()


def render_manifest(sums: dict[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()


def parse_manifest(lines: Iterable[str]) -> dict[str, str]:
    """File -> sha256 in hexadecimal. A malformed line gives an entry that matches no file."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def read_manifest(folder: Path) -> dict[str, str]:
    """File -> sha256 in hexadecimal, from a folder's manifest; empty if our converter did not write the folder."""
    if not (folder / MANIFEST).exists() and not (folder / CONVERSION).exists():
        return {}
    file = folder / MANIFEST
    try:
        content = read_bytes(file)
        sums = parse_manifest(content.decode().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); convert again") from error
    if len(sums) > MAX_FILES:
        raise CheckpointError(f"{file} lists {len(sums):,} files, expected at most {MAX_FILES:,}; convert again")
    if render_manifest(sums) != content:
        raise CheckpointError(f"{file} is damaged; convert again")
    for name in sums:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise CheckpointError(f"{file} lists {brief(name)}, which is not in its folder; convert again")
    return sums
