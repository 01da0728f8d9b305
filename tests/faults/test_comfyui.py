"""Damaged marks, metadata and scales of ComfyUI's quantized layers are refused by name, never misread."""

import json
from math import prod

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from comfyui_files import F8_NAMES, FORMS, mixed, random_layer, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lanes import slow

from mlx_zimage.cli import main
from mlx_zimage.convert.comfyui import DEQUANTIZERS
from mlx_zimage.convert.files import stored_weights
from mlx_zimage.errors import CheckpointError, NumericsError
from mlx_zimage.weights.component import read_header, read_metadata

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "U32": 4}
LAYER = "layers.0.feed_forward.w1"
NUMBERS = st.integers(-1, 300) | st.sampled_from([0, 1, 4, 8, 16, 64, 256, 1024, 10**30]) | st.floats() | st.booleans()
VALUES = NUMBERS | st.none() | st.text(max_size=5) | st.lists(NUMBERS, max_size=2)
SETTINGS = st.dictionaries(
    st.sampled_from(["format", "convrot", "convrot_groupsize", "group_size", "params", "linear_dtype"]),
    st.sampled_from(list(DEQUANTIZERS)) | VALUES | st.dictionaries(st.sampled_from(["convrot", "group_size"]), VALUES),
)


def stored(parts, form):
    return {part: ("F8_E4M3", a) if (form, part) in F8_NAMES else a for part, a in parts.items()}


def reads_or_refuses(file):
    """The layer is refused by name, or its rows can be read and are as wide as its shape says."""
    try:
        tensor = stored_weights(read_header(file), [read_metadata(file)], "file")[f"{LAYER}.weight"]
        for start, stop in ((0, 1), (tensor.shape[0] - 1, tensor.shape[0])):
            assert tensor.read(start, stop).shape == (stop - start, *tensor.shape[1:])
    except NumericsError:
        pass
    except CheckpointError as error:
        assert "file: " in str(error) and len(str(error)) < 1000


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("layer") / "layer.safetensors"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(FORMS), changed=SETTINGS, listed=st.booleans(), kept=st.booleans())
def test_settings_of_any_kind_are_read_or_refused(file, form, changed, listed, kept):
    own, parts, _ = random_layer(form, 7, 64, np.random.default_rng(0))
    mark = (own | changed) if kept else changed
    tensors = {f"{LAYER}.{part}": content for part, content in stored(parts, form).items()}
    metadata = {"_quantization_metadata": json.dumps({"layers": {LAYER: mark}})} if listed else None
    if not listed:
        tensors[f"{LAYER}.comfy_quant"] = np.frombuffer(json.dumps(mark).encode(), np.uint8)
    reads_or_refuses(save(file, tensors, metadata))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), form=st.sampled_from(FORMS))
def test_parts_of_any_shape_and_dtype_are_read_or_refused(file, data, form):
    own, parts, _ = random_layer(form, 7, 64, np.random.default_rng(0))
    content = stored(parts, form) | {"comfy_quant": np.frombuffer(json.dumps(own).encode(), np.uint8)}
    tensors = {f"{LAYER}.{part}": array for part, array in content.items()}
    name, dtype = data.draw(st.sampled_from(list(tensors))), data.draw(st.sampled_from(list(ITEM_BYTES)))
    lengths = st.lists(st.integers(0, 130) | st.sampled_from([7, 64]), max_size=3)
    shape = data.draw(lengths.filter(lambda shape: prod(shape) < 20_000))
    size = prod(shape) * ITEM_BYTES[dtype]
    tensors[name] = (dtype, np.frombuffer(np.random.default_rng(1).bytes(size), np.uint8))
    reads_or_refuses(save(file, tensors, shapes={name: shape}))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=40) | st.recursive(VALUES, lambda x: st.dictionaries(st.text(max_size=8), x)).map(json.dumps)
)
def test_metadata_of_any_kind_is_read_or_refused(file, text):
    _, parts, _ = random_layer("int8", 7, 64, np.random.default_rng(0))
    tensors = {f"{LAYER}.{part}": content for part, content in parts.items()}
    reads_or_refuses(save(file, tensors, {"_quantization_metadata": text}))


DAMAGED = {
    "an unknown format": ({"format": "awq_w4a16"}, {}, "declares 'awq_w4a16', expected float8_e4m3fn or"),
    "no format": ({"formats": "nvfp4"}, {}, "is not valid (it declares no format)"),
    "a layer that is not there": (
        {"format": "nvfp4", "at": "layers.99.x"},
        {},
        "lists 'layers.99.x', which is not in the file",
    ),
    "another format's": ({"format": "nvfp4"}, {}, "w1.weight has dtype I8, expected U8"),
    "no scale": (
        {},
        {"weight_scale": None},
        "is int8_tensorwise, but layers.0.feed_forward.w1.weight_scale is missing",
    ),
    "scales for other rows": (
        {},
        {"weight_scale": np.ones(5, np.float32)},
        "w1.weight_scale has shape (5,), expected () or (1,) or (1, 1) or (512,)",
    ),
    "whole numbers as scales": (
        {},
        {"weight_scale": np.ones(512, np.int8)},
        "w1.weight_scale has dtype I8, expected F32",
    ),
    "a group of 100 columns": (
        {"convrot": True, "convrot_groupsize": 100},
        {},
        "convrot_groupsize 100, expected a power",
    ),
    "a group of 256 columns": ({"convrot": True}, {}, "convrot_groupsize 256, expected a power of 4 that divides 192"),
    "a rotation in words": ({"convrot": "false"}, {}, "declares convrot 'false', expected true or false"),
    "settings in a list": ({"params": [1]}, {}, "declares params [1], expected an object"),
    "a group in words": ({"convrot": True, "convrot_groupsize": "64"}, {}, "convrot_groupsize '64', expected a whole"),
}


CASES = [(damage, True) for damage in DAMAGED] + [slow(damage, False) for damage in DAMAGED if "there" not in damage]


@pytest.mark.parametrize(("damage", "listed"), CASES)
def test_damage_ends_a_conversion_with_exit_code_4_and_its_name(tmp_path, damage, listed):
    changed, parts, message = DAMAGED[damage]
    own = {"format": "int8_tensorwise"} | changed
    own = own if "formats" not in changed else changed
    at = own.pop("at", LAYER)
    path, _ = mixed(tmp_path / "good.safetensors", forms=("int8",))
    tensors = {name: np.array(a) for name, a in mx.load(str(path)).items()}
    for part, content in parts.items():
        tensors.pop(f"{LAYER}.{part}")
        if content is not None:
            tensors[f"{LAYER}.{part}"] = content
    metadata = {"_quantization_metadata": json.dumps({"layers": {at: own}})} if listed else None
    if not listed:
        tensors[f"{LAYER}.comfy_quant"] = np.frombuffer(json.dumps(own).encode(), np.uint8)
    bad = save(tmp_path / "bad.safetensors", tensors, metadata)
    result = CliRunner().invoke(main, ["convert", str(bad), str(tmp_path / "out"), "--base", "pocket"])
    assert result.exit_code == 4 and message in result.output, result.output
    assert not (tmp_path / "out").exists()
