"""Malicious JSON is refused before it is parsed, or with an error that names what is wrong in it."""

import json
import os

import pytest
from compare import refusal
from measure import measured

from mlx_zimage.untrusted import MAX_BYTES, MAX_DEPTH, parse_json, read_bytes

HOSTILE = {
    "nested lists": lambda: "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "nested objects": lambda: '{"a":' * 100 + "1" + "}" * 100,
    "nested past the stack": lambda: "[" * 10**6,
    "digits": lambda: '{"dim": ' + "9" * 5000 + "}",
    "more digits": lambda: "[-" + "1" * 10**6 + "]",
    "empty lists": lambda: "[" + "[]," * 2_000_000 + "[]]",
    "a key twice": lambda: '{"dim": 48, "dim": 64}',
    "small objects": lambda: "[" + '{"a":1},' * 800_000 + "1]",
    "keys": lambda: "{" + ",".join(f'"{i}":{{}}' for i in range(600_000)) + "}",
}


@pytest.mark.parametrize("write", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("kind", [str, str.encode], ids=["text", "bytes"])
def test_hostile_json_is_a_value_error(write, kind):
    with pytest.raises(ValueError, match=r"^it "):
        parse_json(kind(write()))


def test_a_full_size_model_is_within_the_limits():
    index = {
        "weight_map": {f"model.layers.{i}.self_attn.q_proj.weight": "model-00001.safetensors" for i in range(5000)}
    }
    assert parse_json(json.dumps(index)) == index
    # as transformers writes it into tokenizer_config.json
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}')["model_max_length"] == int(1e30)


def test_the_largest_json_that_is_parsed_takes_less_than_200_mb():
    work = """
for item in ("[],", '{"a":1},', '{},', "1.5,", '"a",'):
    each = sum(map(item.count, ",[{"))
    assert len(parse_json("[" + item * (MAX_VALUES // each - 2) + "0]")) > 10**5
"""
    _, grown = measured("from mlx_zimage.untrusted import MAX_VALUES, parse_json", work)
    assert grown < 200e6


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_folder_with_a_hostile_config_is_refused_by_its_name(folder, name):
    (folder / name).write_text(HOSTILE["digits"]())
    assert f"{folder / name} is not valid JSON (it has a number of 5,000 digits)" in refusal(folder)
    (folder / name).write_bytes(b"[" * (MAX_BYTES + 1))
    assert f"{folder / name} cannot be read: larger than {MAX_BYTES:,} bytes" in refusal(folder)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_bytes(path)
