"""A cache on disk of what networks computed, above all prompt embeddings: a cached prompt needs no text encoder.

One safetensors file per array, named after everything its bits depend on: for embeddings the token ids, the encoder's
checksum and compute dtype, the versions of this package and MLX, and the device. The image is the same with and without
the cache. If anything goes wrong with these files, it costs time, never an image.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from .. import atomic
from ..errors import CheckpointError
from ..failures import explain
from ..machine import mlx_version
from ..version import __version__
from .component import Component
from .manifest import MANIFEST, read_manifest, sha256

LIMIT = 256 * 10**6  # bytes; a prompt of 100 tokens takes half a megabyte in bfloat16
# Nothing else is ever removed from the folder, which the user may have chosen.
OWN_FILES = re.compile(rf"([0-9a-f]{{64}}|{re.escape(atomic.ASIDE)}[0-9a-f]{{16}})\.(safetensors|sum)")
Loaded = tuple[dict[str, mx.array], dict[str, str]]  # arrays and metadata, by mx.load
FAULTS = (OSError, SafetensorError, RuntimeError, ValueError)


class Store:
    """The results of networks that compute in dtype on this machine, by key. folder None caches nothing."""

    def __init__(self, dtype: mx.Dtype, folder: Path | None):
        self.dtype = dtype
        self.folder = folder
        self.limit = LIMIT
        self._sums: dict[Component, str] = {}

    def get(
        self, networks: Sequence[Component], key: Sequence[object], shape: tuple[int, ...], dtype: mx.Dtype
    ) -> mx.array | None:
        """The array that the networks computed for a key, if it is cached and intact."""
        if self.folder is None:
            return None
        try:
            path = self._path(self.folder, networks, key)
            with safe_open(path, framework="numpy"):  # mx.load does not notice all damage
                pass
            stored, metadata = cast(Loaded, mx.load(str(path), return_metadata=True))
            found = stored["array"]
            if (found.shape, found.dtype) != (shape, dtype) or metadata["sha256"] != digest(found):
                return None
            os.utime(path)  # the least recently used are removed first
            return found
        except (*FAULTS, KeyError) as error:
            if explain(error):
                raise  # a failure of the GPU, not of the file
            return None

    def put(self, networks: Sequence[Component], key: Sequence[object], array: mx.array) -> None:
        """Cache what the networks computed for a key; beyond the limit, the least recently used files are removed."""
        if self.folder is None:
            return
        try:
            path = self._path(self.folder, networks, key)
            metadata = {"format": "mlx", "sha256": digest(array)}
            _write(path, lambda file: mx.save_safetensors(str(file), {"array": array}, metadata))
            self._forget(self.folder)
        except FAULTS as error:
            if explain(error):
                raise  # as above

    def _path(self, folder: Path, networks: Sequence[Component], key: Sequence[object]) -> Path:
        words = [*(self._sum(folder, network) for network in networks), self._maker, *map(str, key)]
        return folder / f"{hashlib.sha256(' '.join(words).encode()).hexdigest()}.safetensors"

    def _sum(self, folder: Path, network: Component) -> str:
        if network not in self._sums:
            self._sums[network] = checksum(network, folder)
        return self._sums[network]

    @property
    def _maker(self) -> str:
        device = mx.device_info()
        chip = f"{device.get('device_name')} {device.get('architecture')}"
        return f"{self.dtype} mlx {mlx_version()} mlx-zimage {__version__} {mx.default_device()} {chip}"

    def _forget(self, folder: Path) -> None:
        total = 0
        newest_first = sorted(files(folder), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        for file in newest_first:
            total += file.stat().st_size
            if total > self.limit:
                file.unlink(missing_ok=True)


def files(folder: Path) -> Iterator[Path]:
    """This module's files in a folder, which need not exist."""
    return (path for path in folder.glob("*") if OWN_FILES.fullmatch(path.name)) if folder.is_dir() else iter(())


def remove(folder: Path) -> None:
    """Remove this module's files from a folder, and the folder itself if nothing else is in it."""
    for path in files(folder):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def digest(array: mx.array) -> str:
    return hashlib.sha256(np.array(array.view(mx.uint8)).data).hexdigest()


def checksum(component: Component, folder: Path) -> str:
    """One SHA-256 of a network's config and weights.

    Taken from the converter's manifest if no file is newer than it; otherwise from the files, and then cached in
    `folder` while their paths, sizes and times stay the same: a full-size encoder takes seconds to read.
    """
    config = component.folder / "config.json"
    files = {entry.file for entry in component.entries.values()}
    parts = sorted(files | {config} if config.is_file() else files)
    sums = _manifest(component.folder.parent, parts)
    if sums is None:
        state = "\n".join(f"{file.resolve()} {file.stat().st_size} {placed(file)}" for file in parts)
        memo = folder / f"{hashlib.sha256(os.fsencode(state)).hexdigest()}.sum"
        try:
            sums = memo.read_text()
            os.utime(memo)
        except (OSError, UnicodeDecodeError):
            sums = "\n".join(_sha256(file) for file in parts)
            with suppress(OSError):
                _write(memo, lambda file: file.write_text(sums))
    return hashlib.sha256(sums.encode()).hexdigest()


def _manifest(model: Path, files: Sequence[Path]) -> str | None:
    """The SHA-256 of these files from the model's manifest, one per line; None if it does not cover them all."""
    try:
        written = _newest((model / MANIFEST).stat())
        sums = read_manifest(model)
    except (OSError, CheckpointError):
        return None
    names = [file.relative_to(model).as_posix() for file in files]
    if any(name not in sums for name in names) or any(placed(file) > written for file in files):
        return None
    return "\n".join(sums[name] for name in names)


def placed(file: Path) -> int:
    """When a file or its folder was last written, copied, moved or linked to its place, in ns."""
    return max(_newest(state) for path in (file, file.parent) for state in (path.stat(), path.lstat()))


def _newest(state: os.stat_result) -> int:
    return max(state.st_mtime_ns, state.st_ctime_ns)  # copying may preserve the mtime


def _sha256(file: Path) -> str:
    # the hub's cache names large files by their SHA-256
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else sha256(file)


def _write(path: Path, save: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # private: they reveal the prompts
    atomic.write(path, save, lasting=False)
