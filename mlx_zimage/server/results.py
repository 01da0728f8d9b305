"""Images that clients fetch by URL: kept in memory for an hour, under names that cannot be guessed."""

from __future__ import annotations

import secrets
import time

KEPT_S = 3600.0
MAX_BYTES = 256 * 2**20


class Results:
    """Files by name. The oldest are dropped after an hour, and earlier if all together exceed MAX_BYTES."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[float, bytes]] = {}

    def put(self, content: bytes, ending: str) -> str:
        """Keep a file; returns its name, of 256 random bits."""
        name = f"{secrets.token_urlsafe(32)}{ending}"
        self._files[name] = time.monotonic(), content
        self._drop()
        return name

    def get(self, name: str) -> bytes | None:
        self._drop()
        return self._files[name][1] if name in self._files else None

    def _drop(self) -> None:
        size = sum(len(content) for _, content in self._files.values())
        for name, (put, content) in list(self._files.items()):
            if put + KEPT_S > time.monotonic() and size <= MAX_BYTES:
                break
            del self._files[name]
            size -= len(content)
