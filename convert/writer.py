"""What the converter writes: safetensors shards, their index, and a folder that appears only when it is whole.

Names, shapes and dtypes are known before any tensor is read, so a shard's header is written first and its tensors
follow as they come; no shard is ever held in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx

from ..errors import OutputError, RequestError, ZImageError

SHARD_BYTES = 512 * 10**6
ITEM_BYTES = {"F32": 4, "U32": 4, "F16": 2, "BF16": 2, "U8": 1}


@dataclass(frozen=True)
class Slot:
    """The place of one array in a shard; dtype in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * prod(self.shape)


def shard_name(i: int, count: int) -> str:
    """The file name of shard i, counted from 0, of count."""
    return f"model-{i + 1:05}-of-{count:05}.safetensors"


def header(slots: Iterable[Slot]) -> bytes:
    """A safetensors header, with its length in front and padded to 8 bytes as the format's own writer does."""
    fields: dict = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for slot in slots:
        end = offset + slot.nbytes
        fields[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardFile:
    """One safetensors file, written from front to back. An array may come in pieces, each some of its rows."""

    def __init__(self, file: Path, slots: Sequence[Slot]):
        self._stream = file.open("wb")
        self._size = self._stream.write(header(slots)) + sum(slot.nbytes for slot in slots)

    def write(self, array: mx.array) -> None:
        self._stream.write(memoryview(array.reshape(-1).view(mx.uint8)))

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            assert self._stream.tell() == self._size, f"{self._stream.name} is not of the size its header tells"
        self._stream.close()


def index(shards: Sequence[Sequence[Slot]], parameters: int) -> dict:
    """The content of model.safetensors.index.json, as mlx-lm writes it."""
    weight_map = {slot.name: shard_name(i, len(shards)) for i, slots in enumerate(shards) for slot in slots}
    return {
        "metadata": {
            "total_size": sum(slot.nbytes for slots in shards for slot in slots),
            "total_parameters": parameters,
        },
        "weight_map": dict(sorted(weight_map.items())),
    }


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=4, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def check_destination(dest: Path, source: Path) -> None:
    """Refuse a destination that exists, or that lies in the source's folder."""
    if os.path.lexists(dest):
        raise RequestError(f"{dest} exists already; remove it, or give another name")
    if source.resolve() in dest.resolve().parents:
        raise RequestError(f"{dest} lies inside the source {source}; give a folder outside it")


def check_space(dest: Path, nbytes: int) -> None:
    """Refuse work whose result does not fit on dest's disk."""
    parent = next(folder for folder in dest.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OutputError(
            f"{dest} needs {nbytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left; free some, "
            f"choose another disk, or fewer bits"
        )


@contextmanager
def partial_folder(dest: Path) -> Iterator[Path]:
    """A folder beside dest to write into. It becomes dest when the block ends, and is removed when it fails."""
    partial = dest.with_name(f".{dest.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, dest)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, ZImageError):
            raise OutputError(f"{dest} could not be written: {error.strerror or error}") from error
        raise
