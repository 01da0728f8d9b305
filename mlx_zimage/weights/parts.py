"""The networks at a path: a model's folder, a network's own, ComfyUI's models/, what mflux saves, or a single file.

Weights are read where they are. Names of other programs are translated (see names.py), and fused or differently laid
out tensors become entries of the architecture, so that no second copy is written. fp8 and GGUF, which the networks
cannot compute with, must first be converted with `mlx-zimage convert`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError, RequestError
from ..models import NETWORKS, OPTIONAL
from . import official
from .component import (
    SHOWN,
    Component,
    Entry,
    entries_in,
    find_network,
    has_fp8,
    open_component,
    read_entries,
    read_header,
    read_json,
)
from .hub import Repository
from .listing import NUMBERED, visible, weight_variants
from .names import foreign_kind, places

PIPELINE_CLASS = "ZImagePipeline"
# The pipelines that use the same networks. A ControlNet next to them is not read.
PIPELINE_CLASSES = (
    PIPELINE_CLASS,
    *(f"ZImage{use}Pipeline" for use in ("Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint")),
)
# What the config.json of a network's own folder declares, as _class_name or model_type.
KINDS = {"ZImageTransformer2DModel": "transformer", "AutoencoderKL": "vae", "qwen3": "text_encoder"}
COMFYUI_ROOTS = ("", "models", "split_files")
COMFYUI_FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
}


def open_networks(
    path: Path,
    repository: Repository | None = None,
    variant: str | None = None,
    names: Iterable[str] = NETWORKS,
    configs: Mapping[str, dict] | None = None,
) -> dict[str, Component]:
    """The networks at a path, of those named. Reads configs and headers, and checks them.

    repository is what the path is in, if it is a snapshot; headers of files that are not downloaded are read there.
    variant selects files, such as "fp16". configs are for networks that have none, by default the official ones.
    """
    configs = official.CONFIGS if configs is None else configs
    if not _is_folder(path, repository):
        found = translated(read_single(path, repository), configs, path)
        return {name: found[name] for name in names if name in found}
    here = names_in(path, repository)
    if "model_index.json" in here:
        check_pipeline(path)
        check_variant(path, variant, repository)
        there = [name for name in names if name not in OPTIONAL or _is_folder(path / name, repository)]
        return {name: open_component(path, name, variant, repository) for name in there}
    if "config.json" in here and any(name.endswith(".safetensors") for name in here):
        return _own_folder(path, repository, variant)
    if tree := _comfyui_tree(path, repository):
        return {name: _choose(name, tree[name], repository, configs) for name in names if tree[name]}
    own = [name for name in NETWORKS if _has_weights(path / name, repository)]
    if own and not any("config.json" in names_in(path / name, repository) for name in own):
        return {name: _without_config(path / name, name, repository, configs) for name in names if name in own}
    check_pipeline(path)  # says what it is instead
    return {}


def files_to_convert(path: Path, repository: Repository, names: Iterable[str], variant: str | None) -> set[Path]:
    """The files of a repository that the converter reads, which are checked as far as headers allow."""
    if not _is_folder(path, repository):
        return set(_series(path, names_in(path.parent, repository)))
    if "model_index.json" not in names_in(path, repository):
        return {
            entry.file
            for part in open_networks(path, repository, variant, names).values()
            for entry in part.entries.values()
        }
    check_pipeline(path)
    check_variant(path, variant, repository)
    found: set[Path] = set()
    for name in names:
        own = find_network(path, name)
        config, entries = read_json(own / "config.json"), read_entries(own, variant, repository)
        if not has_fp8(entries):
            Component(name, own, config, entries)
        found |= {entry.file for entry in entries.values()}
    return found


def own_configs(path: Path) -> dict[str, dict]:
    """The configs of the networks in a model's folder, for bare files that take their place."""
    files = {name: path / name / "config.json" for name in NETWORKS}
    return {**official.CONFIGS, **{name: read_json(file) for name, file in files.items() if file.is_file()}}


def names_in(folder: Path, repository: Repository | None = None) -> list[str]:
    """The files in a folder, whether they are downloaded yet or not."""
    return repository.names(folder) if repository else [path.name for path in visible(folder) if path.is_file()]


def read_single(file: Path, repository: Repository | None = None) -> dict[str, Entry]:
    """The tensors of a safetensors file; CheckpointError, with what to do instead, for any other file."""
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file} is not a safetensors file; if it is GGUF, convert it first: mlx-zimage convert {file.name} DEST"
        )
    return entries_in(file, repository)


def translated(entries: Mapping[str, Entry], configs: Mapping[str, dict], label: Path) -> dict[str, Component]:
    """The checked networks that tensors make up, under any program's names; label is their file or folder."""
    if kind := foreign_kind(entries):
        raise CheckpointError(f"{label} is a {kind}, not a model; expected the weights of Z-Image")
    found: dict[str, dict[str, Entry]] = {}
    unknown = []
    for name, entry in entries.items():
        held = places(name, entries)
        if held is None:
            unknown.append(name)
        for place in held or ():
            own = found.setdefault(place.component, {})
            if place.name in own:
                raise CheckpointError(f"{label}: {place.component} {place.name} is stored twice, once as {name}")
            own[place.name] = entry.piece(place.part, place.parts) if place.parts > 1 else entry
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise CheckpointError(
            f"{label}: not part of Z-Image: {', '.join(unknown[:SHOWN])}{more}; is this another model?"
        )
    if not found:
        raise CheckpointError(f"{label} contains no weights; give a file with the weights of Z-Image")
    return {
        name: Component(name, label, configs[name], _laid_out(found[name], configs[name], name))
        for name in NETWORKS
        if name in found
    }


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


def _own_folder(path: Path, repository: Repository | None, variant: str | None) -> dict[str, Component]:
    """The network in a folder of its own, as transformers or diffusers saves it."""
    config = read_json(path / "config.json")
    kind = config.get("_class_name") or config.get("model_type")
    if kind not in KINDS:
        raise CheckpointError(f"{path / 'config.json'} declares {kind or 'no model'}; expected {', '.join(KINDS)}")
    return {KINDS[kind]: Component(KINDS[kind], path, config, read_entries(path, variant, repository))}


def _without_config(folder: Path, name: str, repository: Repository | None, configs: Mapping[str, dict]) -> Component:
    """A network in a model's folder without configs, as mflux saves it."""
    found = translated(read_entries(folder, None, repository), configs, folder)
    if name not in found:
        raise CheckpointError(f"{folder} contains no {name}, only {' and '.join(found)}; is this another model?")
    return found[name]


def _comfyui_tree(path: Path, repository: Repository | None) -> dict[str, list[Path]]:
    """The files in ComfyUI's models folder by the network that they are for; empty if it is no such folder."""
    for root in (path / root for root in COMFYUI_ROOTS):
        if any(_has_weights(root / folder, repository) for folder in COMFYUI_FOLDERS["transformer"]):
            return {
                name: [
                    root / folder / file
                    for folder in folders
                    for file in (names_in(root / folder, repository) if _is_folder(root / folder, repository) else ())
                    if file.endswith(".safetensors")
                ]
                for name, folders in COMFYUI_FOLDERS.items()
            }
    return {}


def _choose(name: str, files: list[Path], repository: Repository | None, configs: Mapping[str, dict]) -> Component:
    """The one file among ComfyUI's that is this network, in a dtype that it can be computed from."""
    found, faults = [], []
    for file in files:
        try:
            found.append(translated(read_single(file, repository), configs, file)[name])
        except (CheckpointError, KeyError) as error:
            faults.append(str(error))
    if not found:
        raise CheckpointError(f"none of {files[0].parent}'s files can be used as the {name}: {'; '.join(faults)}")
    if len(found) > 1:
        listed = ", ".join(str(component.folder) for component in found)
        raise RequestError(f"several files can be used as the {name}: {listed}; choose one of them with its option")
    return found[0]


def _series(path: Path, names: Iterable[str]) -> list[Path]:
    """A file, with the other parts of a split one."""
    own = NUMBERED.fullmatch(path.name)
    if own is None:
        return [path]
    found = [(name, NUMBERED.fullmatch(name)) for name in names]
    return [path.with_name(name) for name, row in found if row and row.groups() == own.groups()]


def _has_weights(folder: Path, repository: Repository | None) -> bool:
    return _is_folder(folder, repository) and any(
        name.endswith(".safetensors") for name in names_in(folder, repository)
    )


def _is_folder(path: Path, repository: Repository | None) -> bool:
    return path.is_dir() or bool(repository and any(path in file.parents for file in repository.sizes))


# ---- checks on a model folder, shared with the converter


def check_pipeline(folder: Path) -> None:
    """Refuse a folder that does not contain a Z-Image pipeline, and say what it is instead."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder} has no model_index.json{_what(folder)}; expected a diffusers folder")
    kind = read_json(index).get("_class_name")
    if kind not in PIPELINE_CLASSES:
        raise CheckpointError(f"{index} declares {kind or 'no pipeline'}; expected {PIPELINE_CLASS}")


def _what(folder: Path) -> str:
    """What a folder without model_index.json contains, if it is recognized."""
    if (folder / "adapter_config.json").is_file():
        return ": it is a LoRA"
    try:
        names = {name for file in visible(folder, "*.safetensors") for name in read_header(file)}
    except CheckpointError:
        return ""
    kind = foreign_kind(names) if names else None
    return f": it is a {kind}" if kind else ""


def check_variant(
    folder: Path, variant: str | None, repository: Repository | None = None, others: Iterable[str] = ()
) -> None:
    """Refuse a file variant that no network has, instead of using the default files for all of them.

    others are what else a variant could have named.
    """
    if variant is None:
        return
    folders = [folder / name for name in NETWORKS]
    names = [repository.names(own) if repository else [path.name for path in visible(own)] for own in folders]
    held = {found for own in names for found in weight_variants(own)}
    if variant not in held:
        raise RequestError(
            f"variant must be {', '.join([*others, ''])}a file variant of {folder}, which has "
            f"{', '.join(sorted(held - {''})) or 'none'}; got {variant!r}"
        )
