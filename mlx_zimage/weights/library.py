"""The models on this machine: converted folders, the Hugging Face cache, and how the first model is set up.

Models that the program converts for itself are in one folder, MLX_ZIMAGE_HOME or ~/.cache/mlx-zimage; downloads stay in
the Hugging Face cache. Cached prompt embeddings are listed and removed like a model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from ..dtypes import ITEM_BYTES
from ..errors import ModelNotFoundError, OutputError
from ..machine import home
from ..models import NETWORKS
from ..quantization import Quantization
from . import store as embeddings
from .checkpoint import read_json
from .hub import NEEDED_FILES, POCKET, resolve
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

    Asks the hub for sizes and downloads the configs; raises ModelNotFoundError if the hub cannot be reached.
    """
    configs = resolve(repository, [f"{name}/config.json" for name in NETWORKS])
    sizes = {bits: converted_bytes(configs, bits) for bits in CHOICES}
    bits = choose_bits(sizes, budget)
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    files = snapshot_download(repository, allow_patterns=NEEDED_FILES, dry_run=True)
    stem = repository.rpartition("/")[2]
    return FirstRun(
        repository,
        sum(file.file_size or 0 for file in files if file.will_download),
        bits,
        sizes[bits],
        Path(HF_HUB_CACHE),
        home() / (f"{stem}-bf16" if bits is None else f"{stem}-{bits}bit"),
    )


def choose_bits(sizes: dict[int | None, int], budget: int) -> int | None:
    """The most bits whose weights all stay in memory; otherwise the fewest, with blocks streamed from disk."""
    return next((bits for bits in CHOICES if sizes[bits] <= WEIGHTS_SHARE * budget), CHOICES[-1])


def converted_bytes(folder: Path, bits: int | None) -> int:
    """The size of a converted model's weights in bytes, from its configs; bits None is bfloat16."""
    configs = {name: config.from_dict(read_json(folder / name / "config.json")) for name, config in NETWORKS.items()}
    return weights_bytes(configs, bits)


def weights_bytes(configs: dict, bits: int | None) -> int:
    quantization = Quantization(bits) if bits else None
    return sum(
        _tensor_bytes(component, name, shape, quantization)
        for component, config in configs.items()
        for name, shape in config.shapes().items()
    )


def _tensor_bytes(component: str, name: str, shape: tuple[int, ...], quantization: Quantization | None) -> int:
    q = tensor_quantization(component, name, shape, quantization)
    if q is None:
        return ITEM_BYTES["BF16"] * prod(shape)
    parts = q.packed(name, shape).items()
    return sum(ITEM_BYTES["U32" if part == name else "BF16"] * prod(packed) for part, packed in parts)


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
