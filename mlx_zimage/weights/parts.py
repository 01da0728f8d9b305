"""The networks at a path: a model's folder, a network's own, ComfyUI's models/, what mflux saves, or a single file.

Weights are read where they are. Names of other programs are translated (see names.py), and fused or differently laid
out tensors become entries of the architecture, so that no second copy is written. fp8, GGUF and ComfyUI's quantized
files, which the networks cannot compute with, must first be converted with `mlx-zimage convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, RequestError
from ..models import NETWORKS
from . import official
from .component import (
    Component,
    Entry,
    checked_config,
    entries_in,
    find_network,
    needs_converting,
    read_entries,
    read_json,
)
from .hub import Repository, argument, check_inside, is_folder
from .listing import NUMBERED, visible, weight_variants
from .names import arrange, foreign_kind, networks_of, some

PIPELINE_CLASS = "ZImagePipeline"
# The pipelines that use the same networks. A ControlNet next to them is not read.
PIPELINE_CLASSES = (
    PIPELINE_CLASS,
    *(f"ZImage{use}Pipeline" for use in ("Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint")),
)
# What the config.json of a network's own folder declares, as _class_name or model_type.
DECLARED = {"ZImageTransformer2DModel": "transformer", "AutoencoderKL": "vae", "qwen3": "text_encoder"}
COMFYUI_ROOTS = ("", "models", "split_files")
COMFYUI_FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
}
T = TypeVar("T")


def open_networks(
    path: Path,
    repository: Repository | None = None,
    variant: str | None = None,
    names: Iterable[str] = NETWORKS,
    configs: Mapping[str, dict] | None = None,
) -> dict[str, Component]:
    """The networks at a path, of those named. Reads configs and headers, and checks them.

    repository is what the path is in, if it is a snapshot; headers of files that are not downloaded are read there.
    variant selects files, such as "fp16". configs are for networks that have none, by default the official ones. Links
    out of a folder are refused.
    """
    if not path.is_dir():
        return _open_networks(path, repository, variant, names, configs or official.CONFIGS)
    check_inside(path, config_files(path))
    found = _open_networks(path, repository, variant, names, configs or official.CONFIGS)
    check_inside(path, {entry.file for component in found.values() for entry in component.entries.values()})
    return found


def _open_networks(
    path: Path,
    repository: Repository | None,
    variant: str | None,
    names: Iterable[str],
    configs: Mapping[str, dict],
) -> dict[str, Component]:
    if not is_folder(path, repository):
        found = translated(read_single(path, repository), configs, path)
        return {name: found[name] for name in names if name in found}
    here = names_in(path, repository)
    if "model_index.json" in here:
        check_pipeline(path)
        check_variant(path, variant, repository)
        return {name: open_component(path, name, variant, repository) for name in names}
    if is_own_folder(path, repository):
        name, config = declared_network(path)
        return {name: open_network(name, path, config, read_entries(path, variant, repository))}
    if tree := comfyui_tree(path, repository):

        def held(file: Path) -> dict[str, Component]:
            return translated(read_single(file, repository), configs, file)

        return {name: chosen(name, files, held) for name in names if (files := tree[name])}
    own = [name for name in NETWORKS if _has_weights(path / name, repository)]
    if own and not any("config.json" in names_in(path / name, repository) for name in own):
        return {
            name: open_network(name, path / name, configs[name], read_entries(path / name, None, repository))
            for name in names
            if name in own
        }
    check_pipeline(path, repository)  # says what it is instead
    return {}


def files_to_convert(path: Path, repository: Repository, names: Iterable[str], variant: str | None) -> set[Path]:
    """The files of a repository that the converter reads, which are checked as far as headers allow."""
    if not is_folder(path, repository):
        return set(_series(path, names_in(path.parent, repository)))
    if "model_index.json" not in names_in(path, repository):
        return _bare_files_to_convert(path, repository, names, variant)
    check_pipeline(path)
    check_variant(path, variant, repository)
    found: set[Path] = set()
    for name in names:
        own = find_network(path, name)
        config, entries = read_json(own / "config.json"), read_entries(own, variant, repository)
        if not needs_converting(entries):
            open_network(name, own, config, entries)
        found |= {entry.file for entry in entries.values()}
    return found


def _bare_files_to_convert(path: Path, repository: Repository, names: Iterable[str], variant: str | None) -> set[Path]:
    """`files_to_convert` of a folder without a model_index.json."""
    stored = cache(partial(read_single, repository=repository))

    def unconverted(file: Path) -> dict[str, Path]:
        return dict.fromkeys(translated(stored(file), official.CONFIGS, file), file)

    def quantized(file: Path) -> dict[str, Path]:
        return dict.fromkeys(networks_of(stored(file)), file)

    if is_own_folder(path, repository):
        _, entries = declared_network(path), read_entries(path, variant, repository)
        if needs_converting(entries):
            return {entry.file for entry in entries.values()}
    elif tree := comfyui_tree(path, repository):
        return {chosen(name, files, unconverted, quantized) for name in names if (files := tree[name])}
    networks = open_networks(path, repository, variant, names)
    return {entry.file for part in networks.values() for entry in part.entries.values()}


def config_files(folder: Path) -> list[Path]:
    """The configs in a model's folder or a network's own, special files included."""
    places = (folder, *(folder / name for name in NETWORKS))
    names = ("config.json", "model_index.json")
    return [path for place in places for name in names if (path := place / name).exists()]


def own_configs(path: Path) -> dict[str, dict]:
    """The configs of the networks in a model's folder, for bare files that take their place."""
    files = {name: path / name / "config.json" for name in NETWORKS}
    return {**official.CONFIGS, **{name: read_json(file) for name, file in files.items() if file.exists()}}


def names_in(folder: Path, repository: Repository | None = None) -> list[str]:
    """The files in a folder, whether they are downloaded yet or not."""
    return repository.names(folder) if repository else [path.name for path in visible(folder) if path.is_file()]


def read_single(file: Path, repository: Repository | None = None) -> dict[str, Entry]:
    """The tensors of a safetensors file; CheckpointError, with what to do instead, for any other file."""
    if file.suffix != ".safetensors":
        is_gguf = file.suffix.lower() == ".gguf"
        advice = f"convert it first: mlx-zimage convert {argument(file)} DEST" if is_gguf else "expected a model"
        raise CheckpointError(f"{file} is {'GGUF' if is_gguf else 'not a safetensors file'}; {advice}")
    return entries_in(file, repository)


def translated(entries: Mapping[str, Entry], configs: Mapping[str, dict], label: Path) -> dict[str, Component]:
    """The checked networks that tensors make up, under any program's names; label is their file or folder."""
    found = _arranged(entries, label)
    return {name: _network(name, label, configs[name], found[name]) for name in NETWORKS if name in found}


def open_network(name: str, folder: Path, config: dict, entries: dict[str, Entry]) -> Component:
    """The checked network in a folder of its own, under any program's names."""
    if not checked_config(NETWORKS[name], config, folder / "config.json").shapes().keys() <= entries.keys():
        found = _arranged(entries, folder)
        if [*found] != [name]:
            raise CheckpointError(f"{folder} contains {' and '.join(found)}; expected only a {name}")
        return _network(name, folder, config, found[name])
    return Component(name, folder, config, entries)


def open_component(
    folder: Path, name: str, variant: str | None = None, repository: Repository | None = None
) -> Component:
    """One network of a model's folder. Reads its config and headers.

    If folder is in a snapshot of repository, the headers of files that are not downloaded yet are read there.
    """
    own = find_network(folder, name)
    return open_network(name, own, read_json(own / "config.json"), read_entries(own, variant, repository))


def _arranged(entries: Mapping[str, Entry], label: Path) -> dict[str, dict[str, Entry]]:
    """The entries of each network, by the architecture's names."""
    return {
        network: {name: entries[stored].piece(place.part, place.parts) for name, (stored, place) in own.items()}
        for network, own in arrange(entries, label).items()
    }


def _network(name: str, label: Path, config: dict, entries: dict[str, Entry]) -> Component:
    return Component(name, label, config, _laid_out(entries, config, name))


def _laid_out(entries: dict[str, Entry], config: dict, name: str) -> dict[str, Entry]:
    """The entries in the architecture's shapes, where only the layout or axes of length 1 differ.

    mflux stores convolutions as MLX has them, (out, h, w, in). Some shapes fit both ways, so all convolutions
    of a network are taken to be stored alike.
    """
    shapes = NETWORKS[name].from_dict(config).shapes()
    turned = {key: shape for key, shape in shapes.items() if key in entries and _turns(entries[key].shape, shape)}
    channels_last = any(entries[key].shape != shape for key, shape in turned.items())
    found = dict(entries)
    for key, shape in shapes.items():
        if key not in entries or key.removesuffix(".weight") + ".scales" in entries:
            continue
        if channels_last and key in turned:
            found[key] = replace(entries[key], shape=shape, channels_last=True)
        elif [n for n in entries[key].shape if n != 1] == [n for n in shape if n != 1]:
            found[key] = replace(entries[key], shape=shape)
    return found


def _turns(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor may be a convolution that is stored as (out, h, w, in)."""
    return len(stored) == len(shape) == 4 and (stored[0], stored[3], stored[1], stored[2]) == shape


def is_own_folder(path: Path, repository: Repository | None = None) -> bool:
    """Whether a folder contains one network, as transformers or diffusers saves it."""
    here = names_in(path, repository)
    return "config.json" in here and any(name.endswith(".safetensors") for name in here)


def declared_network(path: Path) -> tuple[str, dict]:
    """The network that a folder of its own is for, and its config."""
    config = read_json(path / "config.json")
    kind = config.get("_class_name") or config.get("model_type")
    if kind not in DECLARED:
        raise CheckpointError(f"{path / 'config.json'} declares {kind or 'no model'}; expected {', '.join(DECLARED)}")
    return DECLARED[kind], config


def comfyui_tree(path: Path, repository: Repository | None = None) -> dict[str, list[Path]]:
    """The files in ComfyUI's models folder by the network that they are for; empty if it is not such a folder.

    GGUF files, which the converter reads, are only among those on this machine.
    """
    suffixes = (".safetensors",) if repository else (".safetensors", ".gguf")
    for root in (path / root for root in COMFYUI_ROOTS):
        found = {
            name: [
                root / folder / file
                for folder in folders
                if is_folder(root / folder, repository)
                for file in names_in(root / folder, repository)
                if file.lower().endswith(suffixes)
            ]
            for name, folders in COMFYUI_FOLDERS.items()
        }
        if found["transformer"]:
            return found
    return {}


def chosen(name: str, files: list[Path], *ways: Callable[[Path], Mapping[str, T]]) -> T:
    """The one network of this name in ComfyUI's files for it: read in the first of these ways that can read any of the
    files."""
    faults: list[str] = []
    for read in ways:
        found: dict[Path, T] = {}
        faults = []
        for file in files:
            try:
                held = read(file)
                if name not in held:
                    raise CheckpointError(f"{file} contains only {' and '.join(held)}")
                found[file] = held[name]
            except CheckpointError as error:
                faults.append(str(error))
        if len(found) > 1:
            raise RequestError(
                f"several files can be used as the {name}: {', '.join(map(str, found))}; choose one with "
                f"--{name.replace('_', '-')} ({name}= in Python)"
            )
        if found:
            return next(iter(found.values()))
    raise CheckpointError(f"none of {files[0].parent}'s files can be used as the {name}: {'; '.join(faults)}")


def _series(path: Path, names: Iterable[str]) -> list[Path]:
    """A file, with the other parts of a split one."""
    own = NUMBERED.fullmatch(path.name)
    if own is None:
        return [path]
    found = [(name, NUMBERED.fullmatch(name)) for name in names]
    return [path.with_name(name) for name, row in found if row and row.groups() == own.groups()]


def _has_weights(folder: Path, repository: Repository | None) -> bool:
    return is_folder(folder, repository) and any(name.endswith(".safetensors") for name in names_in(folder, repository))


# ---- checks on a model folder, shared with the converter


def check_pipeline(folder: Path, repository: Repository | None = None) -> None:
    """Refuse a folder that does not contain a Z-Image pipeline, and say what it is instead."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json{_what(folder, repository)}; expected a diffusers folder"
        )
    kind = read_json(index).get("_class_name")
    if kind not in PIPELINE_CLASSES:
        raise CheckpointError(f"{index} declares {kind or 'no pipeline'}; expected {PIPELINE_CLASS}")


def _what(folder: Path, repository: Repository | None) -> str:
    """What a folder without model_index.json contains, if it is recognized."""
    if (folder / "adapter_config.json").is_file():
        return ": it is a LoRA"
    names = names_in(folder, repository)
    try:
        weights = [name for name in names if name.endswith(".safetensors")]
        kind = foreign_kind(entries_in(folder / weights[0], repository)) if weights else None
    except CheckpointError:
        kind = None
    if kind:
        return f": it is a {kind}"
    files = repository.sizes if repository else visible(folder, "*/model_index.json")
    models = [file.parent.name for file in files if file == folder / file.parent.name / "model_index.json"]
    if models:
        return f", but these folders in it do: {some(models)}"
    if packed := [name for name in names if name.endswith(".gguf")]:
        return f", only GGUF files: convert one first, as in mlx-zimage convert {argument(folder / packed[0])} DEST"
    return ""


def check_variant(
    folder: Path, variant: str | None, repository: Repository | None = None, others: Iterable[str] = ()
) -> None:
    """Refuse a file variant that no network has, instead of using the default files for all of them.

    `others` lists what else a variant could have named.
    """
    if variant is None:
        return
    folders = [folder / name for name in NETWORKS]
    names = [repository.names(own) if repository else [path.name for path in visible(own)] for own in folders]
    held = {found for own in names for found in weight_variants(own)}
    if variant in held:
        return
    files = ", ".join(sorted(held - {""}))
    *first, last = [*others, *([f"a file variant of {folder} ({files})"] if files else [])] or [""]
    if not last:
        raise RequestError(f"{folder} has no file variants, got variant {variant!r}; leave it out")
    named = f"{', '.join(first)} or {last}" if first else last
    none = "" if files else f", since {folder} has no file variants"
    raise RequestError(f"variant must be {named}{none}; got {variant!r}")
