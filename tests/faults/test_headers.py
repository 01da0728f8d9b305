"""Malicious safetensors files are refused by name, from their headers, before anything is allocated for them."""

import json
import os
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from compare import refusal
from lanes import slow

from mlx_zimage.cli.generate import DEFAULT_MODEL
from mlx_zimage.convert.verify import verify
from mlx_zimage.errors import CheckpointError
from mlx_zimage.train.output import _checksum, read_state
from mlx_zimage.weights import component, headers
from mlx_zimage.weights.component import read_header, read_weight_map


def safetensors(header: object, nbytes: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(nbytes)


def tensor(shape, begin=0, end=4, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@cache
def many(count: int) -> bytes:
    return b"{%s}" % b",".join(b'"a%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(count))


def deep(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HOSTILE = {
    # MLX reads these, or ends the process
    "junk behind": safetensors({"a": tensor([1])}, 8),
    "negative shape": safetensors({"a": tensor([-1, -1])}, 4),
    "overlap": safetensors({"a": tensor([1]), "b": tensor([1])}, 4),
    "listed twice": safetensors(TWICE, 4),
    "an axis past 2**31": safetensors({"a": tensor([2**33, 2**33], 0, 0)}),
    "an empty axis past 2**63": safetensors({"a": tensor([0, 2**64], 0, 0)}),
    "1000 axes": safetensors({"a": tensor([1] * 1000)}, 4),
    # too much for any parser
    "400,000 tensors": 400_000,
    "20,001 tensors": 20_001,
    "a header of 100 MB": struct.pack("<Q", 100 * 2**20),
    "a header of 2**64 bytes": struct.pack("<Q", 2**64 - 1),
    "nested": safetensors(deep(100)),
    "nested past Python's stack": safetensors(deep(100_000)),
    "5000 digits": safetensors(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 5000), 4),
    "a million values": safetensors(b'{"__metadata__":[' + b"0," * 10**6 + b"0]}"),
    # not what a header is
    "a list": safetensors([1, 2]),
    "not UTF-8": safetensors(b'{"\xff":1}'),
    "a tensor that is a number": safetensors({"a": 1}),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "offsets in words": safetensors({"a": tensor([1], "0", "4")}, 4),
    "an unknown dtype": safetensors({"a": tensor([1], dtype="F31")}, 4),
}


def write(file: Path, name: str) -> None:
    content = HOSTILE[name]
    file.write_bytes(safetensors(many(content)) if isinstance(content, int) else content)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_by_name(tmp_path, name):
    file = tmp_path / "model.safetensors"
    write(file, name)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file \(.{,500}\)"):
        read_header(file)


@pytest.mark.parametrize("name", ["400,000 tensors", "a header of 100 MB", "a million values", "nested"])
def test_a_header_beyond_the_limits_never_reaches_a_library(tmp_path, monkeypatch, name):
    monkeypatch.setattr(headers, "safe_open", lambda *args, **options: pytest.fail("opened"))
    write(tmp_path / "model.safetensors", name)
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "model.safetensors")


def test_a_hostile_training_state_is_refused_by_name(tmp_path):
    file = tmp_path / "dog.state.safetensors"
    named = [f"{part}/layers.0/to_q/{name}" for part in ("factors", "first", "second") for name in ("down", "up")]
    new = {"layers.0": {"to_q": {"down": mx.zeros((1,)), "up": mx.zeros((1,))}}}
    zeros, run = dict.fromkeys(named, mx.zeros((1, 1))), {"run": "{}", "step": "1"}
    for shape, fault in (([1] * 1000, "at most 8 axes"), ([1, 1], "expected shapes")):
        tensors = {name: tensor(shape, 4 * i, 4 * i + 4) for i, name in enumerate(named)}
        metadata = run | {"sha256": _checksum(zeros, run)}
        file.write_bytes(safetensors({"__metadata__": metadata, **tensors}, 4 * len(named)))
        with pytest.raises(
            CheckpointError, match=rf"dog\.state\.safetensors is damaged \(.*{fault}.*\); to start again"
        ):
            read_state(file, new, {})


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.3.mlp.up_proj.weight", "rotary_emb.inv_freq"])
def test_1000_axes_of_a_tensor_that_is_not_used_are_refused_too(folder, name):
    file = sorted((folder / "text_encoder").glob("*.safetensors"))[0]
    arrays = mx.load(str(file))
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays | {name: mx.zeros((1,) * 1000)})
    assert str(file) in refusal(folder)
    assert "1000" in verify(folder)[0] or str(file) in verify(folder)[0]


@pytest.mark.parametrize("count", [20_001, 400_000])
def test_an_index_of_too_many_names_is_refused_before_any_is_looked_at(tmp_path, monkeypatch, count):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map":{' + ",".join(f'"{i:x}":"/"' for i in range(count)) + "}}")
    monkeypatch.setattr(component, "SHARD", None)  # the pattern that every name is compared with
    with pytest.raises(CheckpointError, match=rf"index.json lists {count:,} tensors, expected at most 20,000"):
        read_weight_map(index)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "model.safetensors")


def test_a_header_of_the_largest_size_is_read(tmp_path):
    # what a trainer says about itself, and as many tensors as are allowed
    content = json.loads(many(headers.MAX_TENSORS))
    content["__metadata__"] = {"tags": ""}
    content["__metadata__"]["tags"] = " " * (headers.MAX_HEADER - len(json.dumps(content)))
    (tmp_path / "model.safetensors").write_bytes(safetensors(content))
    assert len(read_header(tmp_path / "model.safetensors")) == headers.MAX_TENSORS


AT_THE_HUB = ("an axis past 2**31", "a header of 2**64 bytes", "a list")


@pytest.mark.parametrize(
    "name", [name if name in AT_THE_HUB else slow(name) for name in HOSTILE if name not in ("junk behind", "overlap")]
)
def test_a_hostile_header_at_the_hub_is_refused_by_name_before_its_data_is_downloaded(run, hub, tmp_path, name):
    file = tmp_path / "repository/vae/diffusion_pytorch_model.safetensors"
    write(file, name)
    result = run("plan", DEFAULT_MODEL)
    assert result.returncode == 4 and "diffusion_pytorch_model.safetensors is not a safetensors file" in result.stderr
    assert len(result.stderr) < 1000 and "Traceback" not in result.stderr


def test_no_more_is_read_from_a_hub_that_sends_whole_files_than_was_asked_for(run, hub, monkeypatch):
    send_file, sent = hub.send_file, []

    def send_all(request, name, file):
        if not name.endswith(".safetensors"):
            return send_file(request, name, file)
        request.send_response(200)
        request.end_headers()
        request.close_connection = True
        with suppress(OSError):
            for _ in range(2**14):
                request.wfile.write(bytes(2**16))
                sent.append(2**16)

    monkeypatch.setattr(hub, "send_file", send_all)
    result = run("plan", DEFAULT_MODEL)
    assert result.returncode == 4, result.stderr
    assert 0 < sum(sent) < 50 * 2**20
