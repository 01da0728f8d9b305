"""Finding and opening a ControlNet: the published single file, or a folder as diffusers or our converter writes it.

Its architecture is recognized from its weights, and the folder's config.json where there is one. What it was trained
for is not in the weights: it is taken from a Hugging Face id or a file's name, or given by the user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, ModelNotFoundError, RequestError, ZImageError
from ..models import CONTROLNET
from ..models.controlnet import LAYERS, MASKED, PUBLISHED_LAYERS, REFINER, config_of
from ..models.transformer import TransformerConfig
from ..sizes import counted
from ..untrusted import brief
from .checkpoint import fingerprint, origins, weight_files
from .component import Component, Entry, entries_in, read_entries, read_header, read_json
from .hub import POCKET, Repository, is_folder, locate, name_of
from .names import foreign_kind

LITE_BLOCKS = 3
CLASS = "ZImageControlNetModel"  # what config.json declares, as in diffusers
# What a ControlNet may have been trained for, and how its name indicates it.
TRAITS = {
    "8-steps": re.compile(r"8-?steps", re.IGNORECASE),
    "tile": re.compile(r"(^|[^a-z])tile([^a-z]|$)", re.IGNORECASE),
    "base": re.compile(r"z-image-fun-controlnet", re.IGNORECASE),
}
NAMED = re.compile(r"z-image(-turbo)?-fun-controlnet", re.IGNORECASE)  # as the published files are


@dataclass(frozen=True)
class Kind:
    """What a ControlNet was trained for: a set of TRAITS; None if it is not known."""

    traits: frozenset[str] | None

    @classmethod
    def of(cls, name: str) -> Kind:
        """The kind that the name of a file or a Hugging Face id indicates."""
        found = frozenset(trait for trait, pattern in TRAITS.items() if pattern.search(name))
        return cls(found if found or NAMED.search(name) else None)

    @classmethod
    def parse(cls, text: str) -> Kind:
        """The kind that a user gives: traits separated by commas, or "plain" for none of them."""
        names = [name.strip() for name in text.split(",")] if isinstance(text, str) else []
        if not names or not {*names} <= {*TRAITS, "plain"} or ("plain" in names and len(names) > 1):
            raise RequestError(
                f"--control-kind (kind in Python) must be plain, or one or more of {', '.join(TRAITS)}, separated by "
                f"commas, got {brief(text)}"
            )
        return cls(frozenset(names) - {"plain"})

    def __str__(self) -> str:
        return "unknown kind" if self.traits is None else ", ".join(sorted(self.traits)) or "plain"

    def __contains__(self, trait: str) -> bool:
        return self.traits is not None and trait in self.traits


@dataclass(frozen=True)
class ControlNetFile:
    """An opened ControlNet: its checked weights, and what it was trained for."""

    component: Component
    kind: Kind
    name: str
    repositories: tuple[Repository, ...] = field(default=(), compare=False)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.component)

    @property
    def version(self) -> str:
        """The published version that has this architecture, such as "2.1 lite"."""
        config = self.component.config
        if config.control_in_dim != MASKED:
            return "1"
        lite = " lite" if len(config.control_layers_places) <= LITE_BLOCKS else ""
        return ("2.0" if config.add_control_noise_refiner == LAYERS else "2.1") + lite

    @property
    def scale(self) -> float:
        """The published recommendation: the fewer blocks, the stronger. Pocket's own is best as trained."""
        if self.component.folder == POCKET / CONTROLNET:
            return 1.0
        return 0.85 if "tile" in self.kind else 0.9 if "lite" in self.version else 0.75

    @property
    def steps(self) -> int | None:
        """The steps that it needs on Turbo, where those are more than Turbo's own."""
        distilled = "8-steps" in self.kind or self.version == "1" or "base" in self.kind or self.kind.traits is None
        return None if distilled else 20

    def __str__(self) -> str:
        config = self.component.config
        blocks = f"{len(config.layers)} + {len(config.refining)} blocks, {config.control_in_dim} channels"
        return f"{self.name}: ControlNet Union {self.version} ({self.kind}), {blocks}"


def find_controlnet(source: str | Path) -> tuple[Path, Repository | None]:
    """The file or folder of a ControlNet; ID:FILE names one in a repository. Only configs are downloaded."""
    if not isinstance(source, (str, Path)):
        raise RequestError(f"a ControlNet must be a file, a folder or a Hugging Face id, got {type(source).__name__}")
    if str(source) == "pocket":
        return POCKET / CONTROLNET, None
    try:
        path, repository = locate(source)
    except ModelNotFoundError as error:
        if not str(error).startswith("no model at"):
            raise
        takes = "give a file, a folder, a Hugging Face id, id:file or 'pocket'"
        raise ModelNotFoundError(f"no ControlNet at {source}; {takes}") from None
    if repository and path == repository.folder:
        files = [file for file in repository.sizes if file.suffix == ".safetensors"]
        if "config.json" not in repository.names(path) and len(files) != 1:
            listed = "; ".join(f"{source}:{file.relative_to(path)}" for file in sorted(files))
            several = f"{source} has {len(files)} safetensors files; choose one: {listed}"
            raise ModelNotFoundError(several if files else f"{source} has no safetensors file; expected a ControlNet")
        path = path if "config.json" in repository.names(path) else files[0]
    return path, repository


def is_controlnet(source: str | Path) -> bool:
    """Whether a source is a ControlNet; False if it is anything else, or cannot be read."""
    try:
        path, repository = locate(source)
        if is_folder(path, repository):
            names = repository.names(path) if repository else [file.name for file in path.iterdir()]
            if "model_index.json" in names:
                return False
            within = path if "config.json" in names else path / CONTROLNET
            return read_json(within / "config.json").get("_class_name") == CLASS
        return path.suffix == ".safetensors" and foreign_kind(entries_in(path, repository)) == "ControlNet"
    except (ZImageError, OSError):
        return False


def open_controlnet(
    source: str | Path,
    kind: str | None = None,
    transformer: TransformerConfig | None = None,
    fetch: bool = True,
) -> ControlNetFile:
    """Find a ControlNet, check it against the architecture, and download it if needed. Reads no tensor data, except to
    see whether the blocks of version 2.0 for the noise refiner were trained.

    CheckpointError if it is not a ControlNet, or not one for this transformer. kind is what it was trained for, by
    default what its name says. For planning, fetch=False only reads the headers of a repository.
    """
    given = Kind.parse(kind) if kind is not None else None
    path, repository = find_controlnet(source)
    opened = _open(path, repository, transformer.n_layers if transformer else PUBLISHED_LAYERS)
    if transformer:
        _check_fits(opened, transformer, path)
    if repository and fetch:
        files = weight_files([opened])
        repository.fetch(repository.own(files))
        for file in files:
            read_header(file)  # raises if the file is incomplete
    if all(file.exists() for file in weight_files([opened])) and _is_untrained(opened):
        entries = {name: entry for name, entry in opened.entries.items() if not name.startswith(f"{REFINER}.")}
        opened = Component(
            CONTROLNET, opened.folder, opened.raw_config | {"add_control_noise_refiner": LAYERS}, entries
        )
    # a pipeline's own ControlNet has the pipeline's name
    name = name_of(path.parent if path.name == CONTROLNET else path)
    names = " ".join([name, *origins(path)])  # a conversion keeps what the original's name says
    return ControlNetFile(opened, given or Kind.of(names), name, (repository,) if repository else ())


def _open(path: Path, repository: Repository | None, layers: int) -> Component:
    folder = is_folder(path, repository)
    if folder:
        within = path / "controlnet"  # of a pipeline that diffusers saved
        path = within if (within / "config.json").exists() else path
        entries = read_entries(path, None, repository)
    elif path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a safetensors file; expected a ControlNet")
    else:
        entries = entries_in(path, repository)
    own = {name: entry for name, entry in entries.items() if name.startswith("control_")}
    if not own:
        kind = foreign_kind(entries)
        others = {"ControlNet": "is a ControlNet for another model", None: "is not a ControlNet"}
        raise CheckpointError(f"{path} {others.get(kind, f'is a {kind}')}; expected a ControlNet for Z-Image")
    file = path / "config.json"
    try:
        given = folder and file.exists()
        config = read_json(file) if given else {"_class_name": CLASS, **config_of(_dense(own), layers)}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Component(CONTROLNET, path, config, own)


def _dense(entries: dict[str, Entry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in entries.items()}


def _check_fits(opened: Component, transformer: TransformerConfig, label: Path) -> None:
    config = opened.config
    for name, own, wanted in (
        ("dimension", config.dim, transformer.dim),
        ("head", config.n_heads, transformer.n_heads),
        ("refiner layer", config.n_refiner_layers, transformer.n_refiner_layers),
    ):
        if own != wanted:
            raise CheckpointError(
                f"{label} is for another model: it has {counted(own, name)}, but this transformer has {wanted}; "
                f"use a ControlNet for this model"
            )
    if (last := max(config.control_layers_places)) >= transformer.n_layers:
        raise CheckpointError(
            f"{label} is for another model: it has a block for layer {last}, but this transformer's "
            f"layers are 0 to {transformer.n_layers - 1}; use a ControlNet for this model"
        )
    if config.control_in_dim not in (transformer.in_channels, MASKED):
        raise CheckpointError(
            f"{label} reads {config.control_in_dim} channels; expected {transformer.in_channels} or {MASKED}"
        )


def _is_untrained(opened: Component) -> bool:
    """Whether its blocks for the noise refiner are as they were before training, as in the first file of version 2.0:
    `before_proj` or `after_proj` is zero."""
    if opened.config.add_control_noise_refiner != REFINER or opened.quantizations:
        return False
    parts = (opened.read(f"{REFINER}.0.{part}", mx.float32)() for part in ("before_proj", "after_proj"))
    return any(not np.array(part["weight"]).any() for part in parts)
