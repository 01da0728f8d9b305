"""What the converter reads: a checkpoint in any format, as three networks and the small files of a model folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ModelNotFoundError, RequestError, warn
from ..models import CONTROLNET, NETWORKS
from ..request import LoraUse
from ..scheduler import SchedulerConfig
from ..tokenizer import MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES, Tokenizer
from ..untrusted import parse_json
from ..weights import official
from ..weights.checkpoint import (
    BorrowedFromHub,
    check_tokenizer,
    check_widths,
    read_conversion,
    resolve,
    weight_files,
)
from ..weights.component import Component, find_network, needs_converting, read_entries, read_json, read_metadata
from ..weights.controlnets import open_controlnet
from ..weights.hub import check_inside, locate, name_of
from ..weights.parts import (
    PIPELINE_CLASS,
    check_pipeline,
    check_variant,
    chosen,
    comfyui_tree,
    config_files,
    declared_network,
    is_own_folder,
    open_network,
    open_networks,
    own_configs,
    read_single,
    translated,
)
from .disk import render_json
from .files import assemble, open_file, refuse_pickles, stored_weights
from .rows import SourceComponent, Tensor, packed_rows, stored_rows
from .small import (
    SCHEDULER,
    TOKENIZER,
    TOKENIZER_PARTS,
    cleaned,
    read_small,
    small_files,
    tokenizer_files,
)


@dataclass(frozen=True)
class Source:
    """An opened source, or part of one.

    origin is its name, without local folders; at is its file or folder; components are by name; weights are the files
    that contain the tensors; files are contents to copy, by path in the folder to write; conversion describes how our
    converter wrote it, and is empty otherwise; parts are the origins of networks that are not the source's own. loras
    are those fused into the weights.
    """

    origin: str
    at: Path
    components: dict[str, SourceComponent]
    weights: list[Path]
    files: dict[str, bytes]
    conversion: dict = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    loras: tuple[LoraUse, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(component.nbytes for component in self.components.values())


def open_source(
    source: str | Path,
    *,
    transformer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
    variant: str | None = None,
) -> Source:
    """Open a complete model: the source, and its missing parts from elsewhere. Reads only configs and headers.

    Each of source, transformer, text_encoder and vae is a model folder (diffusers', mflux's, ComfyUI's or our own), a
    network's own folder, a safetensors or GGUF file, "pocket", or a Hugging Face id (ID:PATH for a part of its
    repository); tokenizer is a model folder, an id, or the folder or file of a tokenizer. base is a diffusers folder or
    id that provides anything still missing, including configs for single files; by default that is the official model,
    whose configs are built in. variant selects among the source's files.

    Raises for everything that `open_checkpoint` would refuse in the converted model.
    """
    configs = official.CONFIGS if base is None else read_configs(base)
    replaced = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    others = {name: other for name, other in replaced.items() if other is not None}
    opened = open_part(source, configs, variant, [name for name in NETWORKS if name not in others])
    _check_schedule(opened)
    for name, other in others.items():
        opened = take(opened, open_part(other, configs if base else own_configs(opened.at), names=[name]), name)
    if "transformer" not in opened.components:
        found = " and ".join(opened.components)
        raise RequestError(f"{source} contains no transformer, only {found}; give the transformer as the source")
    if tokenizer is not None:
        opened = replace(opened, files=opened.files | read_tokenizer(tokenizer))
    missing = [name for name in NETWORKS if name not in opened.components]
    if missing or TOKENIZER not in opened.files:
        opened = borrow(opened, missing, base)
    small: dict[str, dict] = {
        "model_index.json": official.MODEL_INDEX,
        SCHEDULER: official.SCHEDULER,
    }
    files = {name: render_json(content) for name, content in small.items()} | opened.files
    files["model_index.json"] = _model_index(files["model_index.json"])
    architectures: dict[str, Any] = {
        name: NETWORKS[name].from_dict(opened.components[name].config) for name in NETWORKS
    }
    check_widths(architectures, opened.origin)
    tokenizer_file = Path(tokenizer if tokenizer is not None else opened.origin) / TOKENIZER
    opened_tokenizer = Tokenizer(tokenizer_file, files[TOKENIZER])
    check_tokenizer(opened_tokenizer, architectures["text_encoder"].vocab_size, tokenizer_file)
    try:
        schedule = parse_json(files[SCHEDULER])
        if not isinstance(schedule, dict):
            raise ValueError(f"expected a JSON object but got {type(schedule).__name__}")
        SchedulerConfig.from_dict(schedule)
    except (ValueError, CheckpointError) as error:
        raise CheckpointError(f"{Path(opened.origin) / SCHEDULER}: {error}") from error
    return replace(opened, components={name: opened.components[name] for name in NETWORKS}, files=files)


def open_controlnet_source(source: str | Path) -> Source:
    """Open a ControlNet, downloading it if needed."""
    opened = open_controlnet(source)
    component, path = opened.component, opened.component.folder
    origin = opened.name if Path(source).expanduser().exists() else str(source)
    own = path.parent if path.name == CONTROLNET else path
    conversion = read_conversion(own) if own.is_dir() else {}
    files = weight_files([component])
    return Source(origin, own, {CONTROLNET: _component(component)}, files, {}, conversion)


def _check_schedule(source: Source) -> None:
    """Refuse a diffusers folder without a schedule, as the loader does: the official one need not be the model's."""
    if "model_index.json" in source.files and SCHEDULER not in source.files:
        raise CheckpointError(f"{source.at / SCHEDULER} is missing; download the model again")


def _model_index(content: bytes) -> bytes:
    """The model_index.json to write: the source's, declared as the text-to-image pipeline."""
    index = parse_json(content)
    if index["_class_name"] == PIPELINE_CLASS:
        return content
    own = {key: value for key, value in index.items() if key.startswith("_") or key in official.MODEL_INDEX}
    return render_json(own | {"_class_name": PIPELINE_CLASS})


def open_part(
    source: str | Path,
    configs: dict[str, dict],
    variant: str | None = None,
    names: Sequence[str] = tuple(NETWORKS),
) -> Source:
    """The networks and small files that a source contains; of a repository, the named networks are downloaded."""
    at = resolve(source, names, variant)
    origin = name_of(at) if Path(source).expanduser().exists() else str(source)
    if at.is_file():
        components, weights = open_file(at, configs)
        return Source(origin, at, components, weights, {}, read_conversion(at))
    check_inside(at, config_files(at))
    try:
        opened = _open_model(at, origin, configs, variant, names)
        check_inside(at, opened.weights)
        return opened
    except CheckpointError:
        refuse_pickles(at)
        raise


def _open_model(
    folder: Path, origin: str, configs: dict[str, dict], variant: str | None, names: Sequence[str]
) -> Source:
    if not (folder / "model_index.json").is_file():
        components, weights = _open_bare(folder, configs, variant, names)
        own = ("tokenizer/", "scheduler/")
        files = {name: content for name, content in small_files(folder).items() if name.startswith(own)}
        return Source(origin, folder, components, weights, files)
    check_pipeline(folder)
    check_variant(folder, variant)
    return open_folder(folder, origin, names, variant)


def _open_bare(
    folder: Path, configs: dict[str, dict], variant: str | None, names: Sequence[str]
) -> tuple[dict[str, SourceComponent], list[Path]]:
    """The networks of a folder without a model_index.json, and the files that contain their weights."""
    if is_own_folder(folder):
        name, config = declared_network(folder)
        component, own = _open_network(folder, name, config, variant)
        return {name: component}, sorted(own)
    if tree := comfyui_tree(folder):

        def unconverted(file: Path) -> dict[str, tuple[SourceComponent, Path]]:
            found = translated(read_single(file), configs, file)
            return {name: (_component(component), file) for name, component in found.items()}

        def quantized(file: Path) -> dict[str, tuple[SourceComponent, Path]]:
            return {name: (component, file) for name, component in open_file(file, configs)[0].items()}

        held = {name: chosen(name, files, unconverted, quantized) for name in names if (files := tree[name])}
        return {name: component for name, (component, _) in held.items()}, sorted({file for _, file in held.values()})
    found = open_networks(folder, None, variant, names, configs)
    return {name: _component(component) for name, component in found.items()}, weight_files(found.values())


def open_folder(folder: Path, origin: str, names: Iterable[str], variant: str | None = None) -> Source:
    """The named networks of a folder from diffusers or this package, checked as in the loader; fp8 is read, too."""
    components, weights = {}, set()
    for name in names:
        own = find_network(folder, name)
        components[name], files = _open_network(own, name, read_json(own / "config.json"), variant)
        weights |= files
    return Source(origin, folder, components, sorted(weights), small_files(folder), read_conversion(folder))


def _open_network(folder: Path, name: str, config: dict, variant: str | None) -> tuple[SourceComponent, set[Path]]:
    """A network in a folder of its own, and the files that contain its weights."""
    entries = read_entries(folder, variant)
    files = {entry.file for entry in entries.values()}
    if needs_converting(entries):
        metadata = [read_metadata(file) for file in sorted(files)]
        opened = assemble(stored_weights(entries, metadata, str(folder)), {name: config}, str(folder))[name]
    else:
        opened = _component(open_network(name, folder, config, entries))
    return opened, files


def read_configs(base: str | Path) -> dict[str, dict]:
    folder, _ = locate(base)
    check_inside(folder, config_files(folder))
    return {name: read_json(folder / name / "config.json") for name in NETWORKS}


def read_tokenizer(source: str | Path) -> dict[str, bytes]:
    at, repository = locate(source)
    if repository:
        own = (at, at.parent, at / "tokenizer")
        repository.fetch(file for file in repository.sizes if file.parent in own and file.name in TOKENIZER_PARTS)
    if at.is_file():
        content = read_small(at, MAX_TOKENIZER_BYTES)
        if not _is_tokenizer(content):
            raise CheckpointError(f'{at} is not a tokenizer.json: expected JSON with a "model" key')
        return {TOKENIZER: cleaned(TOKENIZER, content, at)}
    if (at / "tokenizer.json").exists():
        return tokenizer_files(at)
    files = {name: content for name, content in small_files(at).items() if name.startswith("tokenizer/")}
    if TOKENIZER not in files:
        raise RequestError(f"{source} contains no tokenizer.json; give a folder or file that does")
    return files


def _is_tokenizer(content: bytes) -> bool:
    try:
        return "model" in parse_json(content, MAX_TOKENIZER_VALUES)
    except (ValueError, TypeError):
        return False


def take(source: Source, other: Source, name: str) -> Source:
    """The source with the named network taken from other."""
    if name not in other.components:
        raise RequestError(
            f"{other.at} contains no {name}, only {' and '.join(other.components)}; give a file or folder that does"
        )
    own = {path: c for path, c in other.files.items() if path.startswith(f"{name}/")}
    kept = {path: c for path, c in source.files.items() if not path.startswith(f"{name}/")}
    return replace(
        source,
        components=source.components | {name: other.components[name]},
        parts=source.parts | {name: other.origin},
        weights=sorted({*source.weights, *other.weights}),
        files=kept | own,
    )


def borrow(source: Source, missing: list[str], base: str | Path | None) -> Source:
    """The source with its missing networks and small files taken from base or the official repository."""
    parts = missing + ([] if TOKENIZER in source.files else ["tokenizer"])
    if base is None:
        base = official.REPOSITORY
        names = " or ".join(parts)
        warn(f"{source.origin} contains no {names}; using {base}", BorrowedFromHub)
    folder = resolve(base, missing)
    check_inside(folder, config_files(folder))
    other = open_folder(folder, str(base), missing)
    if SCHEDULER not in source.files:
        _check_schedule(other)
    check_inside(folder, other.weights)
    if TOKENIZER not in source.files and TOKENIZER not in other.files:
        raise ModelNotFoundError(f"neither {source.origin} nor {base} contains a tokenizer; pass one as tokenizer")
    own = tuple(f"{name}/" for name in (*missing, "tokenizer", "scheduler"))
    files = {path: c for path, c in other.files.items() if path.startswith(own) or path == "model_index.json"}
    return replace(
        source,
        components=source.components | other.components,
        weights=sorted({*source.weights, *other.weights}),
        files=files | source.files,
    )


def _component(component: Component) -> SourceComponent:
    entries = component.entries
    # In the order of the architecture, not of the source: equal weights give equal files.
    shapes = {name: shape for name, shape in component.known().items() if name in entries}
    tensors = []
    for name, shape in shapes.items():
        q = component.quantizations.get(name.removesuffix(".weight"))
        if q:
            packed = {key.rpartition(".")[2]: entries[key] for key in q.packed(name, shape)}
            nbytes = sum(entry.nbytes for entry in packed.values())
            tensors.append(Tensor(name, shape, nbytes, packed_rows(packed, q)))
        else:
            tensors.append(Tensor(name, shape, entries[name].nbytes, stored_rows(entries[name])))
    return SourceComponent(component.name, component.raw_config, tensors)
