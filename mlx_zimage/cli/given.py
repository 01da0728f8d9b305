"""The files of latents and images that the requests of one call use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import RequestError
from ..inputs import Inputs, read_latents
from ..request import DIGEST, GenerateRequest


class Given:
    """Latents for all requests, and an image for each request that names one. One image at a time is in memory."""

    def __init__(self, latents: Path | None, image: Path | None):
        self._common = Inputs(read_latents(latents) if latents else None)
        self._paths: dict[str, Path] = {}  # of images, by digest
        self._last: tuple[Path, Inputs] | None = None
        self.latents = self._common.latents
        self.digests = {name: self._common.digests.get(name) for name in ("latents",)}
        self.digests["image"] = self.add(image) if image else None

    def add(self, path: Path) -> str:
        """Read an image; returns the digest by which requests name it."""
        digest = self._open(path).digests["image"]
        self._paths[digest] = path
        return digest

    def named(self, requests: Sequence[dict]) -> list[dict]:
        """JSON requests that name their images by digest instead of by path."""
        return [
            {**own, "image": self.add(Path(os.path.expanduser(own["image"])))} if _is_path(own.get("image")) else own
            for own in requests
        ]

    def inputs(self, request: GenerateRequest) -> Inputs:
        """The inputs of one request."""
        if request.image is None:
            return self._common
        if request.image not in self._paths:
            raise RequestError(f"no image with SHA-256 {request.image} was given; pass its file with --image")
        return self._open(self._paths[request.image])

    def _open(self, path: Path) -> Inputs:
        if self._last is None or self._last[0] != path:
            self._last = path, replace(self._common, image=path)
        return self._last[1]


def _is_path(value: object) -> bool:
    return isinstance(value, str) and not DIGEST.fullmatch(value)
