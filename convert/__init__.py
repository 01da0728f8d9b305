"""The converter: from a checkpoint to a folder of MLX weights, tensor by tensor.

Every tensor keeps its diffusers name and layout. It is read a few rows at a time, cast to the target's dtype, packed
if the recipe says so, and written; so a conversion needs a few hundred megabytes, whatever the model's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import __version__
from ..errors import RequestError
from ..quantize import Quantization, default_quantization, recipe
from .rows import SourceComponent, Tensor, read_rows
from .sources import CONVERSION, Source, open_source
from .writer import (
    SHARD_BYTES,
    OutputFolder,
    Slot,
    check_absent,
    check_outside,
    header,
    index,
    render_json,
    shard_name,
)

__all__ = ["Progress", "convert", "convert_steps"]

SPELLED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # dtypes to convert to, in safetensors' spelling
DENSE = (0, 16)  # bits that mean: not quantized


@dataclass(frozen=True)
class Progress:
    """A tensor has been converted: done_bytes of the source's total_bytes are behind us."""

    component: str
    name: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Task:
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
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write the model at source as the folder dest, which must not exist, and return its path.

    source is a diffusers folder, a Hugging Face id, "pocket", a folder of ours or of mflux, or a safetensors or GGUF
    file. What it lacks comes from text_encoder, vae and tokenizer, else from base: see sources.open_source.

    dtype ("bfloat16", "float32", "float16") is that of every tensor which is not quantized. The matrices of the
    attention and feed-forward layers are quantized if bits are given, or a mode other than "affine": bits 2, 3, 4, 5,
    6 or 8 in groups of 32, 64 (the default) or 128 for "affine"; "mxfp4", "mxfp8" and "nvfp4" have one choice each.
    text_encoder_bits and transformer_bits stand in for bits in that network; 0 or 16 leaves it dense.

    The folder appears under its name only when it is whole. On any failure nothing is left; after a kill or a crash the
    same call goes on from the finished shards. SHA256SUMS in the folder has the checksum of every other file.
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
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer,
        base=base,
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
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
) -> Iterator[Progress]:
    """Do what `convert` does, yielding Progress after each tensor. Leaving the loop stops the work and undoes it."""
    if dtype not in SPELLED:
        raise RequestError(f"dtype must be one of {', '.join(SPELLED)}, got {dtype!r}")
    wanted = quantizations(bits, group_size, mode, text_encoder_bits, transformer_bits)
    opened = open_source(source, text_encoder=text_encoder, vae=vae, tokenizer=tokenizer, base=base)
    dest = Path(dest).expanduser()
    check_absent(dest)
    check_outside(dest, opened.at)
    plans = {part.name: plan(part, dtype, wanted.get(part.name)) for part in opened.components.values()}
    conversion = describe(opened, dtype, wanted)
    done = 0
    with OutputFolder(dest, fingerprint(opened, conversion, plans), planned_bytes(plans)) as folder:
        for part in opened.components.values():
            for step in write_component(folder, part, plans[part.name], dtype, wanted.get(part.name)):
                done += step.nbytes
                yield Progress(part.name, step.name, done, opened.nbytes)
        for name, content in opened.files.items():
            folder.write(name, content)
        folder.write(CONVERSION, render_json(conversion))


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


def plan(component: SourceComponent, dtype: str, quantization: Quantization | None) -> list[list[Task]]:
    """The tasks of each shard, in the order in which they are written."""
    shards: list[list[Task]] = [[]]
    size = 0
    for tensor in component.tensors:
        q = recipe(component.name, tensor.name, tensor.shape, quantization)
        task = Task(tensor, q, slots(tensor, dtype, q))
        if size and size + task.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(task)
        size += task.nbytes
    return shards


def slots(tensor: Tensor, dtype: str, quantization: Quantization | None) -> tuple[Slot, ...]:
    """The arrays that a tensor becomes on disk."""
    spelled = SPELLED[dtype]
    if quantization is None:
        return (Slot(tensor.name, spelled, tensor.shape),)
    weight, *helpers = quantization.packed(tensor.name, tensor.shape).items()
    helper_dtype = spelled if quantization.mode == "affine" else "U8"
    return (Slot(weight[0], "U32", weight[1]), *(Slot(name, helper_dtype, shape) for name, shape in helpers))


def planned_bytes(plans: dict[str, list[list[Task]]]) -> int:
    return sum(task.nbytes for shards in plans.values() for tasks in shards for task in tasks)


def describe(source: Source, dtype: str, quantization: dict[str, Quantization | None]) -> dict:
    """What is told about a conversion in the folder it made; `before` tells of the source's own conversion."""
    packed = {name: q and q.to_dict() for name, q in quantization.items()}
    told = {"converter": f"mlx-zimage {__version__}", "source": source.origin, "dtype": dtype, "quantization": packed}
    return told | ({"before": source.conversion} if source.conversion else {})


def fingerprint(source: Source, conversion: dict, plans: dict[str, list[list[Task]]]) -> dict:
    """What tells one conversion from another: the source's files, the options, and all that will be written."""
    layout = hashlib.sha256()
    for shards in plans.values():
        for tasks in shards:
            layout.update(header(slot for task in tasks for slot in task.slots))
    stats = [(str(path.resolve()), path.stat()) for path in source.weights]
    return {
        "conversion": conversion,
        "mlx": mx.__version__,
        "source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in source.files.items()},
        "layout": layout.hexdigest(),
    }


def write_component(
    folder: OutputFolder,
    component: SourceComponent,
    shards: list[list[Task]],
    dtype: str,
    quantization: Quantization | None,
) -> Iterator[Tensor]:
    """Write a component's shards, index and config, yielding each tensor once it is written."""
    places = [[slot for task in tasks for slot in task.slots] for tasks in shards]
    for i, tasks in enumerate(shards):
        name = f"{component.name}/{shard_name(i, len(shards))}"
        if folder.keeps(name):
            yield from (task.tensor for task in tasks)
            continue
        with folder.shard(name, places[i]) as file:
            for task in tasks:
                for array in pack(task, dtype):
                    file.write_array(array)
                yield task.tensor
    content = index(places, component.parameters)
    folder.write(f"{component.name}/model.safetensors.index.json", render_json(content))
    folder.write(f"{component.name}/config.json", render_json(config(component.config, dtype, quantization)))


def config(source_config: dict, dtype: str, quantization: Quantization | None) -> dict:
    """The source's config.json made true of what is written: its dtype, and mlx-lm's quantization block twice."""
    changed = {key: value for key, value in source_config.items() if not key.startswith("quantization")}
    for key in ("dtype", "torch_dtype"):
        if key in changed:
            changed[key] = dtype
    if quantization:
        changed["quantization"] = changed["quantization_config"] = quantization.to_dict()
    return changed


def pack(task: Task, dtype: str) -> Iterator[mx.array]:
    """The arrays of a task in the order of its slots, the first a few rows at a time."""
    q = task.quantization
    helpers = []
    for rows in read_rows(task.tensor, dtype):
        if q is None:
            yield rows
        else:
            packed, *others = mx.quantize(rows, group_size=q.group_size, bits=q.bits, mode=q.mode)
            mx.eval(packed, others)
            yield packed
            helpers.append(others)
    for pieces in zip(*helpers, strict=True):
        yield mx.concatenate(pieces)
