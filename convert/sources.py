"""What the converter reads: a checkpoint as configs, small files, and tensors that are read by rows.

A Tensor is never read whole: `read(start, stop)` gives some rows of its first axis. So a source needs no more
memory than the converter asks for, whatever the size of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, NumericsError
from ..quantize import Quantization
from ..weights import DTYPES, Component, Entry, open_checkpoint, read_json

CHUNK_BYTES = 32 * 2**20  # of float32, in memory at a time
# The exponent's bits, which are all set in NaN and infinity and in no finite number.
EXPONENT = {mx.float32: (mx.uint32, 0x7F800000), mx.bfloat16: (mx.uint16, 0x7F80), mx.float16: (mx.uint16, 0x7C00)}
FLOATING = ("F32", "F16", "BF16")
CONVERSION = "conversion.json"  # in a folder of ours: what it was made from, and how
# Beside the weights, what a model folder is made of.
SMALL_FILES = ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt", "tokenizer/*.jinja"]


@dataclass(frozen=True)
class Tensor:
    """A tensor in diffusers' name, shape and layout. read(start, stop) gives rows of it, dense and floating."""

    name: str
    shape: tuple[int, ...]
    nbytes: int  # as the source stores it
    read: Callable[[int, int], mx.array]


@dataclass(frozen=True)
class SourceComponent:
    """One network: its config.json, and its tensors in the order of the architecture."""

    name: str
    config: dict
    tensors: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Source:
    """An opened source.

    origin is its name, without the folders of this machine; weights are the files that the tensors lie in; files are
    those to copy, by their path in the folder to be written; conversion tells how our converter made it, if it did.
    """

    origin: str
    folder: Path
    components: list[SourceComponent]
    weights: list[Path]
    files: dict[str, Path]
    conversion: dict | None = None

    @property
    def nbytes(self) -> int:
        return sum(component.nbytes for component in self.components)


def open_source(source: str | Path) -> Source:
    """Open anything the loader opens, and check it as the loader does. Reads configs and headers only."""
    checkpoint = open_checkpoint(source)
    folder = checkpoint.folder
    patterns = [*SMALL_FILES, *(f"{component.name}/*.json" for component in checkpoint.components)]
    written = {f"{component.name}/config.json" for component in checkpoint.components}
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file() and not path.name.endswith(".index.json")
    }
    conversion = folder / CONVERSION
    return Source(
        origin=folder.resolve().name if Path(source).expanduser().is_dir() else str(source),
        folder=folder,
        components=[_component(component) for component in checkpoint.components],
        weights=sorted({entry.file for component in checkpoint.components for entry in component.entries.values()}),
        files={name: path for name, path in files.items() if name not in written},
        conversion=read_json(conversion) if conversion.is_file() else None,
    )


def _component(component: Component) -> SourceComponent:
    entries = component.entries
    # The architecture's order, whatever the source's: equal weights make equal files.
    shapes = {name: shape for name, shape in component.config.shapes().items() if name in entries}
    helpers = {f"{layer}.{part}" for layer in component.quantizations for part in ("scales", "biases")}
    shapes |= {name: entry.shape for name, entry in entries.items() if name not in shapes and name not in helpers}
    tensors = []
    for name, shape in shapes.items():
        q = component.quantizations.get(name.removesuffix(".weight"))
        if q:
            packed = {key.rpartition(".")[2]: entries[key] for key in q.packed(name, shape)}
            nbytes = sum(entry.nbytes for entry in packed.values())
            tensors.append(Tensor(name, shape, nbytes, _packed_rows(packed, q)))
        elif entries[name].dtype in FLOATING:
            tensors.append(Tensor(name, shape, entries[name].nbytes, _dense_rows(entries[name])))
        else:
            raise CheckpointError(
                f"{component.folder}: {name} is {entries[name].dtype}, and config.json does not say how it is packed"
            )
    return SourceComponent(component.name, component.raw_config, tensors)


def _dense_rows(entry: Entry) -> Callable[[int, int], mx.array]:
    row_shape = entry.shape[1:]
    row_bytes = entry.nbytes // entry.shape[0]

    def read(start: int, stop: int) -> mx.array:
        # Read, not mapped: touched pages of a mapped file count as resident until the system takes them back.
        count, offset = (stop - start) * row_bytes, entry.offset + start * row_bytes
        try:
            raw = np.fromfile(entry.file, np.uint8, count, offset=offset)
        except OSError as error:
            raise CheckpointError(f"{entry.file} could not be read: {error.strerror or error}") from error
        if raw.size != count:
            raise CheckpointError(f"{entry.file} became shorter while it was read")
        return mx.array(raw).view(DTYPES[entry.dtype]).reshape(stop - start, *row_shape)

    return read


def _packed_rows(entries: dict[str, Entry], q: Quantization) -> Callable[[int, int], mx.array]:
    parts = {part: _dense_rows(entry) for part, entry in entries.items()}

    def read(start: int, stop: int) -> mx.array:
        weight, scales = parts["weight"](start, stop), parts["scales"](start, stop)
        biases = None
        if q.mode == "affine":
            # in float32, so that the one rounding is the one to the target's dtype
            scales, biases = scales.astype(mx.float32), parts["biases"](start, stop).astype(mx.float32)
        return mx.dequantize(
            weight, scales, biases, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=mx.float32
        )

    return read


def parameters(component: SourceComponent) -> int:
    return sum(prod(tensor.shape) for tensor in component.tensors)


def read_rows(tensor: Tensor, dtype: str) -> Iterator[mx.array]:
    """The rows of a tensor in dtype, some at a time. Refuses what is not finite."""
    target = getattr(mx, dtype)
    height = tensor.shape[0]
    step = max(1, CHUNK_BYTES // (4 * prod(tensor.shape[1:])))
    for start in range(0, height, step):
        stored = tensor.read(start, min(start + step, height))
        rows = stored.astype(target)
        if not is_finite(rows):
            if is_finite(stored):
                raise NumericsError(f"{tensor.name} has values beyond {dtype}; choose another dtype")
            raise NumericsError(f"{tensor.name} of the source holds NaN or infinity; fetch the model again")
        yield rows


def is_finite(array: mx.array) -> bool:
    unsigned, exponent = EXPONENT[array.dtype]
    bits = np.array(array.view(unsigned), copy=False)
    return not ((bits & exponent) == exponent).any()
