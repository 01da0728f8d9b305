"""The files of latents, images and masks that the requests of one call use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..inputs import Inputs, read_latents
from ..request import GenerateRequest
from ..untrusted import is_sha256

FILE_OPTIONS = {"latents": "--latents", "image": "--image", "mask_image": "--mask"}
IMAGES = ("image", "mask_image")


class Given:
    """Latents for all requests, and the images that each request names, of which one request's are in memory at a time.

    digests has the SHA-256 of what was given for all of them, None for what was not.
    """

    def __init__(self, latents: Path | None, **images: Path | None):
        common = Inputs(read_latents(latents) if latents else None)
        self.latents = common.latents
        self._files: dict[str, Path] = {}  # of images, by digest
        self._last: tuple[dict, list, Inputs] = {}, [], common
        self.digests = {"latents": common.digests.get("latents")}
        self.digests |= {name: self.add(name, path) if path else None for name, path in images.items()}

    def add(self, name: str, path: Path) -> str:
        """Read an image; returns the digest by which requests name it."""
        digest = self._open({name: path}).digests[name]
        self._files[digest] = path
        return digest

    def named(self, own: dict) -> dict:
        """A JSON request that names its images by digest instead of by path."""
        paths = {name: Path(os.path.expanduser(own[name])) for name in IMAGES if _is_path(own.get(name))}
        named = own | {name: self.add(name, path) for name, path in paths.items()}
        if _is_list(own.get("controls")):
            named["controls"] = [*map(self._control_named, own["controls"])]
        return named

    def add_control(self, path: Path) -> str:
        """Read a control image; returns the digest by which requests name it."""
        (digest,) = Inputs(control_images=[path]).controls
        self._files[digest] = path
        return digest

    def _control_named(self, use: Any) -> Any:
        if not isinstance(use, dict) or not _is_path(use.get("image")):
            return use
        return use | {"image": self.add_control(Path(os.path.expanduser(use["image"])))}

    def inputs(self, request: GenerateRequest) -> Inputs:
        """The inputs of one request."""
        wanted = {name: digest for name in IMAGES if (digest := request.arrays[name]) is not None}
        for name, digest in wanted.items():
            if digest not in self._files:
                raise RequestError(
                    f"{name} with SHA-256 {digest} was not given; pass its file with {FILE_OPTIONS[name]}"
                )
        for digest in request.control_images:
            if digest not in self._files:
                raise RequestError(f"a control image with SHA-256 {digest} was not given; pass its file with --control")
        shown = [self._files[digest] for digest in dict.fromkeys(request.control_images)]
        return self._open({name: self._files[digest] for name, digest in wanted.items()}, shown)

    def _open(self, files: dict[str, Path], shown: Sequence[Path] = ()) -> Inputs:
        if self._last[:2] != (files, [*shown]):
            given = {name: files.get(name) for name in IMAGES}
            self._last = files, [*shown], Inputs(self.latents, **given, control_images=[*shown])  # type: ignore[arg-type]
        return self._last[2]


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and not is_sha256(value)
