"""From a model's name to checked weights: find the folder, read the headers, hand out lazy arrays.

A model is a diffusers folder, as published or as our converter writes it. Opening it reads only configs and headers,
and checks every name and shape against the architecture; tensor data is read when a network asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import variants
from ..errors import CheckpointError, RequestError, warn
from ..models import NETWORKS
from ..scheduler import SchedulerConfig
from ..tokenizer import Tokenizer
from ..untrusted import brief, open_regular, parse_json
from ..variants import Variant
from . import official
from .component import Component, checked_config, read_header, read_json, read_metadata
from .hub import TOKENIZER_FILES, Repository, check_inside, locate, name_of
from .manifest import CONVERSION, CONVERSION_KEY
from .parts import check_variant, files_to_convert, open_component, open_networks, own_configs
from .unchanged import unchanged

Location = str | Path


class BorrowedFromHub(UserWarning):
    """Something that the source lacks is taken from the official repository."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened model: its checked networks by name, the scheduler's config, its variant and its tokenizer.

    folder is the model's folder or file. repositories are those that some of the files are in.
    """

    folder: Path
    networks: Mapping[str, Component]
    scheduler: SchedulerConfig
    variant: Variant
    tokenizer_file: Path
    repositories: tuple[Repository, ...] = ()

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first use: reading it takes up to a second, so opening a checkpoint does not."""
        tokenizer = Tokenizer(self.tokenizer_file)
        check_tokenizer(tokenizer, self.text_encoder.config.vocab_size, self.tokenizer_file)
        return tokenizer

    @property
    def components(self) -> Iterable[Component]:
        return self.networks.values()

    @property
    def nbytes(self) -> int:
        """The bytes of all weights on disk."""
        return sum(component.nbytes for component in self.components)

    @property
    def to_download(self) -> int:
        """The bytes of weights that are not on this disk yet."""
        return sum(
            repository.to_fetch(repository.own(weight_files(self.components))) for repository in self.repositories
        )

    @property
    def transformer(self) -> Component:
        return self.networks["transformer"]

    @property
    def text_encoder(self) -> Component:
        return self.networks["text_encoder"]

    @property
    def vae(self) -> Component:
        return self.networks["vae"]


def open_checkpoint(
    source: Location, variant: str | None = None, parts: Mapping[str, Location | None] | None = None
) -> Checkpoint:
    """Find a model and check it against the architecture. Reads configs and headers, but no tensor data.

    parts says for each network where to take it from, by default from source. Each place is a path or Hugging Face id
    (see hub.locate) of what `open_networks` reads. What none of them contains comes from the official repository.

    variant names the row of `variants` that applies to the model; by default the model is recognized. Any other name is
    a file variant: "fp16" reads `model.fp16.safetensors` for each network that has it. The weights of a repository are
    downloaded after its configs and headers have been checked.
    """
    checkpoint = open_headers(source, variant, parts)
    for repository in checkpoint.repositories:
        if repository.own([checkpoint.tokenizer_file]):
            repository.fetch(repository.matching(TOKENIZER_FILES, checkpoint.tokenizer_file.parents[1]))
    if not checkpoint.tokenizer_file.is_file():
        raise CheckpointError(f"{checkpoint.tokenizer_file} is missing; download the model again")
    if checkpoint.to_download:
        checkpoint.open_tokenizer()  # refuses it before the weights are downloaded
    for repository in checkpoint.repositories:
        files = repository.own(weight_files(checkpoint.components))
        repository.fetch(files)
        for file in files:
            read_header(file)  # raises if the file is incomplete
    return checkpoint


def open_headers(
    source: Location, variant: str | None = None, parts: Mapping[str, Location | None] | None = None
) -> Checkpoint:
    """open_checkpoint for planning: of repositories, only configs and headers are downloaded."""
    others = {name: other for name, other in (parts or {}).items() if other is not None}
    files = variant if variant not in variants.VARIANTS else None
    named = variants.named(variant) if variant and not files else None
    path, repository = locate(source)
    repositories = [repository] if repository else []
    check_variant(path, files, repository, variants.VARIANTS)
    tokenizer, scheduler_file = path / "tokenizer" / "tokenizer.json", path / "scheduler" / "scheduler_config.json"
    if path.is_dir():
        check_inside(path, [file for file in (tokenizer, scheduler_file, path / CONVERSION) if file.exists()])
    networks = open_networks(path, repository, files, [name for name in NETWORKS if name not in others])
    for name, other in others.items():
        place, its_repository = locate(other)
        repositories += [its_repository] if its_repository else []
        found = open_networks(place, its_repository, configs=own_configs(path))
        if name not in found:
            raise RequestError(
                f"{other} contains no {name}, only {' and '.join(found)}; give a file or folder that does"
            )
        networks[name] = found[name]
    if "transformer" not in networks:
        raise RequestError(
            f"{source} contains no transformer, only {' and '.join(networks)}; give the transformer as the model"
        )
    missing = [name for name in NETWORKS if name not in networks]
    is_whole = (path / "model_index.json").is_file()
    if missing or not (is_whole or tokenizer.is_file() or (repository and tokenizer in repository.sizes)):
        official_files = Repository(official.REPOSITORY)
        repositories.append(official_files)
        names = " or ".join(missing + ([] if is_whole else ["tokenizer"]))
        warn(f"{source} contains no {names}; using {official.REPOSITORY}", BorrowedFromHub)
        networks |= {name: open_component(official_files.folder, name, None, official_files) for name in missing}
        if not is_whole:
            tokenizer = official_files.folder / "tokenizer" / "tokenizer.json"
    raw_scheduler = read_json(scheduler_file) if is_whole or scheduler_file.exists() else official.SCHEDULER
    scheduler = checked_config(SchedulerConfig, raw_scheduler, scheduler_file)
    known = named or variants.recognize(scheduler.shift, [name_of(networks["transformer"].folder), *origins(path)])
    if named and variants.recognize(scheduler.shift, []) != known:  # then its schedule is a different one, too
        scheduler = replace(scheduler, shift=known.shift)
    check_widths({name: network.config for name, network in networks.items()}, path)
    ordered = {name: networks[name] for name in NETWORKS if name in networks}
    return Checkpoint(path, ordered, scheduler, known, tokenizer, tuple(repositories))


def resolve(source: Location, names: Collection[str] = tuple(NETWORKS), variant: str | None = None) -> Path:
    """A model's folder or file. For a repository, the named networks and the tokenizer are checked, then downloaded."""
    path, repository = locate(source)
    if repository:
        files = files_to_convert(path, repository, names, variant)
        repository.fetch(repository.matching(TOKENIZER_FILES, path))
        repository.fetch(files)
    return path


def weight_files(components: Iterable[Component]) -> list[Path]:
    """The files that contain the networks' tensors."""
    return sorted({entry.file for component in components for entry in component.entries.values()})


# ---- checks on a model folder, shared with the converter


def check_widths(configs: Mapping[str, Any], label: object) -> None:
    """Refuse networks that do not fit together."""
    text, wanted = configs["text_encoder"].hidden_size, configs["transformer"].cap_feat_dim
    if text != wanted:
        raise CheckpointError(
            f"{label}: the text encoder outputs {text} features per token, but the transformer expects {wanted}; "
            f"they belong to different models"
        )
    channels, held = configs["transformer"].in_channels, configs["vae"].latent_channels
    if channels != held:
        raise CheckpointError(
            f"{label}: the transformer's latents have {channels} channels, but the VAE's have {held}; "
            f"they belong to different models"
        )


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, label: object) -> None:
    """Refuse a tokenizer with more tokens than the text encoder's embedding has rows."""
    if tokenizer.size > vocab_size:
        raise CheckpointError(
            f"{label} has {tokenizer.size} tokens, but the text encoder has {vocab_size}; "
            f"they belong to different models"
        )


def origins(folder: Path) -> list[str]:
    """The sources a folder was converted from, as our converter recorded them: newest first, empty if it was not."""
    try:
        record = read_conversion(folder)
    except CheckpointError:  # it is damaged, which `verify` reports
        return []
    found = []
    while record:
        parts = record.get("parts")
        found += [str(parts["transformer"])] if isinstance(parts, dict) and "transformer" in parts else []
        found.append(str(record.get("source")))
        record = record.get("before") or {}
    return found


def read_conversion(path: Path) -> dict:
    """How our converter made a folder or a single file, as it records there; empty if it did not. Types are checked."""
    file = path / CONVERSION
    if path.is_file():
        file, text = path, read_metadata(path).get(CONVERSION_KEY, "{}")
        try:
            record = parse_json(text.encode())
        except ValueError as error:
            raise CheckpointError(f"{path}: {CONVERSION_KEY} in its metadata is not valid ({error})") from error
    elif file.exists():
        record = read_json(file)
    else:
        return {}
    step: Any = record
    types = {"source": str, "converter": str, "dtype": str, "quantization": dict}
    while step:
        target = step.get("quantization", {}) if isinstance(step, dict) else None
        if target is None or not all(isinstance(step.get(key, kind()), kind) for key, kind in types.items()):
            move = "convert or download it again" if path.is_file() else "remove it"
            file = file.resolve()  # the hub's cache would restore a link to it
            raise CheckpointError(f"{file} was not written by this converter, or has been changed; {move}")
        if not isinstance(target.get("target_bytes") or 0, int):
            raise CheckpointError(f"{file}: target_bytes is {brief(target['target_bytes'])}, expected a whole number")
        step = step.get("before")
    return record or {}


def fingerprint(model: Checkpoint | Component) -> str:
    """Ten hexadecimal digits that identify a model's weights, or one network's, wherever they are stored.

    Reads each safetensors header and 64 evenly spaced samples of 4 KB per file, which takes milliseconds; a checksum of
    a full-size model takes a minute. It may miss damage to single bytes, which `mlx-zimage verify` finds.
    """
    sha = hashlib.sha256()
    components = [model] if isinstance(model, Component) else model.components
    files = {entry.file: entry for component in components for entry in component.entries.values()}
    for file, entry in sorted(files.items(), key=lambda item: (item[0].parent.name, item[0].name)):
        with unchanged([entry]), open_regular(file) as stream:
            size = file.stat().st_size
            header = int.from_bytes(stream.read(8), "little")
            sha.update(stream.read(header))
            for i in range(64):
                stream.seek(8 + header + (size - 8 - header) * i // 64)
                sha.update(stream.read(4096))
    return sha.hexdigest()[:10]
