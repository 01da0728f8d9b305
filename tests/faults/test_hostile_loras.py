"""Malicious LoRA files are checked in the same way as models, and refused by name."""

import json
import struct
from math import prod

import pytest
import tiny

from mlx_zimage.errors import CheckpointError
from mlx_zimage.models import NETWORKS
from mlx_zimage.weights.lora import MAX_LORA_TENSORS, read_lora

CONFIGS = {name: NETWORKS[name].from_dict(tiny.CONFIGS[name]) for name in ("transformer", "text_encoder")}
LAYER = "transformer.layers.0.attention.to_q"
DOWN, UP, ALPHA = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", f"{LAYER}.alpha"
RANK, DIM = 2, tiny.TRANSFORMER["dim"]
BYTES = {"F32": 4, "F16": 2, "I64": 8, "I32": 4, "BOOL": 1, "C64": 8, "U8": 1, "F8_E4M3": 1, "F64": 8}


def write(path, tensors: dict, metadata: dict | None = None):
    """A safetensors file with tensors of zeros: name -> (shape, dtype)."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def lora(**change) -> dict:
    return {DOWN: ([RANK, DIM], "F32"), UP: ([DIM, RANK], "F32")} | change


def read(path, tensors: dict, config: dict | None = None):
    packed = {"lora_adapter_metadata": json.dumps(config)} if config else None
    return read_lora(write(path / "lora.safetensors", tensors, packed), CONFIGS)


def test_a_lora_of_zeros_is_read(tmp_path):
    read(tmp_path, lora(**{ALPHA: ([], "F32")}))
    read(tmp_path, lora(**{ALPHA: ([1], "I64")}))


@pytest.mark.parametrize(
    "tensors",
    [
        lora(**{DOWN: ([0, DIM], "F32"), UP: ([DIM, 0], "F32")}),
        lora(**{DOWN: ([], "F32")}),
        lora(**{DOWN: ([1] * 1000, "F32")}),
        lora(**{DOWN: ([RANK, DIM], "I64")}),
        lora(**{DOWN: ([RANK, DIM], "C64")}),
        lora(**{DOWN: ([RANK, DIM], "BOOL")}),
        lora(**{DOWN: ([RANK, DIM], "F8_E4M3")}),
        lora(**{DOWN: ([RANK, DIM], "F64")}),
        lora(**{ALPHA: ([0], "F32")}),
        lora(**{ALPHA: ([5], "F32")}),
        lora(**{ALPHA: ([2, 2], "F32")}),
        lora(**{f"{LAYER}.dora_scale": ([], "F32")}),
        {f"{LAYER}.lokr_w1_a": ([], "F32"), f"{LAYER}.lokr_w1_b": ([], "F32"), f"{LAYER}.lokr_w2": ([4, 4], "F32")},
        # 4 TB if they were multiplied
        {
            f"{LAYER}.lokr_w1_a": ([2**20, 1], "U8"),
            f"{LAYER}.lokr_w1_b": ([1, 2**20], "U8"),
            f"{LAYER}.lokr_w2": ([1, 1], "F32"),
        },
        {
            f"{LAYER}.lokr_w1_a": ([2**18, 1], "F16"),
            f"{LAYER}.lokr_w1_b": ([1, 2**18], "F16"),
            f"{LAYER}.lokr_w2": ([1, 1], "F32"),
        },
        {
            "transformer.layers.0.attention_norm1.diff": ([DIM], "F32"),
            "transformer.layers.0.attention_norm1.dora_scale": ([DIM], "F32"),
        },
        {f"a{i}.alpha": ([], "F32") for i in range(MAX_LORA_TENSORS + 1)},
        {f"{'.lora_A' * 100}{i}.weight": ([1, 1], "F32") for i in range(10)},
    ],
    ids=lambda tensors: next(iter(tensors))[-30:],
)
def test_tensors_that_do_not_form_a_layers_difference_are_refused(tmp_path, tensors):
    with pytest.raises(CheckpointError, match=r"lora\.safetensors"):
        read(tmp_path, tensors)


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"(a+)+$": 1}},  # takes forever on a layer called aaaa...
        {"alpha_pattern": {".*.*.*.*.*.*.*x": 1}},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"": 1}},
        {"alpha_pattern": [1]},
        {"alpha_pattern": "x"},
        {"alpha_pattern": {"to_q": "1"}},
        {"alpha_pattern": {"to_q": True}},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": [1]},
        {"lora_alpha": 10**99, "nested": [[[[]]]] * 10**6},
    ],
    ids=lambda config: json.dumps(config)[:40],
)
def test_a_config_in_a_header_is_names_and_numbers(tmp_path, config):
    with pytest.raises(CheckpointError, match=r"lora\.safetensors") as caught:
        read(tmp_path, lora(), {f"transformer.{key}": value for key, value in config.items()})
    assert len(str(caught.value)) < 600


def test_patterns_that_are_names_apply_to_the_layers_that_end_in_them(tmp_path):
    for pattern in ("to_q", "attention.to_q", r"layers\.0\.attention\.to_q", "^transformer.layers.0.attention.to_q$"):
        read_in = read(tmp_path, lora(), {"transformer.lora_alpha": 6, "transformer.alpha_pattern": {pattern: 4}})
        (delta,) = read_in.deltas["transformer"].values()
        assert delta.scale == 4 / RANK
    (delta,) = read(tmp_path, lora(), {"transformer.lora_alpha": 6}).deltas["transformer"].values()
    assert delta.scale == 6 / RANK
