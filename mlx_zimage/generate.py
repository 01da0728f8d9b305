"""From a request to finished files: adds timing, origin and saving to what the pipeline yields.

`run` yields events as they happen: the pipeline's Phases and Steps, and each image once its file is written. `events`
is the same for one request, without files; `images.codec.encode` turns its images into bytes. Progress and previews are
up to the caller's loop, and leaving the loop stops the work. Nothing is printed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .clock import Clock, Cost
from .distributed import Group
from .images.codec import encode
from .images.files import write_file
from .images.metadata import Origin
from .inputs import NONE, Inputs
from .pipeline import Generated, Phase, ZImagePipeline
from .request import GenerateRequest
from .sampling import Step
from .weights.checkpoint import fingerprint
from .weights.hub import name_of


@dataclass(frozen=True)
class OpenModel:
    """An open model, with what its images record about it: a readable name and the fingerprint of its weights."""

    pipeline: ZImagePipeline
    name: str
    fingerprint: str


@dataclass(frozen=True)
class Finished:
    """One image: pixels (H, W, 3) uint8, its origin, and its cost."""

    pixels: np.ndarray
    origin: Origin
    cost: Cost


@dataclass(frozen=True)
class Saved(Finished):
    """One image, saved to a file."""

    path: Path

    def to_dict(self) -> dict:
        """Path, checksum, origin and cost, for JSON."""
        return {**described(self.path, self.origin), **self.cost.to_dict()}


def described(path: Path, origin: Origin) -> dict:
    """The path, checksum and origin of an image file, for JSON."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"path": os.fspath(path), "sha256": sha256, **json.loads(origin.to_json())}


class Files:
    """The files of one call. overwrite replaces older files, but never one that this call wrote."""

    def __init__(self, overwrite: bool = False, metadata: bool = True):
        self.overwrite = overwrite
        self.metadata = metadata
        self.written: set[Path] = set()

    def save(self, image: Finished, path: Path) -> Path:
        """Write an image, with its origin unless metadata is off; returns the path it was written to."""
        return self.write(encode(image.pixels, path.suffix, image.origin if self.metadata else None), path)

    def write(self, content: bytes, path: Path) -> Path:
        """Write the content of an image file; returns the path it was written to."""
        overwrite = self.overwrite and path not in self.written
        saved = write_file(content, path, overwrite)
        self.written.add(saved)
        return saved


def open_model(
    source: str,
    dtype: str | None = None,
    memory: str | int | None = None,
    keep: bool | None = None,
    variant: str | None = None,
    wired: bool = False,
    group: Group | None = None,
    **parts: str | None,
) -> OpenModel:
    """Open a model to generate with; see `ZImagePipeline.from_pretrained`, which takes the parts by name."""
    pipeline = ZImagePipeline.from_pretrained(source, dtype, memory, keep, variant, wired, group=group, **parts)
    name = name_of(Path(source)) if Path(source).exists() else source  # not the full path: images are shared
    return OpenModel(pipeline, name, fingerprint(pipeline.checkpoint))


def events(
    model: OpenModel, request: GenerateRequest, inputs: Inputs = NONE
) -> Generator[Phase | Step | Finished, None, None]:
    """Run a request: yields the pipeline's Phases and Steps, and each image with its origin and cost."""
    return _finished(model, model.pipeline.events(request, inputs))


def _finished(
    model: OpenModel, found: Iterator[Phase | Step | Generated]
) -> Generator[Phase | Step | Finished, None, None]:
    clock = Clock()
    for event in found:
        if isinstance(event, Generated):
            group = model.pipeline.group
            speeds = group.speeds if group is not None and len({*group.speeds}) > 1 else None
            origin = Origin(event.request, model.name, model.fingerprint, event.dtype, event.index, speeds=speeds)
            yield Finished(event.pixels, origin, event.cost or clock.cost(event.plan))
        else:
            clock(event)
            yield event


def run(
    model: OpenModel, works: Sequence[tuple[GenerateRequest, Inputs]], paths: Sequence[Path], files: Files
) -> Iterator[Phase | Step | Saved]:
    """Run requests at once (see `ZImagePipeline.at_once`), usually one, and save their images.

    A request's images are saved as its path or, if that is taken, path-1, path-2, ...
    """
    left = [path for (request, _), path in zip(works, paths, strict=True) for _ in range(request.num_images)]
    for event in _finished(model, model.pipeline.at_once(works)):
        if isinstance(event, Finished):
            yield Saved(event.pixels, event.origin, event.cost, files.save(event, left.pop(0)))
        else:
            yield event
