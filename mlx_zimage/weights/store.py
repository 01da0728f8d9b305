"""A cache on disk of what networks computed, above all prompt embeddings: a cached prompt needs no text encoder.

One safetensors file per array, named after everything its bits depend on: for embeddings the token ids, the encoder's
checksum and compute dtype, the versions of this package and MLX, and the device. The image is the same with and without
the cache. If anything goes wrong with these files, it costs time, never an image.

Checksums are of the bytes that were read here: what a folder says about itself, in a manifest or its files' names, is
not trusted. An array is used only from a file of this user that contains its own key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, deserialize

from .. import atomic
from ..dtypes import STORED
from ..failures import explain
from ..machine import mlx_version
from ..untrusted import is_sha256, parse_json, read_bytes
from ..version import __version__
from .component import Component
from .manifest import sha256
from .unchanged import Version

LIMIT = 256 * 10**6  # bytes; a prompt of 100 tokens takes half a megabyte in bfloat16
# Nothing else is ever removed from the folder, which the user may have chosen.
OWN_FILES = re.compile(rf"([0-9a-f]{{64}}|{re.escape(atomic.ASIDE)}[0-9a-f]{{16}})\.(safetensors|sum)")
MAX_ARRAY = 64 * 2**20  # bytes of a file; the embeddings of the longest prompt take 15 MB in float32
PRIVATE = 0o600  # the arrays reveal the prompts
FAULTS = (OSError, SafetensorError, RuntimeError, ValueError)


class Store:
    """The results of networks that compute in dtype on this machine, by key. folder None caches nothing."""

    def __init__(self, dtype: mx.Dtype, folder: Path | None):
        self.dtype = dtype
        self.folder = folder
        self.limit = LIMIT
        self._sums: dict[Component, tuple[str, str]] = {}  # the state of the files, and their checksum

    def get(
        self, networks: Sequence[Component], key: Sequence[object], shape: tuple[int, ...], dtype: mx.Dtype
    ) -> mx.array | None:
        """The array that the networks computed for a key, if it is cached and intact."""
        if self.folder is None:
            return None
        try:
            for network in filter(self._changed, networks):
                del self._sums[network]
            path = self._path(self.folder, networks, key)
            found = _load(read_bytes(path, MAX_ARRAY, own=True), path.stem)
            if (found.shape, found.dtype) != (shape, dtype) or not mx.isfinite(found).all().item():
                return None
            os.utime(path)  # the least recently used are removed first
            return found
        except (*FAULTS, KeyError, TypeError) as error:
            if explain(error):
                raise  # a failure of the GPU, not of the file
            return None

    def put(self, networks: Sequence[Component], key: Sequence[object], array: mx.array) -> None:
        """Cache what the networks computed for a key; beyond the limit, the least recently used files are removed.

        Nothing is cached if a file of the networks has changed since `get`: the array may belong to either version.
        """
        if self.folder is None:
            return
        try:
            if any(map(self._changed, networks)):
                return
            path = self._path(self.folder, networks, key)
            metadata = {"format": "mlx", "key": path.stem, "sha256": digest(array)}
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
            self._sums[network] = state_of(network), checksum(network, folder)
        return self._sums[network][1]

    def _changed(self, network: Component) -> bool:
        """Whether the files of a network are not those whose checksum is known here."""
        return network in self._sums and self._sums[network][0] != state_of(network)

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


def _load(content: bytes, key: str) -> mx.array:
    """The array in the content of a file that `put` wrote for this key; ValueError if it did not."""
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    ((_, tensor),) = deserialize(content)
    array = mx.array(np.frombuffer(tensor["data"], np.uint8)).view(getattr(mx, STORED[tensor["dtype"]]))
    if (header["__metadata__"]["key"], header["__metadata__"]["sha256"]) != (key, digest(array)):
        raise ValueError("it was written for another key, or has changed")
    return array.reshape(tensor["shape"])


def checksum(component: Component, folder: Path) -> str:
    """One SHA-256 of a network's config and weights.

    Taken from the files, and then cached in `folder` while their paths, sizes and times stay the same: a full-size
    encoder takes seconds to read.
    """
    parts = _parts(component)
    key = state_of(component)
    memo = folder / f"{key}.sum"
    try:
        written_for, *sums = read_bytes(memo, own=True).decode().splitlines()
        if written_for != key or len(sums) != len(parts) or not all(map(is_sha256, sums)):
            raise ValueError("it was written for other files")
        os.utime(memo)
    except (OSError, ValueError):
        sums = [_sha256(file) for file in parts]
        with suppress(OSError):
            _write(memo, lambda file: file.write_text("\n".join([key, *sums])))
    config = json.dumps(component.raw_config, sort_keys=True)  # as it was read; files of other programs have none
    return hashlib.sha256("\n".join([*sums, config]).encode()).hexdigest()


def state_of(component: Component) -> str:
    """A SHA-256 of the places and versions of a network's weights: if it differs, some may have changed."""
    state = (f"{file.resolve()} {Version.of(file)} {placed(file)}" for file in _parts(component))
    return hashlib.sha256(os.fsencode("\n".join(state))).hexdigest()


def _parts(component: Component) -> list[Path]:
    return sorted({entry.file for entry in component.entries.values()})


def placed(file: Path) -> int:
    """When a file or its folder was last written, copied, moved or linked to its place, in ns."""
    return max(_newest(state) for path in (file, file.parent) for state in (path.stat(), path.lstat()))


def _newest(state: os.stat_result) -> int:
    return max(state.st_mtime_ns, state.st_ctime_ns)  # copying may preserve the mtime


def _sha256(file: Path) -> str:
    """A file's SHA-256, which is the name of a large file in the hub's own cache. Elsewhere, names prove nothing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    blob = file.resolve()
    in_cache = blob.parent.name == "blobs" and blob.parent.parent.parent == Path(HF_HUB_CACHE).resolve()
    return blob.name if in_cache and is_sha256(blob.name) else sha256(file)


def _write(path: Path, save: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic.write(path, save, lasting=False, mode=PRIVATE)
