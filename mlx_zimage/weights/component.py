"""One network on disk: its files, their headers, and lazy arrays that are checked against the architecture."""

from __future__ import annotations

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
from mlx.utils import tree_unflatten

from ..dtypes import FLOAT_SPELLINGS, STORED
from ..errors import CheckpointError, RequestError
from ..models import ALL_NETWORKS, CONTROLNET
from ..models.runner import Reading, Tree, Where
from ..quantization import Quantization
from ..untrusted import open_regular, parse_json, read_bytes
from . import headers
from .hub import Repository
from .listing import INDEX, choose_files, variant_of, visible
from .names import DROPPED, check_sampler, some
from .unchanged import Version, unchanged

SHARD = re.compile(r"[^/\\\0]+\.safetensors")
ONLY_CONVERTED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8")
ONLY_COMFYUI = (".comfy_quant", ".weight_scale", ".scale_weight", ".weight_s_rel")  # next to its quantized weights


def read_json(path: Path) -> dict:
    try:
        content = parse_json(read_bytes(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} part of a diffusers folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object but got {type(content).__name__}; download it again")
    return content


@dataclass(frozen=True)
class Entry:
    """Where one tensor is on disk; name, shape and dtype as stored.

    It may be one of several equal parts of the stored tensor's rows (offset, nbytes and shape are the part's), and the
    shape another view of it: with or without axes of length 1, or for channels_last (out, in, h, w), stored as
    (out, h, w, in).
    """

    file: Path
    name: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    part: int = 0
    parts: int = 1
    channels_last: bool = False
    version: Version | None = None  # of the file, when its header was read

    def piece(self, part: int, parts: int) -> Entry:
        """One of several equal parts of the rows."""
        if parts == 1:
            return self
        rows, rest = divmod(self.shape[0] if self.shape else 0, parts)
        if rest:
            raise CheckpointError(
                f"{self.file}: {self.name} of shape {self.shape} cannot be split into {parts} equal parts"
            )
        nbytes = self.nbytes // parts
        shape = (rows, *self.shape[1:])
        return replace(self, offset=self.offset + part * nbytes, nbytes=nbytes, shape=shape, part=part, parts=parts)

    def laid_out(self, stored: mx.array) -> mx.array:
        """The entry of a stored tensor, in its own shape."""
        if self.parts > 1:
            rows = self.shape[0]
            # a copy, since a view would keep the whole tensor in memory
            stored = mx.contiguous(stored[self.part * rows : (self.part + 1) * rows])
        if self.channels_last:
            stored = stored.transpose(0, 3, 1, 2)
        return stored if stored.shape == self.shape else stored.reshape(self.shape)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file."""
    if file.exists() and not os.access(file, os.R_OK):
        raise CheckpointError(f"{file} cannot be read: permission denied; check its permissions")
    try:
        version = Version.of(file)  # before its header, so that no later change is missed
        header, _, start = headers.read(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, but the index lists it; download the model again") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({error}); it may be truncated, a Git LFS pointer or an HTML "
            f"page: download it again"
        ) from error
    return _entries(file, header, start, version)


def _entries(file: Path, header: dict[str, dict], start: int, version: Version | None = None) -> dict[str, Entry]:
    """The tensors that a header lists; start is where the data begins in the file."""
    entries = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        shape, dtype = tuple(tensor["shape"]), tensor["dtype"]
        entries[name] = Entry(file, name, start + begin, end - begin, shape, dtype, version=version)
    return entries


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; empty if there is none, or if the file cannot be read."""
    try:
        _, metadata, _ = headers.read(file)
    except (ValueError, OSError):
        return {}
    return metadata


def entries_in(file: Path, repository: Repository | None = None) -> dict[str, Entry]:
    """The tensors of one safetensors file; if it is not downloaded yet, its header is read in the repository."""
    if not repository or file.exists() or file not in repository.sizes:
        return read_header(file)
    header = repository.header(file)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    return _entries(file, header, repository.sizes[file] - end)


def find_shards(folder: Path, names: Iterable[str] | None = None, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component, in a variant such as "fp16" if it has it; see listing.choose_files.

    names are the files in the folder, by default those on this disk.
    """
    if names is None:
        names = [path.name for path in visible(folder) if path.is_file()]
    files = choose_files(names, variant, lambda index: read_weight_map(folder / index), folder)
    return [folder / name for name in files]


def read_entries(folder: Path, variant: str | None = None, repository: Repository | None = None) -> dict[str, Entry]:
    """The tensors in a component's files, except those that no network uses."""
    entries: dict[str, Entry] = {}
    for file in find_shards(folder, repository.names(folder) if repository else None, variant):
        for key, entry in entries_in(file, repository).items():
            if key in entries:
                raise CheckpointError(f"{folder}: {key} is in both {entries[key].file.name} and {file.name}")
            if not DROPPED.fullmatch(key):
                entries[key] = entry
    return entries


def read_weight_map(index: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> file name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    try:
        headers.check_count(weight_map)
    except ValueError as error:
        raise CheckpointError(f"{index} lists {error}; download it again") from error
    for name in weight_map.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise CheckpointError(f"{index} lists {name!r}; shards must be in the same folder")
    return weight_map


# Number of threads in `read_all`. With MLX's CUDA build, each one reads a tensor from the page cache, then copies it to
# the GPU, both at 5 GB/s. Total measured on an H100: one thread 2 to 4 GB/s, two 4 to 6, four 5 to 8, eight no faster.
READERS = 4


class Component:
    """One network of a model: its config and its tensors on disk, checked against the architecture."""

    def __init__(self, name: str, folder: Path, raw_config: dict, entries: Mapping[str, Entry]):
        self.name = name
        self.folder = folder
        self.raw_config = raw_config
        self.config = checked_config(ALL_NETWORKS[name], raw_config, folder / "config.json")
        check_sampler(entries, folder)
        self.entries = {self.config.named(key): entry for key, entry in entries.items()}
        self._check()

    @cached_property
    def quantizations(self) -> dict[str, Quantization]:
        """The quantization of each quantized layer, by its path, from mlx-lm's block in config.json."""
        block = self.raw_config.get("quantization")
        layers = [name.removesuffix(".scales") for name in self.entries if name.endswith(".scales")]
        if not block:
            return {layer: q for layer in layers if (q := self._by_shapes(layer))}
        try:
            return {layer: Quantization.from_dict(block.get(layer) or block) for layer in layers}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f'{self.folder / "config.json"}: "quantization" is not an object with the keys bits and '
                f"group_size, as mlx-lm writes it ({error})"
            ) from error
        except RequestError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error}") from error

    def _by_shapes(self, layer: str) -> Quantization | None:
        """How a layer is quantized where no config says it, as in mflux's and mlx-vlm's folders."""
        parts = {part: self.entries.get(f"{layer}.{part}") for part in ("weight", "scales", "biases")}
        shapes = {part: entry.shape for part, entry in parts.items() if entry}
        return Quantization.of_shapes(self.known().get(f"{layer}.weight"), shapes)

    def known(self) -> dict[str, tuple[int, ...]]:
        """Name and dense shape of every tensor that may be present, including those that are ignored when present."""
        present = {name.removesuffix(".scales") for name in self.entries}
        spare = self.config.spare().items()
        return self.config.shapes() | {x: shape for x, shape in spare if {x, x.removesuffix(".weight")} & present}

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that must or may be present, quantized layers in packed form."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self.known().items():
            q = self.quantizations.get(name.removesuffix(".weight"))
            shapes |= q.packed(name, shape) if q else {name: shape}
        return shapes

    def _check(self):
        expected = self.expected()
        missing = [name for name in expected if name not in self.entries and not self._unused(name)]
        extra = [name for name in self.entries if name not in expected]
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
        total = f" of {len(expected)}"
        for fault, names, among in (
            ("missing weights", missing, total),
            ("unexpected weights", extra, ""),
            ("weights whose shape differs from the one in config.json", misshapen, total),
            (f"weights with a dtype other than {', '.join(FLOAT_SPELLINGS)}", unknown, total),
        ):
            if names:
                raise CheckpointError(f"{self.folder}: {fault} ({len(names)}{among}): {some(names)}{self._hint()}")

    def _hint(self) -> str:
        """The likely reason why weights do not fit: a format that must be converted, or an index for other files."""
        if needs_converting(self.entries):
            if self.name == CONTROLNET:
                return "; download it as published, in bfloat16"
            return "; convert it first: mlx-zimage convert SOURCE DEST"
        files = {entry.file.name for entry in self.entries.values()}
        for index in visible(self.folder) if files and self.folder.is_dir() else ():
            if INDEX.fullmatch(index.name) and variant_of(index.name) == variant_of(min(files)):
                absent = sorted({*read_weight_map(index).values()} - files)
                if absent:
                    return f"; {index.name} lists {some(absent)}, missing here: download them, or delete that index"
        return ""

    def _unused(self, name: str) -> bool:
        layer, _, part = name.rpartition(".")
        return self.config.unused(f"{layer}.weight" if part in ("scales", "biases") else name)

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

    def read(self, prefix: str, dtype: mx.Dtype, without: str = "", stream: Where = None) -> Reading:
        """The tree of arrays under `prefix`, floating-point ones in dtype; see `models.runner.Weights`."""
        entries = self._under(prefix, without)
        with unchanged(entries.values()):
            stored = _load(entries, stream)
            if stream:
                mx.async_eval(stored)

        def tree() -> Tree:
            arrays = {}
            with unchanged(entries.values()):
                for name, entry in entries.items():
                    array = stored.pop(name)
                    mx.eval(array)
                    array = entry.laid_out(array)
                    mx.eval(array)  # the copy of a part, so that the whole can be freed
                    if mx.issubdtype(array.dtype, mx.floating):
                        array = array.astype(dtype)
                    arrays[name] = array = self.config.sanitize(name, array)
                    if not stream:
                        mx.eval(array)  # frees its intermediates before the next is read
            if prefix in arrays:
                return arrays[prefix]
            named = {name[len(prefix) + 1 :]: array for name, array in arrays.items()}
            return tree_unflatten(with_packing(named, self._packings(prefix)))

        return tree

    def _under(self, prefix: str, without: str) -> dict[str, Entry]:
        """The tensors under a prefix."""
        # Sorted, however a block is split over shards: a compiled function is traced again for another order.
        names = sorted(name for name in self.entries if name.startswith(f"{prefix}.")) or [prefix]
        if without:
            names = [name for name in names if not name.startswith(without, len(prefix) + 1)]
        return {name: self.entries[name] for name in names}

    def _packings(self, prefix: str) -> dict[str, Quantization]:
        """The quantizations of the layers under a prefix, by the rest of their names, "" for the prefix itself."""
        start = len(prefix) + 1
        return {layer[start:]: q for layer, q in self.quantizations.items() if f"{layer}.".startswith(f"{prefix}.")}

    def read_all(self, prefixes: Sequence[str], dtype: mx.Dtype, without: str = "") -> Iterator[Tree]:
        """The tree under each prefix in turn, as `read` returns it, but evaluated, by READERS threads."""

        def read(prefix: str) -> Tree:
            return self.read(prefix, dtype, without)()

        # The threads must end here: one that is still working in MLX's CUDA build at exit may abort the process (MLX
        # 4506).
        with ThreadPoolExecutor(READERS, "mlx-zimage-reader") as readers:
            yield from readers.map(read, prefixes)

    def rows(self, name: str, ids: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """The rows `ids` of a table, (len(ids), width) in dtype; only these rows are read."""

        def stored(name: str) -> mx.array:
            entry = self.entries[name]
            with unchanged([entry]):
                picked = mx.array(_rows(entry, ids)).view(getattr(mx, STORED[entry.dtype]))
            return picked.astype(dtype) if mx.issubdtype(picked.dtype, mx.floating) else picked

        layer = name.removesuffix(".weight")
        if layer not in self.quantizations:
            return stored(name)
        q = self.quantizations[layer]
        weight, scales, *biases = (stored(part) for part in q.packed(name, self.shapes[name]))
        return mx.dequantize(weight, scales, biases[0] if biases else None, **q.to_dict()).astype(dtype)


def _load(entries: Mapping[str, Entry], stream: Where) -> dict[str, mx.array]:
    """The arrays as stored, lazy."""
    files = {entry.file for entry in entries.values()}
    loaded: dict[Path, Any] = {file: mx.load(str(file), stream=stream) for file in files}
    return {name: loaded[entry.file][entry.name] for name, entry in entries.items()}


def _rows(entry: Entry, ids: Sequence[int]) -> np.ndarray:
    """The bytes of some rows of a tensor, (len(ids), bytes per row)."""
    size = entry.nbytes // entry.shape[0]
    if not all(0 <= i < entry.shape[0] for i in ids):
        raise CheckpointError(f"{entry.file}: {entry.name} has rows for ids up to {entry.shape[0] - 1}, got {max(ids)}")
    # Read rather than mapped: a file that is truncated while it is mapped crashes the process.
    with open_regular(entry.file) as stream:
        content = b"".join(os.pread(stream.fileno(), size, entry.offset + i * size) for i in ids)
    if len(content) < size * len(ids):
        raise OSError(f"{entry.file} ends too early")
    return np.frombuffer(content, np.uint8).reshape(len(ids), size)


def find_network(folder: Path, name: str) -> Path:
    """The folder of one network in a model's folder."""
    own = folder / name
    if not own.is_dir():
        raise CheckpointError(f"{folder} has no folder {name}/; is it a complete diffusers folder?")
    return own


def needs_converting(entries: Mapping[str, Entry]) -> bool:
    """Whether some of the tensors have a dtype that only the converter reads: fp8, or one of ComfyUI's formats."""
    return any(entry.dtype in ONLY_CONVERTED or name.endswith(ONLY_COMFYUI) for name, entry in entries.items())


def with_packing(arrays: dict[str, mx.array], quantizations: Mapping[str, Quantization]) -> list[tuple[str, Any]]:
    """The leaves of a tree, with each quantized layer's packing as keyword arguments for MLX's functions."""
    leaves: list[tuple[str, Any]] = list(arrays.items())
    for layer, q in quantizations.items():
        path = f"{layer}." if layer else ""
        if f"{path}scales" in arrays:
            leaves += [(f"{path}packing.{key}", value) for key, value in q.to_dict().items()]
    return leaves


def checked_config(cls: Any, raw_config: dict, file: Path) -> Any:
    """A config as a dataclass; errors name file."""
    try:
        return cls.from_dict(raw_config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
