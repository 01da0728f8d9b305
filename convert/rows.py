"""Tensors that are read by rows.

A Tensor is never read as a whole: `read(start, stop)` returns some rows of its first axis. So memory depends on what
the converter requests, not on the size of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from ..dtypes import FLOAT_SPELLINGS, STORED
from ..errors import NumericsError
from ..machine import backend
from ..quantization import Quantization
from ..weights.component import Entry
from ..weights.unchanged import unchanged
from .disk import read_range
from .rounding import dequantize_rows

# Bytes of float32 at a time: more would not fit in a CPU's cache; with less, a GPU would mostly be idle.
CHUNK_BYTES = {"cpu": 2 * 2**20, "metal": 2**26, "cuda": 2**26}
# The exponent bits, which are all set in NaN and infinity but not in any finite number.
EXPONENT = {mx.float32: (mx.uint32, 0x7F800000), mx.bfloat16: (mx.uint16, 0x7F80), mx.float16: (mx.uint16, 0x7C00)}


@dataclass(frozen=True)
class Packing:
    """Rows as MLX packs them: read(start, stop) returns their packed weight and scales."""

    quantization: Quantization
    read: Callable[[int, int], list[mx.array]]


@dataclass(frozen=True)
class Tensor:
    """A tensor with diffusers' name, shape and layout. read(start, stop) returns dense floating-point rows.

    packing is set if the source packs it like one of MLX's modes; its axes are padded to multiples of `padded`.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int  # as the source stores it
    read: Callable[[int, int], mx.array]
    packing: Packing | None = None
    padded: int = 1


@dataclass(frozen=True)
class SourceComponent:
    """One network: its config.json, and its tensors in the order of the architecture."""

    name: str
    config: dict
    tensors: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)


def _fp8_values(mantissa_bits: int, bias: int, infinite: bool) -> np.ndarray:
    """The value of each byte, float32: sign, exponent, mantissa."""
    codes = np.arange(128)
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    normal = exponent > 0
    values = (normal + mantissa / (1 << mantissa_bits)) * 2.0 ** (np.maximum(exponent, 1) - bias)
    if infinite:
        top = exponent == exponent.max()
        values[top] = np.where(mantissa[top] == 0, np.inf, np.nan)
    else:
        values[-1] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


FP8 = {
    "F8_E4M3": _fp8_values(mantissa_bits=3, bias=7, infinite=False),
    "F8_E5M2": _fp8_values(mantissa_bits=2, bias=15, infinite=True),
}
FLOATING = (*FLOAT_SPELLINGS, *FP8)


def stored_bytes(entry: Entry) -> Callable[[int, int], np.ndarray]:
    """A reader for the bytes of a safetensors tensor's rows, (rows, bytes per row) uint8."""
    row_bytes = entry.nbytes // max(1, entry.shape[0] if entry.shape else 1)

    def read(start: int, stop: int) -> np.ndarray:
        with unchanged([entry]):
            raw = read_range(entry.file, entry.offset + start * row_bytes, (stop - start) * row_bytes)
        return raw.reshape(stop - start, row_bytes)

    return read


def stored_rows(entry: Entry) -> Callable[[int, int], mx.array]:
    """A reader for the rows of a safetensors tensor as stored; fp8 is decoded to float32."""
    row_shape = entry.shape[1:]
    in_bytes = stored_bytes(entry)

    def read(start: int, stop: int) -> mx.array:
        raw = in_bytes(start, stop).reshape(-1)
        if entry.dtype in FP8:
            rows = mx.array(FP8[entry.dtype][raw])
        else:
            rows = mx.array(raw).view(getattr(mx, STORED[entry.dtype]))
        if entry.channels_last:
            depth, *kernel = row_shape
            return rows.reshape(stop - start, *kernel, depth).transpose(0, 3, 1, 2)
        return rows.reshape(stop - start, *row_shape)

    return read


def packed_rows(entries: dict[str, Entry], q: Quantization) -> Callable[[int, int], mx.array]:
    """A reader for the rows of a quantized weight, given its `weight`, `scales` and, if affine, `biases`: float32."""
    names = ("weight", "scales", "biases") if q.mode == "affine" else ("weight", "scales")
    parts = [stored_rows(entries[name]) for name in names]

    def read(start: int, stop: int) -> mx.array:
        return dequantize_rows([part(start, stop) for part in parts], q)

    return read


def read_rows(tensor: Tensor, dtype: str, chunk_bytes: int | None = None) -> Iterator[mx.array]:
    """The rows of a tensor in dtype, a few at a time. Raises NumericsError if a value is not finite."""
    target = getattr(mx, dtype)
    for start, stop in _pieces(tensor.shape, chunk_bytes):
        stored = tensor.read(start, stop)
        rows = stored.astype(target)
        if not all_finite(rows):
            if all_finite(stored):
                raise NumericsError(f"{tensor.name} has values out of range for {dtype}; choose another dtype")
            raise NumericsError(f"{tensor.name} contains NaN or infinity; download the source model again")
        yield rows


def read_packed(packing: Packing, shape: tuple[int, ...]) -> Iterator[list[mx.array]]:
    """The packed rows of a tensor of that shape, a few at a time."""
    for start, stop in _pieces(shape):
        yield packing.read(start, stop)


def _pieces(shape: tuple[int, ...], chunk_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """The first row and the end of each chunk, by default of CHUNK_BYTES."""
    step = max(1, (chunk_bytes or CHUNK_BYTES[backend()]) // (4 * prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def all_finite(array: mx.array) -> bool:
    unsigned, exponent = EXPONENT[array.dtype]
    bits = np.array(array.view(unsigned), copy=False)
    return not ((bits & exponent) == exponent).any()
