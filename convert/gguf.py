"""GGUF files: parsing the header, and reading rows. Nothing here is specific to Z-Image.

Source: ggml's docs/gguf.md. A row is a whole number of blocks; a block is a small record.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError
from ..untrusted import open_regular
from ..weights.headers import MAX_NAME, MAX_TENSORS
from ..weights.unchanged import Version, unchanged
from .disk import read_range
from .gguf_blocks import BLOCK_KINDS, OTHER_BLOCK_KINDS, BlockKind

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# types of metadata values: type number -> struct format; 8 is text, 9 a list
SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
MAX_GGUF_HEADER = 2**26  # bytes: Qwen3's tokenizer takes 6 MB
MAX_TEXTS = 500_000  # in lists: Qwen3's tokenizer has 152,000 tokens and as many merges
GGUF_AXES = 4
MAX_NESTED = 3  # lists in lists, which no known program writes
KNOWN = ("general.alignment", "split.no", "split.count")  # the metadata that is used
# How llama.cpp and the gguf package name the parts of a split file.
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFTensor:
    """The location of a tensor in its file. shape is in row-major order, unlike in GGUF itself."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: BlockKind
    offset: int
    version: Version  # of the file, when its header was read

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.kind.values * self.kind.block_bytes


def read_tensors(file: Path) -> dict[str, GGUFTensor]:
    """The tensors of a GGUF file by name, checked to be inside it; of all parts if the file is split."""
    number, count, tensors = _read_part(file)
    for other in _other_parts(file, number, count):
        if not other.is_file():
            raise CheckpointError(f"{file} is part {number} of {count}, but {other.name} is missing; download it")
        _, _, more = _read_part(other)
        if twice := tensors.keys() & more.keys():
            raise CheckpointError(f"{other}: {min(twice)} is also in another part; download all parts again")
        tensors |= more
    return tensors


def _read_part(file: Path) -> tuple[int, int, dict[str, GGUFTensor]]:
    """The number of this part, the number of parts, and the tensors in this one."""
    version = Version.of(file)  # before its header, so that no later change is missed
    try:
        with open_regular(file) as stream:
            header = _Header(file, stream, version)
            tensors = header.tensors()
            return header.whole("split.no", 0) + 1, header.whole("split.count", 1), tensors
    except (struct.error, ValueError) as error:
        raise CheckpointError(f"{file} is not a complete GGUF file ({error}); download it again") from error


def _other_parts(file: Path, number: int, count: int) -> list[Path]:
    if count <= 1:
        return []
    named = PART.fullmatch(file.name)
    if not named or (int(named["number"]), int(named["count"])) != (number, count):
        raise CheckpointError(
            f"{file} is part {number} of {count}; rename the parts so that they can be found, "
            f"this one to NAME-{number:05}-of-{count:05}.gguf"
        )
    names = (f"{named['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1) if i != number)
    return [file.with_name(name) for name in names]


@np.errstate(over="ignore", invalid="ignore")  # read_rows refuses what is not finite
def read_floats(tensor: GGUFTensor, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a tensor's first axis, float32."""
    kind = tensor.kind
    row_values = prod(tensor.shape[1:])
    first, last = start * row_values, stop * row_values
    before = first // kind.values  # blocks; a tensor of one axis may start and stop within one
    blocks = -(-last // kind.values) - before
    with unchanged([tensor]):
        raw = read_range(tensor.file, tensor.offset + before * kind.block_bytes, blocks * kind.block_bytes)
    values = kind.decode(raw.reshape(blocks, kind.block_bytes)).reshape(-1)
    first, last = first - before * kind.values, last - before * kind.values
    return values[first:last].reshape(stop - start, *tensor.shape[1:])


class _Header:
    """Reads from the start of a file; ValueError or struct.error if it is not GGUF, or exceeds this module's limits."""

    def __init__(self, file: Path, stream: BinaryIO, version: Version):
        self.file, self.stream, self.version = file, stream, version
        self.end = min(version.size, MAX_GGUF_HEADER)
        self.at = self.texts = 0
        self.metadata: dict[str, Any] = {}

    def tensors(self) -> dict[str, GGUFTensor]:
        if self.read(4) != MAGIC:
            raise ValueError("it does not start with GGUF")
        version, tensor_count, pair_count = self.number("I"), self.number("Q"), self.number("Q")
        if version in [int.from_bytes(known.to_bytes(4, "big"), "little") for known in VERSIONS]:
            raise CheckpointError(f"{self.file} is a big-endian GGUF file; download a little-endian one")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, expected 2 or 3")
        if max(tensor_count, pair_count) > MAX_TENSORS:
            raise ValueError(
                f"its header declares {tensor_count} tensors and {pair_count} metadata values, expected at most "
                f"{MAX_TENSORS} of each"
            )
        for _ in range(pair_count):
            key, kind = self.name(), self.number("I")
            value = self.value(kind)
            if key in KNOWN:
                self.metadata[key] = value
        alignment = self.whole("general.alignment", 32)
        if alignment <= 0:
            raise ValueError(f"alignment {alignment} is not a positive integer")
        found = [self.tensor() for _ in range(tensor_count)]
        base = self.at + -self.at % alignment
        tensors = {}
        for name, shape, number, offset in found:
            if number not in BLOCK_KINDS:
                kind = OTHER_BLOCK_KINDS.get(number, f"number {number}, which is unknown")
                raise CheckpointError(
                    f"{self.file}: {name:.80} has type {kind}, expected one of "
                    f"{', '.join(kind.name for kind in BLOCK_KINDS.values())}; download another quantization"
                )
            tensor = GGUFTensor(self.file, name, shape, BLOCK_KINDS[number], base + offset, self.version)
            row = shape[-1] if shape else 1
            if not shape or min(shape) < 1 or row % tensor.kind.values:
                raise ValueError(f"{name:.80} of shape {shape} is not a whole number of {tensor.kind.name} blocks")
            if tensor.offset + tensor.nbytes > self.version.size:
                raise ValueError(
                    f"{name:.80} ends at byte {tensor.offset + tensor.nbytes}, the file at {self.version.size}"
                )
            if name in tensors:
                raise ValueError(f"{name:.80} is stored twice")
            tensors[name] = tensor
        for tensor, after in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
            if tensor.offset + tensor.nbytes > after.offset:
                raise ValueError(f"{tensor.name:.80} and {after.name:.80} overlap")
        return tensors

    def whole(self, key: str, default: int) -> int:
        value = self.metadata.get(key, default)
        if not isinstance(value, int):
            raise ValueError(f"{key} is not a whole number")
        return value

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.name(), self.number("I")
        if axes > GGUF_AXES:
            raise ValueError(f"{name:.80} has {axes} axes, expected at most {GGUF_AXES}")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def read(self, count: int) -> bytes:
        self.skip(count, seek=False)
        return self.stream.read(count)

    def skip(self, count: int, seek: bool = True) -> None:
        if count > self.end - self.at:
            raise ValueError(
                f"{count} bytes at {self.at} extend past the end of the file or the {MAX_GGUF_HEADER}-byte limit"
            )
        self.at += count
        if seek:
            self.stream.seek(count, 1)

    def number(self, form: str):
        (value,) = struct.unpack(f"<{form}", self.read(struct.calcsize(f"<{form}")))
        return value

    def name(self) -> str:
        """A key or a tensor's name. No other text is decoded: megabytes of it would take several times as much
        memory."""
        length = self.number("Q")
        if length > MAX_NAME:
            raise ValueError(f"a name of {length:,} bytes at {self.at:,}, expected at most {MAX_NAME}")
        return self.read(length).decode()

    def value(self, kind: int, depth: int = 0):
        """Read a metadata value; texts and lists are skipped and give None."""
        if kind == TEXT:
            self.skip(self.number("Q"))
            return None
        if kind != LIST:
            if kind not in SCALARS:
                raise ValueError(f"unknown metadata type {kind}")
            return self.number(SCALARS[kind])
        item, count = self.number("I"), self.number("Q")
        if item in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[item]}"))
            return None
        self.texts += count
        if self.texts > MAX_TEXTS or depth == MAX_NESTED:
            raise ValueError(
                f"a list of {count} items, nested in {depth} others; expected at most {MAX_TEXTS} items in all, and "
                f"{MAX_NESTED} levels"
            )
        if item == TEXT:
            self.skip_texts(count)
        else:
            for _ in range(count):
                self.value(item, depth + 1)
        return None

    def skip_texts(self, count: int) -> None:
        """Skip `count` texts, in a tenth of the time that `skip` takes for them."""
        read, at = self.stream.read, self.at
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            at += 8 + length
            if at > self.end:
                break
            read(length)
        self.skip(at - self.at, seek=False)
