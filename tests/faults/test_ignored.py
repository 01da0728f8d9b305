"""Tensors that no network reads are checked like all others: the whole file goes through MLX's reader."""

import json
import struct
from math import prod
from pathlib import Path

import pytest
import tiny
from compare import refusal

from mlx_zimage.convert import convert
from mlx_zimage.convert.verify import verify
from mlx_zimage.errors import CheckpointError

HEAD, LAST = "lm_head.weight", "model.layers.3.mlp.up_proj.weight"
BYTES = {"F64": 8, "I64": 8, "BOOL": 1, "C64": 8, "BF16": 2, "F32": 4}


def put(folder: Path, name: str, shape: list[int], dtype: str = "BF16", nbytes: int | None = None) -> None:
    """Add a tensor of zeros to the text encoder, or replace the one of that name."""
    index = folder / "text_encoder" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    file = index.with_name(listed["weight_map"].setdefault(name, min(listed["weight_map"].values())))
    index.write_text(json.dumps(listed))
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header, tensors = {}, b""
    for key, entry in json.loads(content[8:start]).items():
        if key not in ("__metadata__", name):
            begin, end = entry["data_offsets"]
            header[key] = entry | {"data_offsets": [len(tensors), len(tensors) + end - begin]}
            tensors += content[start + begin : start + end]
    nbytes = BYTES[dtype] * prod(shape) if nbytes is None else nbytes
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(tensors), len(tensors) + nbytes]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + tensors + bytes(nbytes))


@pytest.mark.parametrize("name", [HEAD, LAST, "norm_final.weight", "model.rotary_emb.inv_freq", "scaled_fp8"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [([1] * 1000, "BF16"), ([1] * 9, "F32"), ([8], "F64"), ([8], "F4")],
    ids=["1000", "9", "F64", "F4"],
)
def test_what_mlx_cannot_read_is_refused_whatever_its_name(folder, tmp_path, name, shape, dtype):
    put(folder, name, shape, dtype, 4 if dtype == "F4" else None)
    message = refusal(folder)
    assert name in message or "1000" in message
    assert verify(folder)
    with pytest.raises(CheckpointError):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [HEAD, LAST])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ([], "BF16"),
        ([0], "BF16"),
        ([5, 0], "BF16"),
        ([3], "I64"),
        ([40, 512], "BF16"),
        ([512, 40], "BOOL"),
        ([1], "C64"),
    ],
    ids=str,
)
def test_a_spare_tensor_has_the_shape_and_the_dtype_that_it_must_have(folder, tmp_path, name, shape, dtype):
    put(folder, name, shape, dtype)
    message = refusal(folder)
    assert f"{name} is" in message
    assert name in verify(folder)[0]
    with pytest.raises(CheckpointError, match=name):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.layers.3.evil.weight", "lm_head.bias", "model.layers.4.mlp.up_proj.weight"])
def test_a_name_that_no_network_has_is_unexpected(folder, name):
    put(folder, name, [8])
    assert f"unexpected weights (1): {name}" in refusal(folder)


def test_a_correct_head_and_last_layer_are_accepted(folder, tmp_path):
    put(folder, HEAD, [tiny.TEXT_ENCODER["vocab_size"], tiny.TEXT_ENCODER["hidden_size"]])
    put(folder, LAST, [tiny.TEXT_ENCODER["intermediate_size"], tiny.TEXT_ENCODER["hidden_size"]])
    assert verify(folder) == []
    assert verify(convert(folder, tmp_path / "out")) == []
