"""The files of latents, images and masks that the requests of one call use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import RequestError
from ..inputs import Inputs, read_latents
from ..request import DIGEST, GenerateRequest

OPTIONS = {"latents": "--latents", "image": "--image", "mask_image": "--mask"}
IMAGES = ("image", "mask_image")


class Given:
    """Latents for all requests, and the images that each request names, of which one request's are in memory at a time.

    digests has the SHA-256 of what was given for all of them, None for what was not.
    """

    def __init__(self, latents: Path | None, **images: Path | None):
        common = Inputs(read_latents(latents) if latents else None)
        self.latents = common.latents
        self._files: dict[str, Path] = {}  # of images, by digest
        self._last: tuple[dict, Inputs] = {}, common
        self.digests = {"latents": common.digests.get("latents")}
        self.digests |= {name: self.add(name, path) if path else None for name, path in images.items()}

    def add(self, name: str, path: Path) -> str:
        """Read an image; returns the digest by which requests name it."""
        digest = self._open({name: path}).digests[name]
        self._files[digest] = path
        return digest

    def named(self, requests: Sequence[dict]) -> list[dict]:
        """JSON requests that name their images by digest instead of by path."""
        return [
            own
            | {name: self.add(name, Path(os.path.expanduser(own[name]))) for name in IMAGES if _is_path(own.get(name))}
            for own in requests
        ]

    def inputs(self, request: GenerateRequest) -> Inputs:
        """The inputs of one request."""
        wanted = {name: digest for name in IMAGES if (digest := request.arrays[name]) is not None}
        for name, digest in wanted.items():
            if digest not in self._files:
                raise RequestError(f"{name} with SHA-256 {digest} was not given; pass its file with {OPTIONS[name]}")
        return self._open({name: self._files[digest] for name, digest in wanted.items()})

    def _open(self, files: dict[str, Path]) -> Inputs:
        if self._last[0] != files:
            self._last = files, Inputs(self.latents, **files)
        return self._last[1]


def _is_path(value: object) -> bool:
    return isinstance(value, str) and not DIGEST.fullmatch(value)
