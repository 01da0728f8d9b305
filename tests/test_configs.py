"""Config files: damaged ones and those of other models are refused by name."""

import json

import pytest
from compare import refusal
from tiny import CONFIGS

from mlx_zimage.convert import convert
from mlx_zimage.models import NETWORKS


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"<html>", b""])
@pytest.mark.parametrize("component", NETWORKS)
def test_a_damaged_config_is_named(folder, component, content):
    file = folder / component / "config.json"
    file.write_bytes(content)
    assert str(file) in refusal(folder)


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("transformer", {"dim": "48"}),
        ("transformer", {"n_heads": 0}),
        ("transformer", {"axes_dims": 16}),
        ("transformer", {"axes_dims": [4, 6, 8]}),  # more than a head's dimension
        ("transformer", {"qk_norm": False}),
        ("text_encoder", {"hidden_size": None}),
        ("text_encoder", {"hidden_size": "64"}),
        ("text_encoder", {"rms_norm_eps": "x"}),
        ("text_encoder", {"rope_parameters": "x"}),
        ("text_encoder", {"num_key_value_heads": 3}),
        ("vae", {"scaling_factor": 0}),
        ("vae", {"norm_num_groups": 7}),
        ("vae", {"block_out_channels": None}),
        ("vae", {"block_out_channels": []}),
    ],
    ids=str,
)
def test_a_config_of_another_architecture_is_named(folder, component, change):
    file = folder / component / "config.json"
    file.write_text(json.dumps(CONFIGS[component] | change))
    message = refusal(folder)
    assert str(file.parent) in message
    assert "config.json" in message


@pytest.mark.parametrize("content", ["{}", '{"_class_name": "FluxPipeline"}'])
def test_another_pipelines_folder_is_refused(folder, content):
    (folder / "model_index.json").write_text(content)
    assert "; expected ZImagePipeline" in refusal(folder)


def test_a_wrong_description_of_a_quantized_layer_names_the_config(tmp_path):
    out = convert("pocket", tmp_path / "packed", bits=4)
    file = out / "transformer" / "config.json"
    config = json.loads(file.read_text())
    for block in (4, [1], {"bits": 7, "group_size": 64}, {"bits": 4, "group_size": 0}, {"bits": 4}):
        file.write_text(json.dumps(config | {"quantization": block}))
        assert str(file) in refusal(out)
