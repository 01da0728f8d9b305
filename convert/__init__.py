"""The converter: from a checkpoint to a folder of MLX weights, tensor by tensor.

Every tensor keeps its diffusers name and layout. It is read a few rows at a time, cast to the target's dtype, packed
if the recipe says so, and written; so a conversion needs a few hundred megabytes, whatever the model's size.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import NumericsError, RequestError
from ..quantize import Quantization, default_quantization, recipe
from .sources import Source, SourceComponent, Tensor, open_source, parameters
from .writer import (
    SHARD_BYTES,
    ShardFile,
    Slot,
    check_destination,
    check_space,
    index,
    partial_folder,
    shard_name,
    write_json,
)

__all__ = ["Progress", "convert", "convert_steps"]

DTYPES = {"float32": ("F32", mx.float32), "bfloat16": ("BF16", mx.bfloat16), "float16": ("F16", mx.float16)}
DENSE = (0, 16)  # bits that mean: not quantized
CHUNK_BYTES = 32 * 2**20  # of float32, in memory at a time
# The exponent's bits, which are all set in NaN and infinity and in no finite number.
EXPONENT = {mx.float32: (mx.uint32, 0x7F800000), mx.bfloat16: (mx.uint16, 0x7F80), mx.float16: (mx.uint16, 0x7C00)}


@dataclass(frozen=True)
class Progress:
    """A tensor has been converted: done_bytes of the source's total_bytes are behind us."""

    component: str
    name: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Job:
    """One tensor to convert: how it is packed (None: dense), and the arrays it becomes."""

    tensor: Tensor
    quantization: Quantization | None
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: str = "bfloat16",
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    text_encoder_bits: int | None = None,
    transformer_bits: int | None = None,
) -> Path:
    """Write the model at source as the folder dest, which must not exist, and return its path.

    source is a diffusers folder, a Hugging Face id, "pocket" or a folder of ours. dtype ("bfloat16", "float32",
    "float16") is that of every tensor which is not quantized. The matrices of the attention and feed-forward layers
    are quantized if bits are given, or a mode other than "affine": bits 2, 3, 4, 5, 6 or 8 in groups of 32, 64 (the
    default) or 128 for "affine"; "mxfp4", "mxfp8" and "nvfp4" have one choice each. text_encoder_bits and
    transformer_bits stand in for bits in that network; 0 or 16 leaves it dense.

    The folder appears under its name only when it is whole. On any failure nothing is left.
    """
    steps = convert_steps(
        source,
        dest,
        dtype=dtype,
        bits=bits,
        group_size=group_size,
        mode=mode,
        text_encoder_bits=text_encoder_bits,
        transformer_bits=transformer_bits,
    )
    for _ in steps:
        pass
    return Path(dest).expanduser()


def convert_steps(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: str = "bfloat16",
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    text_encoder_bits: int | None = None,
    transformer_bits: int | None = None,
) -> Iterator[Progress]:
    """Do what `convert` does, yielding Progress after each tensor. Leaving the loop stops the work and undoes it."""
    if dtype not in DTYPES:
        raise RequestError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    wanted = quantizations(bits, group_size, mode, text_encoder_bits, transformer_bits)
    opened = open_source(source)
    dest = Path(dest).expanduser()
    check_destination(dest, opened.folder)
    plans = {part.name: plan(part, dtype, wanted.get(part.name)) for part in opened.components}
    check_space(dest, sum(job.nbytes for shards in plans.values() for jobs in shards for job in jobs))
    with partial_folder(dest) as folder:
        copy_files(opened, folder)
        done = 0
        for part in opened.components:
            for step in write_component(folder / part.name, part, plans[part.name], dtype, wanted.get(part.name)):
                done += step.nbytes
                yield Progress(part.name, step.name, done, opened.nbytes)


def quantizations(
    bits: int | None,
    group_size: int | None = None,
    mode: str = "affine",
    text_encoder_bits: int | None = None,
    transformer_bits: int | None = None,
) -> dict[str, Quantization | None]:
    """How each network that can be quantized is to be, from convert's arguments."""
    chosen = {}
    for component, own_bits in (("transformer", transformer_bits), ("text_encoder", text_encoder_bits)):
        component_bits = bits if own_bits is None else own_bits
        dense = component_bits in DENSE or (component_bits is None and mode == "affine")
        chosen[component] = None if dense else default_quantization(component_bits, group_size, mode)
    if group_size is not None and not any(chosen.values()):
        raise RequestError(f"a group size of {group_size} was given, but no bits; nothing would be quantized")
    return chosen


def plan(component: SourceComponent, dtype: str, quantization: Quantization | None) -> list[list[Job]]:
    """The jobs of each shard, in the order in which they are written."""
    shards: list[list[Job]] = [[]]
    size = 0
    for tensor in component.tensors:
        q = recipe(component.name, tensor.name, tensor.shape, quantization)
        job = Job(tensor, q, slots(tensor, dtype, q))
        if size and size + job.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.nbytes
    return shards


def slots(tensor: Tensor, dtype: str, quantization: Quantization | None) -> tuple[Slot, ...]:
    """The arrays that a tensor becomes on disk."""
    spelled, _ = DTYPES[dtype]
    if quantization is None:
        return (Slot(tensor.name, spelled, tensor.shape),)
    weight, *helpers = quantization.packed(tensor.name, tensor.shape).items()
    helper_dtype = spelled if quantization.mode == "affine" else "U8"
    return (Slot(weight[0], "U32", weight[1]), *(Slot(name, helper_dtype, shape) for name, shape in helpers))


def copy_files(source: Source, folder: Path) -> None:
    for name, file in source.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)


def write_component(
    folder: Path, component: SourceComponent, shards: list[list[Job]], dtype: str, quantization: Quantization | None
) -> Iterator[Tensor]:
    """Write a component's config, shards and index, yielding each tensor once it is written."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config(component.config, dtype, quantization))
    for i, jobs in enumerate(shards):
        places = [slot for job in jobs for slot in job.slots]
        with ShardFile(folder / shard_name(i, len(shards)), places) as file:
            for job in jobs:
                for array in pack(job, dtype):
                    file.write(array)
                yield job.tensor
    places = [[slot for job in jobs for slot in job.slots] for jobs in shards]
    write_json(folder / "model.safetensors.index.json", index(places, parameters(component)))


def config(source_config: dict, dtype: str, quantization: Quantization | None) -> dict:
    """The source's config.json made true of what is written: its dtype, and mlx-lm's quantization block twice."""
    changed = {key: value for key, value in source_config.items() if not key.startswith("quantization")}
    for key in ("dtype", "torch_dtype"):
        if key in changed:
            changed[key] = dtype
    if quantization:
        changed["quantization"] = changed["quantization_config"] = quantization.to_dict()
    return changed


def pack(job: Job, dtype: str) -> Iterator[mx.array]:
    """The arrays of a job in the order of its slots, the first a few rows at a time."""
    q = job.quantization
    helpers = []
    for rows in read_rows(job.tensor, dtype):
        if q is None:
            yield rows
        else:
            packed, *others = mx.quantize(rows, group_size=q.group_size, bits=q.bits, mode=q.mode)
            mx.eval(packed, others)
            yield packed
            helpers.append(others)
    for pieces in zip(*helpers, strict=True):
        yield mx.concatenate(pieces)


def read_rows(tensor: Tensor, dtype: str) -> Iterator[mx.array]:
    """The rows of a tensor in dtype, some at a time. Refuses what is not finite."""
    _, target = DTYPES[dtype]
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
