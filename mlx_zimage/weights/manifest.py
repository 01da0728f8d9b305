"""SHA256SUMS: the checksums of a folder that the converter wrote, as `sha256sum -c` reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

MANIFEST = "SHA256SUMS"


def sha256(file: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
