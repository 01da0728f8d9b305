"""From a request to finished files: adds timing, origin and saving to what the pipeline yields.

`run` yields events as they happen: the pipeline's Phases and Steps, and each image once its file is written. `events`
is the same without files; `images.codec.encode` turns its images into bytes. Progress and previews are up to the
caller's loop, and leaving the loop stops the work. Nothing is printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

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
class Cost:
    """What a request took up to one of its images: seconds, and peak memory in bytes, measured and predicted.

    The first step includes reading the transformer. encode_s is 0 for a cached prompt, image_s without an image to
    start from; scale_s, the time to find float16's scale, is 0 in other dtypes and when the scale is cached.
    """

    elapsed_s: float
    scale_s: float
    encode_s: float
    steps_s: tuple[float, ...]
    decode_s: float
    peak: int
    predicted_peak: int
    image_s: float = 0.0

    def to_dict(self) -> dict:
        """Rounded values for JSON; memory in GB."""
        first, *rest = self.steps_s
        return {
            "seconds": round(self.elapsed_s, 4),
            "scale_seconds": round(self.scale_s, 4),
            "encode_seconds": round(self.encode_s, 4),
            "image_seconds": round(self.image_s, 4),
            "first_step_seconds": round(first, 4),
            "step_seconds": round(sum(rest) / len(rest), 4) if rest else None,
            "decode_seconds": round(self.decode_s, 4),
            "peak_memory_gb": round(self.peak / 1e9, 4),
            "predicted_peak_memory_gb": round(self.predicted_peak / 1e9, 4),
        }


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


class Clock:
    """Times one request: starts when created, and is given the pipeline's events as they arrive."""

    def __init__(self) -> None:
        mx.reset_peak_memory()
        self.begin = self.last = time.perf_counter()
        self.before = {"scale": 0.0, "encode": 0.0, "image": 0.0}  # the phases before the steps
        self.steps: list[float] = []

    def phase(self, phase: Phase) -> None:
        if phase.name in self.before:
            self.before[phase.name] += self._lap()

    def step(self, step: Step) -> None:
        del self.steps[step.index :]  # drop the steps of an image that started over
        self.steps.append(self._lap())

    def cost(self, image: Generated) -> Cost:
        decode, before = self._lap(), self.before
        return Cost(
            elapsed_s=self.last - self.begin,
            scale_s=before["scale"],
            encode_s=before["encode"],
            steps_s=tuple(self.steps),
            decode_s=decode,
            peak=mx.get_peak_memory(),
            predicted_peak=image.plan.peak,
            image_s=before["image"],
        )

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self.last = now - self.last, now
        return lap


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


def events(model: OpenModel, request: GenerateRequest, inputs: Inputs = NONE) -> Iterator[Phase | Step | Finished]:
    """Run a request: yields the pipeline's Phases and Steps, and each image with its origin and cost."""
    clock = Clock()
    for event in model.pipeline.events(request, inputs):
        if isinstance(event, Generated):
            origin = Origin(event.request, model.name, model.fingerprint, event.dtype, event.index)
            yield Finished(event.pixels, origin, clock.cost(event))
        elif isinstance(event, Step):
            clock.step(event)
            yield event
        else:
            clock.phase(event)
            yield event


def run(
    model: OpenModel, request: GenerateRequest, path: Path, files: Files, inputs: Inputs = NONE
) -> Iterator[Phase | Step | Saved]:
    """Run a request and save its images as path or, if that is taken, path-1, path-2, ..."""
    for event in events(model, request, inputs):
        if isinstance(event, Finished):
            yield Saved(event.pixels, event.origin, event.cost, files.save(event, path))
        else:
            yield event
