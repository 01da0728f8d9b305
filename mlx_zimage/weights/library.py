"""The models on this machine: converted folders, the Hugging Face cache, and how the first model is set up.

Models that the program converts for itself are in one folder, MLX_ZIMAGE_HOME or ~/.cache/mlx-zimage; downloads stay in
the Hugging Face cache. Cached prompt embeddings are listed and removed like a model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from ..dtypes import ITEM_BYTES
from ..errors import ModelNotFoundError, OutputError
from ..machine import home
from ..models import NETWORKS
from ..quantization import Quantization
from ..scheduler import SchedulerConfig
from ..variants import TURBO
from . import official
from . import store as embeddings
from .checkpoint import Checkpoint, Component, Entry, open_headers, weight_files
from .hub import POCKET, TOKENIZER_FILES, Repository
from .quantize import tensor_quantization

CHOICES = (None, 8, 6, 4)  # bits, best first; None is bfloat16
EMBEDDINGS = "embeddings"
DOWNLOAD = 33 * 10**9  # bytes of the published model, used until the hub reports its size
WEIGHTS_SHARE = 0.9  # share of a machine's memory budget for weights; the rest is working memory


@dataclass(frozen=True)
class Model:
    """A model on this disk; kind is "package", "converted" or "hub", and name is a value for --model.

    Cached prompt embeddings are listed too, with kind "prompts".
    """

    name: str
    kind: str
    path: Path
    nbytes: int


@dataclass(frozen=True)
class FirstRun:
    """What downloading and converting a model will take. bits None is bfloat16."""

    repository: str
    download_bytes: int
    bits: int | None
    converted_bytes: int
    cache: Path
    dest: Path


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
    """The cache of prompt embeddings: MLX_ZIMAGE_EMBEDDINGS, or a folder in home(); None if the variable is "off"."""
    given = os.environ.get("MLX_ZIMAGE_EMBEDDINGS")
    if given == "off":
        return None
    try:
        return Path(given).expanduser() if given else home() / EMBEDDINGS
    except (RuntimeError, ModelNotFoundError):  # the user has no home folder
        return None


def models() -> Iterator[Model]:
    """Every model on this machine that --model accepts: pocket, converted models, diffusers folders in the hub's cache.

    Cached prompt embeddings come last, if there are any.
    """
    yield Model("pocket", "package", POCKET, _nbytes(POCKET))
    for path in _converted():
        yield Model(str(path), "converted", path, _nbytes(path))
    for repository in _cached():
        for revision in repository.revisions:
            if (revision.snapshot_path / "transformer").is_dir():
                yield Model(repository.repo_id, "hub", revision.snapshot_path, repository.size_on_disk)
                break
    folder = embeddings_folder()
    if folder and (kept := sum(file.stat().st_size for file in embeddings.files(folder))):
        yield Model(EMBEDDINGS, "prompts", folder, kept)


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
        if name in (model.name, model.path.name) and model.kind == "converted":
            shutil.rmtree(model.path)
            return model.nbytes
        if name == model.name and model.kind == "hub":
            from huggingface_hub import scan_cache_dir

            cache = scan_cache_dir()
            (repository,) = (repository for repository in cache.repos if repository.repo_id == name)
            plan = cache.delete_revisions(*(revision.commit_hash for revision in repository.revisions))
            plan.execute()
            return plan.expected_freed_size
    if name == "pocket":
        raise ModelNotFoundError("pocket is part of the package; uninstall mlx-zimage to remove it")
    raise ModelNotFoundError(f"no model {name!r} to remove; `mlx-zimage models` lists what is there")


def plan_first_run(repository: str, budget: int) -> FirstRun:
    """Plan the download and conversion of a repository, with the bits that fit a memory budget in bytes.

    Downloads configs and headers; raises ModelNotFoundError if the hub cannot be reached.
    """
    at_hub = Repository(repository)
    checkpoint = open_headers(at_hub.folder, at_hub)
    configs = {component.name: component.raw_config for component in checkpoint.components}
    sizes = {bits: planned(bits, configs).nbytes for bits in CHOICES}
    bits = choose_bits(sizes, budget)
    from huggingface_hub.constants import HF_HUB_CACHE

    files = [*weight_files(checkpoint.components), *at_hub.matching(TOKENIZER_FILES)]
    stem = repository.rpartition("/")[2]
    return FirstRun(
        repository,
        at_hub.to_fetch(files),
        bits,
        sizes[bits],
        Path(HF_HUB_CACHE),
        home() / (f"{stem}-bf16" if bits is None else f"{stem}-{bits}bit"),
    )


def choose_bits(sizes: dict[int | None, int], budget: int) -> int | None:
    """The most bits whose weights all stay in memory; otherwise the fewest, with blocks streamed from disk."""
    return next((bits for bits in CHOICES if sizes[bits] <= WEIGHTS_SHARE * budget), CHOICES[-1])


def planned(bits: int | None, configs: Mapping[str, dict] = official.CONFIGS) -> Checkpoint:
    """A model as `convert` would write it, known from its configs; for planning only. bits None is bfloat16.

    By default Z-Image-Turbo, which takes neither files nor a network.
    """
    q = Quantization(bits) if bits else None
    networks = {name: _planned(name, config, q) for name, config in configs.items()}
    return Checkpoint(Path(official.REPOSITORY), networks, SchedulerConfig(), TURBO)


def _planned(network: str, config: dict, quantization: Quantization | None) -> Component:
    entries = {}
    for name, shape in NETWORKS[network].from_dict(config).shapes().items():
        q = tensor_quantization(network, name, shape, quantization)
        for part, stored in q.packed(name, shape).items() if q else [(name, shape)]:
            dtype = "U32" if q and part == name else "BF16"
            entries[part] = Entry(Path(), part, 0, ITEM_BYTES[dtype] * prod(stored), stored, dtype)
    block = {"quantization": quantization.to_dict()} if quantization else {}
    return Component(network, Path(network), config | block, entries)


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
                f"{(disk.free - disk.left) / 1e9:.1f} GB of disk space are needed, but only {disk.free / 1e9:.1f} GB "
                f"are free; free some space, or point HF_HOME (the download) or MLX_ZIMAGE_HOME (the converted model) "
                f"to another disk"
            )


def _converted() -> list[Path]:
    folder = home()
    return sorted(path.parent for path in folder.glob("*/model_index.json") if not path.parent.name.startswith("."))


def _cached() -> list:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return sorted(scan_cache_dir().repos, key=lambda repository: repository.repo_id)
    except CacheNotFound:
        return []


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
