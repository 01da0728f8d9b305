"""What the server and its worker process send each other: plain data, since it is pickled. Imports no MLX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ---- to the worker


@dataclass(frozen=True)
class Options:
    """What a worker is started with: models' sources by name, the budget in bytes, and when to unload, in seconds.

    controlnet is the source of a ControlNet for the models that it fits, and control_kind what it was trained for.
    """

    models: Mapping[str, str]
    lora_dir: Path | None = None
    controlnet: str | None = None
    control_kind: str | None = None
    memory: int | None = None
    idle_s: float | None = None


@dataclass(frozen=True)
class Job:
    """Images that differ in their seeds only: a GenerateRequest's other fields, and the files that it starts from.

    marks says which part of the mask is regenerated: its "white", "black" or "transparent" pixels. ending and quality
    are those of the files to make; previews is the number of previews per image. Without metadata, the files do not
    record how they were made. controls are the files of the control images, one for each of fields["controls"], which
    do not name theirs; None for one without an image.
    """

    id: int
    model: str
    fields: Mapping[str, Any]
    seeds: tuple[int, ...]
    image: bytes | None = None
    mask: bytes | None = None
    controls: tuple[bytes | None, ...] = ()
    marks: str = "white"
    ending: str = ".png"
    quality: int = 95
    previews: int = 0
    metadata: bool = True


@dataclass(frozen=True)
class Cancel:
    id: int


# ---- from the worker


@dataclass(frozen=True)
class Model:
    """An open model: its name, defaults and capabilities.

    controlnet is the name of its ControlNet, if it has one. With that, control_steps are its default steps,
    control_scale is the default scale, and control_kinds are the kinds of control images that can be made from a photo.
    """

    name: str
    variant: str
    steps: int
    size: int
    takes_guidance: bool
    guidance: float
    fingerprint: str
    controlnet: str | None = None
    control_steps: int | None = None
    control_scale: float | None = None
    control_kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ready:
    models: tuple[Model, ...]


@dataclass(frozen=True)
class Failed:
    """A job (or, if id is None, the worker itself) failed with a subclass of ZImageError, or because of a bug
    ("Exception")."""

    id: int | None
    kind: str
    message: str


@dataclass(frozen=True)
class Accepted:
    """A job fits. tokens counts those of its prompts, and work is in pixels times steps, all images together."""

    id: int
    width: int
    height: int
    steps: int
    tokens: int
    work: int


@dataclass(frozen=True)
class Started:
    id: int


@dataclass(frozen=True)
class Progress:
    """`done` of all `steps` of a job, all images together."""

    id: int
    done: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """A preview, the index-th of its image, as the content of an image file."""

    id: int
    image: int
    index: int
    content: bytes


@dataclass(frozen=True)
class Image:
    """A finished image: its file, the origin that it stores as a dict, and A1111's text for it."""

    id: int
    index: int
    content: bytes
    origin: Mapping[str, Any]
    parameters: str


@dataclass(frozen=True)
class Done:
    """A job has ended; cancelled if some of its images were not generated."""

    id: int
    cancelled: bool = False


@dataclass(frozen=True)
class Loaded:
    """The model that may have weights in memory from now on; None after they were unloaded."""

    model: str | None


@dataclass(frozen=True)
class Note:
    """A warning, for the log."""

    message: str
