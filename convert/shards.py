"""Safetensors files to write: the header, and the arrays after it, computed when they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import mlx.core as mx
import numpy as np

from ..dtypes import ITEM_BYTES
from ..quantization import Quantization
from .rounding import quantize_rows
from .rows import Tensor, read_packed, read_rows

FOREIGN_BYTES = {"I8": 1, "F8_E4M3": 1}  # of dtypes that only ComfyUI's files have
PAGE = 2**14  # bytes of a memory page on Apple silicon: a tensor that begins on one can be mapped instead of read
CALIBRATED_BYTES = 64 * 2**20  # of float32, at a time: the overhead per column only pays off for many rows


@dataclass(frozen=True)
class Slot:
    """The entry of one array in a shard; dtype is spelled as in safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return (ITEM_BYTES | FOREIGN_BYTES)[self.dtype] * prod(self.shape)


@dataclass(frozen=True)
class Task:
    """The arrays made from one tensor, dense or quantized, or from several, stacked.

    search means that the scales of a quantized tensor are searched for; factor returns the factor of its inputs, see
    rounding.py.
    """

    component: str
    tensors: tuple[Tensor, ...]
    slots: tuple[Slot, ...]
    quantization: Quantization | None = None
    search: bool = False
    factor: Callable[[], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    def arrays(self, dtype: str) -> Iterator[mx.array]:
        """The content of the slots in order, a few rows at a time."""
        if self.quantization is None:
            for tensor in self.tensors:
                yield from read_rows(tensor, dtype)
            return
        helpers: list[list[mx.array]] = []
        for tensor in self.tensors:
            for packed, *others in self._packed(tensor, dtype, self.quantization):
                mx.eval(packed, others)
                yield packed
                helpers.append(others)
        for pieces in zip(*helpers, strict=True):
            yield mx.concatenate(list(pieces))

    def _packed(self, tensor: Tensor, dtype: str, q: Quantization) -> Iterator[list[mx.array]]:
        """Packed rows, with their scales and, if affine, biases: as the source has them, if it packs them like q."""
        if tensor.packing and tensor.packing.quantization == q:
            yield from read_packed(tensor.packing, tensor.shape)
            return
        factor = self.factor() if self.factor else None
        for rows in read_rows(tensor, dtype, None if factor is None else CALIBRATED_BYTES):
            yield quantize_rows(rows, q, self.search, factor)


@dataclass(frozen=True)
class Shard:
    """A safetensors file to write; form is the format declared in its metadata, next to other entries."""

    name: str
    tasks: list[Task]
    form: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def slots(self) -> list[Slot]:
        return [slot for task in self.tasks for slot in task.slots]

    @property
    def nbytes(self) -> int:
        """Size of the arrays, without the header."""
        return sum(task.nbytes for task in self.tasks)


def header(shard: Shard) -> bytes:
    """A safetensors header, preceded by its length and padded so that the data begins on a page."""
    fields: dict = {"__metadata__": {"format": shard.form, **shard.metadata}}
    offset = 0
    for slot in shard.slots:
        end = offset + slot.nbytes
        fields[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text
