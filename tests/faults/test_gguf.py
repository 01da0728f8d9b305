"""Malicious GGUF files are refused by name, quickly and in little memory."""

import os
import struct

import pytest
from lanes import slow
from measure import measured

from mlx_zimage.convert import gguf
from mlx_zimage.convert.sources import open_source
from mlx_zimage.errors import CheckpointError

U32, TEXT, LIST = 4, 8, 9


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def items(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(pairs=(), tensors=(), version: int = 3) -> bytes:
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    return start + b"".join(pairs) + b"".join(tensors)


HOSTILE = {
    "lists in lists past Python's stack": lambda: header([pair(b"a", LIST, items(LIST, 1) * 100_000)]),
    "lists in lists": lambda: header([pair(b"a", LIST, items(LIST, 1) * 4 + items(U32, 0))]),
    "2**40 empty lists": lambda: header([pair(b"a", LIST, items(LIST, 2**40))]),
    "2**40 empty texts": lambda: header([pair(b"a", LIST, items(TEXT, 2**40))]),
    "a million lists of a million": lambda: header([pair(b"a", LIST, items(LIST, 10**6, items(LIST, 10**6)))]),
    "100,000 tensors": lambda: header(tensors=[tensor(b"%d" % i, 1) for i in range(100_000)]),
    "100,000 pairs": lambda: header([pair(b"a", U32, bytes(4))] * 100_000),
    "2**60 tensors": lambda: b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
    "a text of 2**63 bytes": lambda: header([struct.pack("<Q", 2**63)]),
    "a list of 2**63 numbers": lambda: header([pair(b"a", LIST, items(U32, 2**63))]),
    "an axis of 2**63": lambda: header(tensors=[tensor(b"a", 2**63)]),
    "2**64 values": lambda: header(tensors=[tensor(b"a", 2**32, 2**32)]),
    "1000 axes": lambda: header(tensors=[tensor(b"a", *[1] * 1000)]),
    "a tensor behind the end": lambda: header(tensors=[tensor(b"a", 1, offset=2**64 - 1)]),
    "no axes": lambda: header(tensors=[tensor(b"a")]),
    "an alignment of 0": lambda: header([pair(b"general.alignment", U32, bytes(4))]),
    "an alignment in words": lambda: header([pair(b"general.alignment", TEXT, text(b"32"))]),
    "an infinite number of parts": lambda: header([pair(b"split.count", 6, struct.pack("<f", float("inf")))]),
    "a list of parts": lambda: header([pair(b"split.no", LIST, items(U32, 0))]),
    "2**40 parts": lambda: header([pair(b"split.count", 10, struct.pack("<Q", 2**40))]),
    "an unknown type": lambda: header([pair(b"a", 99, b"")]),
    "a name that is not UTF-8": lambda: header(tensors=[tensor(b"\xff", 1)]),
    "a name of 64 MB": lambda: header(tensors=[tensor(b"a" * (gguf.MAX_GGUF_HEADER - 100), 1)]),
    "a key of 64 MB": lambda: header([pair(b"a" * (gguf.MAX_GGUF_HEADER - 100), U32, bytes(4))]),
    "an escape in a name": lambda: header(tensors=[tensor(b"\x1b[2J" * 1000, 0)]),
    "no header": lambda: b"GGUF",
}


@pytest.mark.parametrize("write", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_gguf_file_is_refused_by_name(tmp_path, write):
    file = tmp_path / "dit.gguf"
    file.write_bytes(write())
    with pytest.raises(CheckpointError, match=r"^\S*dit\.gguf is .{,600}$"):
        open_source(file, base="pocket")


@pytest.mark.parametrize("item", [TEXT, LIST, U32])
def test_a_header_as_long_as_its_file_is_bounded(tmp_path, item):
    """A sparse file has room for anything: 2**33 texts of length 0, say."""
    file = tmp_path / "dit.gguf"
    file.write_bytes(header([pair(b"a", LIST, items(item, 2**33))]))
    os.truncate(file, 2**40)
    with pytest.raises(CheckpointError, match="not a complete GGUF file"):
        gguf.read_tensors(file)


def test_a_tokenizer_larger_than_qwen3s_is_within_the_limits(tmp_path):
    tokens = items(TEXT, 200_000, text(b"a token") * 200_000)
    merges = items(TEXT, 200_000, text(b"two tokens") * 200_000)
    file = tmp_path / "dit.gguf"
    file.write_bytes(
        header([pair(b"tokens", LIST, tokens), pair(b"merges", LIST, merges)], [tensor(b"a", 1)]) + bytes(99)
    )
    assert list(gguf.read_tensors(file)) == ["a"]


TEXTS = {
    "a value": lambda wide: header([pair(b"a", TEXT, text(wide))]),
    "a value that counts parts": lambda wide: header([pair(b"split.count", TEXT, text(wide))]),
    "a key": lambda wide: header([pair(wide, U32, bytes(4))]),
    "a name": lambda wide: header(tensors=[tensor(wide, 1)]),
    "a text in a list": lambda wide: header([pair(b"a", LIST, items(TEXT, 1, text(wide)))]),
}


@pytest.mark.parametrize(
    "write", [write if name == "a name" else slow(write) for name, write in TEXTS.items()], ids=list(TEXTS)
)
def test_64_mb_of_text_takes_little_memory(tmp_path, write):
    # a single wide character makes every character of a Python string take four bytes
    wide = "🦊".encode().ljust(gguf.MAX_GGUF_HEADER - 100, b"a")
    file = tmp_path / "dit.gguf"
    file.write_bytes(write(wide))
    imports = "from mlx_zimage.convert.gguf import read_tensors; from mlx_zimage.errors import CheckpointError"
    work = """
from pathlib import Path
try:
    read_tensors(Path(sys.argv[1]))
except CheckpointError as error:
    assert len(str(error)) < 500
"""
    _, grown = measured(imports, work, file)
    assert grown < 200e6
