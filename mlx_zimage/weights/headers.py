"""The only way into safetensors files: a header's size is checked, safetensors parses it, and its entries are checked.

Models, LoRAs and our own cache all pass through here before MLX reads their tensors: MLX accepts negative and
overlapping ranges, takes 20 seconds for 400,000 tensors, and aborts the process on 1000 axes.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..untrusted import brief, open_regular, parse_json

MAX_HEADER = 8 * 2**20  # bytes: a full-size model's is 200 KB, and trainers write megabytes of settings into a LoRA
MAX_TENSORS = 20_000  # all networks in one file, with every layer quantized, have 4000
MAX_AXES = 8  # convolutions have 4
MAX_LENGTH = 2**40  # of an axis
MAX_NAME = 256  # characters of a tensor's name; the longest known have 120
# What MLX reads, and F8_E5M2, which only the converter reads. One tensor of any other dtype keeps MLX from reading any
# tensor in the file.
DTYPES = (
    *("BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "C64"),
    *("F8_E4M3", "F8_E8M0", "F8_E5M2"),
)
METADATA = "__metadata__"

Header = dict[str, dict[str, Any]]  # dtype, shape and data_offsets, by tensor


def read(file: Path) -> tuple[Header, dict[str, str], int]:
    """The checked tensors and the metadata of a file's header, and where its data begins.

    Raises OSError if the file cannot be read, and ValueError if it is not a safetensors file.
    """
    str(file).encode()  # MLX cannot open a file whose name is not text
    with open_regular(file) as stream:
        length = length_of(stream.read(8))
        header, metadata = _parsed(stream.read(length))
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    check_tensors(header)
    return header, metadata, 8 + length


def length_of(start: bytes) -> int:
    """The length in bytes of the header of a file that begins with these 8 bytes; ValueError if it is longer than any
    model needs."""
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise ValueError(f"header of {length:,} bytes, expected at most {MAX_HEADER:,}")
    return length


def parse(content: bytes) -> Header:
    """The checked tensors of a header, without its length prefix, of a file on another machine; raises ValueError."""
    header, _ = _parsed(content)
    check_tensors(header)
    return header


def _parsed(content: bytes) -> tuple[Header, dict[str, str]]:
    """The tensors and the metadata of a header; only the number of tensors is checked."""
    header = parse_json(content)
    if not isinstance(header, dict):
        raise ValueError("header is not an object")
    metadata = header.pop(METADATA, None) or {}
    check_count(header)
    return header, metadata


def check_count(header: Header) -> None:
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header):,} tensors, expected at most {MAX_TENSORS:,}")


def check_tensors(header: Header) -> None:
    """ValueError unless each tensor has a shape that every library can take, and a range of bytes."""
    for name, tensor in header.items():
        if len(name) > MAX_NAME:
            raise ValueError(f"{name:.80} is a name of {len(name):,} characters, expected at most {MAX_NAME}")
        if not isinstance(tensor, dict) or not tensor.keys() >= {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name:.80} is {brief(tensor)}, expected its dtype, shape and data_offsets")
        shape, offsets = tensor["shape"], tensor["data_offsets"]
        if tensor["dtype"] not in DTYPES:
            raise ValueError(f"{name:.80} is {tensor['dtype']}, which MLX cannot read")
        if not _is_list(shape, MAX_AXES) or not all(_is_count(n) and n <= MAX_LENGTH for n in shape):
            raise ValueError(
                f"{name:.80} has shape {shape!r:.80}, expected at most {MAX_AXES} axes, each of up to {MAX_LENGTH:,}"
            )
        if not _is_list(offsets, 2) or len(offsets) < 2 or not all(map(_is_count, offsets)) or offsets[0] > offsets[1]:
            raise ValueError(f"{name:.80} has data_offsets {offsets!r:.80}, expected two offsets: start and end")
        nbytes, expected = offsets[1] - offsets[0], prod(shape) * _item_bytes(tensor["dtype"])
        if nbytes != expected:
            raise ValueError(
                f"{name:.80} of shape {shape} and dtype {tensor['dtype']} has {nbytes:,} bytes, expected {expected:,}"
            )


def _item_bytes(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)  # the first number in F8_E4M3 too; BOOL has none
    return int(bits[0]) // 8 if bits else 1


def _is_list(value: object, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # True is an int, too
