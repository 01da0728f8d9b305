"""The models on this machine: converted folders, the Hugging Face cache, and how the first model is set up.

Models that the program converts for itself are in one folder, MLX_ZIMAGE_HOME or ~/.cache/mlx-zimage; downloads stay in
the Hugging Face cache. Cached prompt embeddings are listed and removed like a model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from .. import atomic
from ..dtypes import ITEM_BYTES
from ..errors import CheckpointError, ModelNotFoundError, OutputError, RequestError, warn
from ..machine import RATES, home, mac_budget
from ..models import ALL_NETWORKS, NETWORKS
from ..quantization import Quantization
from ..scheduler import SchedulerConfig
from ..untrusted import parse_json, read_bytes
from ..variants import ALIASES, TURBO
from . import official
from . import store as embeddings
from .checkpoint import BorrowedFromHub, Checkpoint, Location, open_headers, resolve
from .component import Component, Entry, read_json
from .hub import POCKET, cached, is_snapshot, locate, snapshot
from .manifest import CONVERSION, MANIFEST, read_manifest, sha256
from .parts import PIPELINE_CLASSES, open_component, open_networks
from .quantize import tensor_quantization

CHOICES = (None, 8, 6, 4)  # bits, best first; None is bfloat16
EMBEDDINGS = "embeddings"
OFF = ("off", "no", "false", "0")
REGISTER = "folders.json"  # in home(): the folders that `convert` wrote elsewhere
DOWNLOAD = official.BF16_BYTES + 8_213_000_000  # bytes of a first download, used until the hub reports its size
WEIGHTS_SHARE = 0.9  # share of a machine's memory budget for weights; the rest is working memory


@dataclass(frozen=True)
class LocalModel:
    """A model on this disk; kind is "package", "converted" or "hub", and name is a value for --model.

    Cached prompt embeddings are listed too, with kind "prompts". A download that cannot be used, because it was
    interrupted or files were deleted, is not complete. parts are the networks in a repository of which only these
    were downloaded, to be used with others.
    """

    name: str
    kind: str
    path: Path
    nbytes: int
    complete: bool = True
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class FirstRun:
    """What downloading and converting a model will take. bits None is bfloat16.

    transformer is where it comes from, if not from the repository; remark says why a smaller copy cannot be used.
    """

    repository: str
    download_bytes: int
    bits: int | None
    converted_bytes: int
    cache: Path
    dest: Path
    transformer: str | None = None
    remark: str = ""


@dataclass(frozen=True)
class Disk:
    """What a first run needs on one disk, in bytes: free before, for the download, and for the converted model."""

    free: int
    download: int = 0
    converted: int = 0

    @property
    def left(self) -> int:
        return self.free - self.download - self.converted


def embeddings_folder() -> Path | None:
    """The cache of prompt embeddings: MLX_ZIMAGE_EMBEDDINGS, or a folder in home(); None if the variable says OFF."""
    given = os.environ.get("MLX_ZIMAGE_EMBEDDINGS", "").strip()
    if given.lower() in OFF:
        return None
    try:
        return Path(given).expanduser() if given else home() / EMBEDDINGS
    except (RuntimeError, ModelNotFoundError):  # the user has no home folder
        return None


def models() -> Iterator[LocalModel]:
    """The models on this machine: pocket, converted models, and those in the hub's cache.

    Converted models are those of first runs, and the folders in the register. Cached prompt embeddings come last, if
    there are any.
    """
    yield LocalModel("pocket", "package", POCKET, _nbytes(POCKET))
    for path in _converted():
        yield LocalModel(str(path), "converted", path, _nbytes(path))
    for repository, folder in cached().items():
        used = snapshot(folder)
        if _is_ours(repository, folder, used):
            is_complete = used is not None and any(map(_opens, (used, *used.iterdir())))
            parts = () if used is None or is_complete else _parts(folder, used)
            yield LocalModel(repository, "hub", used or folder, _nbytes(folder), is_complete, parts)
    prompts = embeddings_folder()
    if prompts and (kept := sum(file.stat().st_size for file in embeddings.files(prompts))):
        yield LocalModel(EMBEDDINGS, "prompts", prompts, kept)


def converted(repository: str) -> Path | None:
    """The newest folder that a first run converted from repository, if any."""
    stem = repository.rpartition("/")[2]
    found = [path for path in _converted() if path.name.rpartition("-")[0] == stem]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def remove(name: str) -> int:
    """Remove a converted model, a repository in the hub's cache, or the cached prompt embeddings from disk.

    Returns the number of bytes freed.
    """
    for model in models():
        if name == model.name and model.kind == "prompts":
            embeddings.remove(model.path)
            return model.nbytes
        if name == model.name and model.kind == "hub":
            folder = cached()[name]
            shutil.rmtree(folder)
            shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)
            return model.nbytes
    here = Path(name).expanduser().resolve()
    ours = {model.path: model for model in models() if model.kind == "converted"}
    if (here / CONVERSION).is_file():
        ours.setdefault(here, LocalModel(str(here), "converted", here, _nbytes(here)))
    found = [ours[here]] if here in ours else [model for model in ours.values() if model.path.name == name]
    if len(found) > 1:
        raise RequestError(f"{name!r} matches {' and '.join(model.name for model in found)}; give the full path")
    if found:
        _remove_converted(found[0].path)
        return found[0].nbytes - _nbytes(found[0].path)
    if name == "pocket":
        raise ModelNotFoundError("pocket is part of the package; uninstall mlx-zimage to remove it")
    raise ModelNotFoundError(f"no model {name!r} to remove; `mlx-zimage models` lists the models on this machine")


def own() -> tuple[list[LocalModel], list[LocalModel]]:
    """The models that this program put in place, and the folders that the user had `convert` write elsewhere."""
    found = [model for model in models() if model.kind != "package"]
    elsewhere = [model for model in found if model.kind == "converted" and model.path.parent != home().resolve()]
    return [model for model in found if model not in elsewhere], elsewhere


def remove_all() -> int:
    """Remove everything that this program keeps on this machine, except folders elsewhere; returns the bytes freed."""
    freed = sum(remove(model.name) for model in own()[0])
    for name in (REGISTER, RATES):
        (home() / name).unlink(missing_ok=True)
    if home().is_dir() and not any(home().iterdir()):
        home().rmdir()
    return freed


def plan_first_run(repository: str, budget: int) -> FirstRun:
    """Plan the download and conversion of a repository, with the bits that fit a memory budget in bytes.

    Downloads configs and headers; raises ModelNotFoundError if the hub cannot be reached.
    """
    transformer, remark = smaller_transformer(repository)
    checkpoint = open_headers(repository, parts={"transformer": transformer})
    configs = {component.name: component.raw_config for component in checkpoint.components}
    sizes = {bits: planned(bits, configs).nbytes for bits in CHOICES}
    bits = choose_bits(sizes, budget)
    from huggingface_hub.constants import HF_HUB_CACHE

    stem = repository.rpartition("/")[2]
    return FirstRun(
        repository,
        checkpoint.to_download,
        bits,
        sizes[bits],
        Path(HF_HUB_CACHE),
        home() / (f"{stem}-bf16" if bits is None else f"{stem}-{bits}bit"),
        transformer,
        remark,
    )


def smaller_transformer(repository: str) -> tuple[str | None, str]:
    """A smaller published copy of a repository's transformer; or None, and why the known copy cannot be used."""
    if repository != official.REPOSITORY:
        return None, ""
    source = official.BF16_TRANSFORMER
    locate(repository)  # raises without a network, which is no reason to download the larger one
    try:
        path, at_hub = locate(source)
    except ModelNotFoundError as error:
        return None, str(error)
    if path.exists() or at_hub is None:
        return source, ""
    if (at_hub.sizes[path], at_hub.sha256(path)) != (official.BF16_BYTES, official.BF16_SHA256):
        return None, f"{source} is not the file that was published"
    return source, ""


def fetch_transformer(source: str) -> str:
    """Download what smaller_transformer found, and delete it again if its checksum is not the published one.

    Returns why it cannot be used, or "" if it can.
    """
    file = resolve(source, ["transformer"])
    if sha256(file) == official.BF16_SHA256:
        return ""
    file.resolve().unlink()  # the cache links to it
    file.unlink(missing_ok=True)
    return f"{source} is not the file that was published"


def smaller_download(source: Location, *, check: bool = True) -> tuple[Location, str | None]:
    """The repository that an alias stands for, and a smaller published copy of its transformer, downloaded and checked.

    Warns if there should be such a copy, but it cannot be used. Anything but an alias is returned as it is. Without
    `check`, a copy that is already on this disk is not read.
    """
    if not _is_alias(source):
        return source, None
    repository = ALIASES[str(source)]
    smaller, fault = smaller_transformer(repository)
    if smaller and (check or not locate(smaller)[0].exists()):
        fault = fetch_transformer(smaller)
    if fault:
        warn(f"{fault}; downloading the transformer of {repository} instead", BorrowedFromHub)
    return repository, None if fault else smaller


def smaller_parts(
    source: Location, transformer: Location | None, *, check: bool = True
) -> tuple[Location, Location | None]:
    """A model and the place of its transformer, if that is elsewhere, each with what `smaller_download` gives it."""
    if transformer is None:
        return smaller_download(source, check=check)
    repository, smaller = smaller_download(transformer, check=check)
    return source, smaller or repository


def open_to_plan(source: Location, variant: str | None = None) -> Checkpoint:
    """open_headers, where an alias has the transformer that `smaller_download` would give it."""
    if not _is_alias(source):
        return open_headers(source, variant)
    repository = ALIASES[str(source)]
    return open_headers(repository, variant, {"transformer": smaller_transformer(repository)[0]})


def already_converted(source: Location) -> Location:
    """The folder that a first run converted from what an alias stands for, if any; otherwise the source."""
    return (converted(ALIASES[str(source)]) if _is_alias(source) else None) or source


def _is_alias(source: Location) -> bool:
    return str(source) in ALIASES and not os.path.exists(source)


def choose_bits(sizes: dict[int | None, int], budget: int) -> int | None:
    """The most bits whose weights all stay in memory; otherwise the fewest, with blocks streamed from disk."""
    return next((bits for bits in CHOICES if sizes[bits] <= WEIGHTS_SHARE * budget), CHOICES[-1])


def bits_for(gigabytes: int) -> int | None:
    """The bits of a model that is converted for a Mac with this much memory, as in README's table."""
    return choose_bits({bits: planned(bits).nbytes for bits in CHOICES}, mac_budget(gigabytes * 2**30))


def planned(bits: int | None, configs: Mapping[str, dict] = official.CONFIGS) -> Checkpoint:
    """A model as `convert` would write it, derived from its configs, for planning only. bits None is bfloat16.

    By default Z-Image-Turbo, which needs neither files nor a network.
    """
    q = Quantization(bits) if bits else None
    networks = {name: planned_network(name, config, q) for name, config in configs.items()}
    return Checkpoint(Path(official.REPOSITORY), networks, SchedulerConfig(), TURBO, Path())


def planned_network(
    network: str, config: dict, quantization: Quantization | None, kind: type[Component] = Component
) -> Component:
    """One network as `convert` would write it."""
    entries = {}
    for name, shape in ALL_NETWORKS[network].from_dict(config).shapes().items():
        q = tensor_quantization(network, name, shape, quantization)
        for part, stored in q.packed(name, shape).items() if q else [(name, shape)]:
            dtype = "U32" if q and part == name else "BF16"
            entries[part] = Entry(Path(), part, 0, ITEM_BYTES[dtype] * prod(stored), stored, dtype)
    block = {"quantization": quantization.to_dict()} if quantization else {}
    return kind(network, Path(network), config | block, entries)


def disks(plan: FirstRun) -> list[Disk]:
    """The disks a first run writes to: one, or one for the download and one for the converted model."""
    found: dict[int, Disk] = {}
    for place, field, nbytes in (
        (plan.cache, "download", plan.download_bytes),
        (plan.dest, "converted", plan.converted_bytes),
    ):
        place = next(path for path in (place, *place.absolute().parents) if path.exists())
        device = place.stat().st_dev
        disk = found.get(device) or Disk(shutil.disk_usage(place).free)
        found[device] = replace(disk, **{field: nbytes})
    return list(found.values())


def check_space(disks: list[Disk]) -> None:
    """Refuse, before anything is downloaded, a first run that does not fit on the disks."""
    for disk in disks:
        if disk.left < 0:
            raise OutputError(
                f"{(disk.free - disk.left) / 1e9:.1f} GB of disk space is needed, but only {disk.free / 1e9:.1f} GB "
                f"is free; free some space, or point HF_HOME (the download) or MLX_ZIMAGE_HOME (the converted model) "
                f"to another disk"
            )


def register(folder: Path) -> None:
    """Have `models` list a folder written by the converter; does nothing for others.

    One that was moved or copied is listed again once it is registered where it is now.
    """
    folder = folder.expanduser().resolve()
    known = _registered()
    is_own = folder.parent == home().resolve() or any(map(is_snapshot, (folder, *folder.parents)))
    is_model = (folder / CONVERSION).is_file() and (folder / "model_index.json").is_file()
    if is_own or not is_model or str(folder) in known:
        return
    with suppress(OSError):  # at worst, the folder is missing from the list
        home().mkdir(parents=True, exist_ok=True)
        content = json.dumps(sorted({*known, str(folder)}), indent=4)
        atomic.write(home() / REGISTER, lambda file: file.write_text(content, encoding="utf-8"), lasting=False)


def _registered() -> list[str]:
    try:
        known = parse_json(read_bytes(home() / REGISTER))
    except (OSError, ValueError):
        return []
    return [path for path in known if isinstance(path, str)] if isinstance(known, list) else []


def _converted() -> list[Path]:
    """The converted models: those of first runs, and registered folders that are still where they were."""
    own = (path.parent for path in home().glob("*/model_index.json"))
    others = (Path(path) for path in _registered())
    return sorted(
        {path.resolve() for path in own if not path.name.startswith(".")}
        | {path for path in others if (path / CONVERSION).is_file()}
    )


def _remove_converted(folder: Path) -> None:
    """Delete what the converter wrote; anything else in a folder outside home() stays."""
    if folder.parent == home().resolve():
        shutil.rmtree(folder)
        return
    try:
        written = [*read_manifest(folder), MANIFEST]
    except CheckpointError as error:
        raise OutputError(
            f"{folder / MANIFEST} does not list what was converted, so this folder is not removed; delete it yourself"
        ) from error
    for name in written:
        if (folder / name).resolve().is_relative_to(folder):
            (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_ours(repository: str, folder: Path, used: Path | None) -> bool:
    """Whether a cached repository is a model of this family that has weights, or is partly downloaded."""
    if not any(folder.glob("snapshots/**/*.safetensors")) and not any(folder.glob("blobs/*.incomplete")):
        return False
    for index in folder.glob("snapshots/**/model_index.json"):
        with suppress(CheckpointError):
            return read_json(index).get("_class_name") in PIPELINE_CLASSES
    return repository == official.BF16_TRANSFORMER.partition("@")[0] or (used is not None and _opens(used))


def _opens(folder: Path) -> bool:
    try:
        return "transformer" in open_networks(folder)
    except (CheckpointError, RequestError):
        return False


def _parts(folder: Path, used: Path) -> tuple[str, ...]:
    """The networks in a snapshot of a cached repository; none if something is missing that was to be downloaded."""
    links = (path for path in used.rglob("*") if path.is_symlink())
    if any(folder.glob("blobs/*.incomplete")) or not all(link.exists() for link in links):
        return ()
    own = [file.parent for file in used.rglob("*.safetensors") if file.parent.name in NETWORKS]
    try:
        for network in {*own}:
            open_component(network.parent, network.name)
    except (CheckpointError, RequestError):
        return ()
    return tuple(name for name in NETWORKS if any(path.name == name for path in own))


def _nbytes(folder: Path) -> int:
    """The bytes of the files in a folder, each once: the hub's cache links to them."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
