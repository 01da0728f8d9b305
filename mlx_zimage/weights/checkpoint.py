"""From a model's name to checked weights: find the folder, read the headers, hand out lazy arrays.

A model is a diffusers folder, as published or as our converter writes it. Opening it reads only configs and headers,
and checks every name and shape against the architecture; tensor data is read when a network asks for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map, tree_unflatten
from safetensors import SafetensorError, safe_open

from .. import variants
from ..dtypes import STORED
from ..errors import CheckpointError, RequestError
from ..models import NETWORKS, OPTIONAL
from ..models.runner import Tree, Where
from ..quantization import Quantization
from ..scheduler import SchedulerConfig
from ..variants import Variant
from .hub import resolve
from .manifest import CONVERSION

SHARD = re.compile(r"[^/\\\0]+\.safetensors")
FLOAT_SPELLINGS = ("F32", "F16", "BF16")
PIPELINE_CLASS = "ZImagePipeline"
SHOWN = 5  # number of names an error lists


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} part of a diffusers folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object but got a {type(content).__name__}; download it again")
    return content


@dataclass(frozen=True)
class Entry:
    """Where one tensor is on disk; name, shape and dtype as stored."""

    file: Path
    name: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file."""
    if file.exists() and not os.access(file, os.R_OK):
        raise CheckpointError(f"{file} cannot be read: permission denied; check its permissions")
    try:
        # mx.load accepts overlapping, negative and trailing data ranges; safetensors' own reader refuses them
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, but the index lists it; download the model again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({error}); it may be truncated, a Git LFS pointer or an HTML "
            f"page: download it again"
        ) from error
    header.pop("__metadata__", None)
    entries = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        entries[name] = Entry(file, name, 8 + length + begin, end - begin, tuple(tensor["shape"]), tensor["dtype"])
    return entries


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a component: those its index lists, or its only one."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise CheckpointError(
            f"{folder} has {len(indexes)} index files ({indexes[0].name}, {indexes[1].name}); keep only one"
        )
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{indexes[0]} has no weight_map; download it again")
        for name in weight_map.values():
            if not isinstance(name, str) or not SHARD.fullmatch(name):
                raise CheckpointError(f"{indexes[0]} lists {name!r}; shards must be in the same folder")
        return [folder / name for name in sorted(set(weight_map.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if not files:
        raise CheckpointError(
            f"{folder} has no safetensors file; convert other formats with `mlx-zimage convert` first"
        )
    raise CheckpointError(
        f"{folder} has {len(files)} safetensors files but no index that lists them; download the model again"
    )


# Number of threads in `read_all`. With MLX's CUDA build, each one reads a tensor from the page cache, then copies it to
# the GPU, both at 5 GB/s. Total measured on an H100: one thread 2 to 4 GB/s, two 4 to 6, four 5 to 8, eight no faster.
READERS = 4


class Component:
    """One network's folder: its config and its tensors on disk, checked against the architecture."""

    def __init__(self, folder: Path, name: str):
        self.folder = folder / name
        self.name = name
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder} has no folder {name}/; is it a complete diffusers folder?")
        self.raw_config = read_json(self.folder / "config.json")
        self.config = _read_config(NETWORKS[name], self.folder / "config.json")
        self.entries: dict[str, Entry] = {}
        for file in find_shards(self.folder):
            for key, entry in read_header(file).items():
                if key in self.entries:
                    raise CheckpointError(
                        f"{self.folder}: {key} is in both {self.entries[key].file.name} and {file.name}"
                    )
                self.entries[key] = entry
        self.entries = {self.config.named(key): entry for key, entry in self.entries.items()}
        self._check()

    @cached_property
    def quantizations(self) -> dict[str, Quantization]:
        """Each quantized layer's quantization, from mlx-lm's block in config.json; keyed by the layer's path."""
        block = self.raw_config.get("quantization")
        if not block:
            return {}
        layers = [name.removesuffix(".scales") for name in self.entries if name.endswith(".scales")]
        try:
            return {layer: Quantization.from_dict(block.get(layer) or block) for layer in layers}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f'{self.folder / "config.json"}: "quantization" is not a block of bits and group_size as mlx-lm '
                f"writes it ({error})"
            ) from error
        except RequestError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error}") from error

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that must be present, quantized layers in packed form."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self.config.shapes().items():
            q = self.quantizations.get(name.removesuffix(".weight"))
            shapes |= q.packed(name, shape) if q else {name: shape}
        return shapes

    def _check(self):
        expected = self.expected()
        missing = [name for name in expected if name not in self.entries and not self.config.unused(name)]
        extra = [name for name in self.entries if name not in expected and not self.config.unused(name)]
        misshapen = [
            f"{name} is {self.entries[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if name in self.entries and self.entries[name].shape != shape
        ]
        unknown = [
            f"{name} is {self.entries[name].dtype}"
            for name in expected
            if name in self.entries and self.entries[name].dtype not in self._dtypes(name)
        ]
        for fault, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of a different shape than config.json says", misshapen),
            (f"of a dtype other than {', '.join(FLOAT_SPELLINGS)}", unknown),
        ):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                raise CheckpointError(
                    f"{self.folder}: {len(names)} of {len(expected)} weights are {fault}: "
                    f"{', '.join(names[:SHOWN])}{more}"
                )

    def _dtypes(self, name: str) -> Collection[str]:
        # only quantized layers may contain integers
        return STORED if name.rpartition(".")[0] in self.quantizations else FLOAT_SPELLINGS

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and dense shape of every weight of the architecture, quantized or not."""
        return self.config.shapes()

    def read(self, prefix: str, dtype: mx.Dtype, without: str = "", stream: Where = None) -> Tree:
        """The tree of arrays under `prefix`, lazy, floating-point ones in dtype; see `models.runner.Weights`."""
        start = len(prefix) + 1
        # Sorted, however a block is split over shards: a compiled function is traced again for another order.
        names = sorted(name for name in self.entries if name.startswith(f"{prefix}."))
        if without:
            names = [name for name in names if not name.startswith(without, start)]
        files = {self.entries[name].file for name in names or [prefix]}
        loaded: dict[Path, Any] = {file: mx.load(str(file), stream=stream) for file in files}

        def array(name: str) -> mx.array:
            entry = self.entries[name]
            stored = loaded[entry.file][entry.name]
            if mx.issubdtype(stored.dtype, mx.floating):
                stored = stored.astype(dtype, stream=stream)
            return self.config.sanitize(name, stored)

        if not names:
            return array(prefix)
        return tree_unflatten(with_packing({name[start:]: array(name) for name in names}, self._packings(prefix)))

    def _packings(self, prefix: str) -> dict[str, Quantization]:
        """The quantizations of the layers under a prefix, by the rest of their names."""
        start = len(prefix) + 1
        return {layer[start:]: q for layer, q in self.quantizations.items() if layer.startswith(f"{prefix}.")}

    def read_all(self, prefixes: Sequence[str], dtype: mx.Dtype, without: str = "") -> Iterator[Tree]:
        """The tree under each prefix in turn, as `read` returns it, but evaluated, by READERS threads."""

        def read(prefix: str) -> Tree:
            tree = self.read(prefix, dtype, without)
            tree_map(mx.eval, tree)  # one by one, so that a tensor's intermediates are freed before the next is read
            return tree

        # The threads must end here: one that still works in MLX's CUDA build at exit may abort the process (MLX 4506).
        with ThreadPoolExecutor(READERS, "mlx-zimage-reader") as readers:
            yield from readers.map(read, prefixes)

    def rows(self, name: str, ids: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """The rows `ids` of a dense table, (len(ids), width) in dtype; only these rows are read."""
        entry = self.entries[name]
        stored = np.memmap(entry.file, mode="r", offset=entry.offset, dtype=np.uint8, shape=(entry.nbytes,))
        picked = stored.reshape(entry.shape[0], -1)[np.asarray(ids)]
        return mx.array(picked).view(getattr(mx, STORED[entry.dtype])).astype(dtype)


def with_packing(arrays: dict[str, mx.array], quantizations: Mapping[str, Quantization]) -> list[tuple[str, Any]]:
    """The leaves of a tree, with each quantized layer's packing as keyword arguments for MLX's functions."""
    leaves: list[tuple[str, Any]] = list(arrays.items())
    for layer, q in quantizations.items():
        if f"{layer}.scales" in arrays:
            leaves += [(f"{layer}.packing.{key}", value) for key, value in q.to_dict().items()]
    return leaves


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder: its checked networks by name, the scheduler's config, and its variant."""

    folder: Path
    networks: Mapping[str, Component]
    scheduler: SchedulerConfig
    variant: Variant

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer" / "tokenizer.json"

    @property
    def components(self) -> Iterable[Component]:
        return self.networks.values()

    @property
    def transformer(self) -> Component:
        return self.networks["transformer"]

    @property
    def text_encoder(self) -> Component:
        return self.networks["text_encoder"]

    @property
    def vae(self) -> Component:
        return self.networks["vae"]


def open_checkpoint(source: str | Path, variant: str | None = None) -> Checkpoint:
    """Find a model and check it against the architecture. Reads configs and headers, but no tensor data.

    variant names the row of `variants` to use it as; by default it is recognized.
    """
    folder = resolve(source)
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} has no model_index.json; expected a diffusers folder")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != PIPELINE_CLASS:
        raise CheckpointError(
            f"{folder / 'model_index.json'} declares {kind or 'no pipeline'}; expected {PIPELINE_CLASS}"
        )
    networks = {name: Component(folder, name) for name in NETWORKS if name not in OPTIONAL or (folder / name).is_dir()}
    scheduler = _read_config(SchedulerConfig, folder / "scheduler" / "scheduler_config.json")
    known = variants.named(variant) if variant else variants.recognize(scheduler.shift, origins(folder))
    if variant and variants.recognize(scheduler.shift, []) != known:  # then its schedule is a different one, too
        scheduler = replace(scheduler, shift=known.shift)
    checkpoint = Checkpoint(folder, networks, scheduler, known)
    if not checkpoint.tokenizer_file.is_file():
        raise CheckpointError(f"{checkpoint.tokenizer_file} is missing; download the model again")
    text, expected = checkpoint.text_encoder.config.hidden_size, checkpoint.transformer.config.cap_feat_dim
    if text != expected:
        raise CheckpointError(
            f"{folder}: the text encoder outputs {text} features per token, but the transformer expects {expected}; "
            f"they belong to different models"
        )
    return checkpoint


def origins(folder: Path) -> list[str]:
    """The sources a folder was converted from, as our converter recorded them: newest first, empty if it was not."""
    try:
        record: object = read_json(folder / CONVERSION)
    except CheckpointError:  # there is none, or it is damaged, which `verify` reports
        return []
    found = []
    while isinstance(record, dict):
        found.append(str(record.get("source")))
        record = record.get("before")
    return found


def fingerprint(checkpoint: Checkpoint) -> str:
    """Ten hexadecimal digits that identify a model's weights, wherever they are stored.

    Reads each safetensors header and 64 evenly spaced samples of 4 KB per file, which takes milliseconds; a checksum of
    a full-size model takes a minute. It may miss damage to single bytes, which `mlx-zimage verify` finds.
    """
    files = {entry.file for component in checkpoint.components for entry in component.entries.values()}
    sha = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.parent.name, file.name)):
        size = file.stat().st_size
        with open(file, "rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            sha.update(stream.read(header))
            for i in range(64):
                stream.seek(8 + header + (size - 8 - header) * i // 64)
                sha.update(stream.read(4096))
    return sha.hexdigest()[:10]


def _read_config(cls, file: Path):
    try:
        return cls.from_dict(read_json(file))
    except CheckpointError as error:
        raise error if str(file) in str(error) else CheckpointError(f"{file}: {error}") from error
