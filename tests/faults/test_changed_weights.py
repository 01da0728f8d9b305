"""Weights that change while a model is in use: the next read of them is an error, and never an image."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_zimage import CheckpointError, GenerateRequest, Step, ZImagePipeline
from mlx_zimage.convert.rows import stored_rows
from mlx_zimage.generate import fingerprint
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.weights import unchanged
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.library import remove
from mlx_zimage.weights.lora import read_lora

REQUEST = GenerateRequest("a red fox", seed=0, steps=3, width=32, height=48)


def overwrite(file: Path) -> None:
    """Replace all tensors with zeros; the file keeps its length."""
    before = file.stat()
    with file.open("r+b") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start)
        stream.write(bytes(before.st_size - start))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # the clock of a file system may tick slowly


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def swap(file: Path) -> None:
    """Another file of the same size and time in its place, as a sync leaves behind."""
    before = file.stat()
    other = file.with_name("other")
    shutil.copyfile(file, other)
    overwrite(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def file_of(folder: Path, network: str, name: str) -> Path:
    """The file with a weight of a network."""
    return open_checkpoint(folder).networks[network].entries[name].file


def overwrite_and_set_back(file: Path) -> None:
    """Replace all tensors with zeros, and set the modification time back, as if nothing had happened."""
    before = file.stat()
    overwrite(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [overwrite, truncate, swap, overwrite_and_set_back, Path.unlink]
NAMES = [change.__name__ for change in CHANGES]


@pytest.fixture
def streamed(folder, monkeypatch) -> ZImagePipeline:
    """A pipeline that reads every block from disk in each step."""
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32")
    plan, blocks = pipe.planner.plan, frozenset(f"layers.{i}" for i in range(tiny.TRANSFORMER["n_layers"]))
    monkeypatch.setattr(pipe.planner, "plan", lambda *work: replace(plan(*work), keep=False, streamed=blocks))
    return pipe


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_a_transformer_that_changes_between_steps_ends_the_image(folder, streamed, change):
    events = []
    with pytest.raises(CheckpointError, match=r"transformer/diffusion_pytorch_model\S* was"):
        for event in streamed.stream(REQUEST):
            if not events:
                change(file_of(folder, "transformer", "layers.1.attention.to_q.weight"))
            events.append(event)
    assert all(isinstance(event, Step) for event in events)


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_an_encoder_that_changes_after_the_model_was_opened_encodes_nothing(folder, change):
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32")
    change(file_of(folder, "text_encoder", "model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"text_encoder/model\S* was"):
        pipe.encode("a red fox")


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_a_change_during_the_read_itself_is_noticed(folder, monkeypatch, change):
    component, load = open_checkpoint(folder).transformer, mx.load
    file = component.entries["layers.0.attention.to_q.weight"].file

    def late(path, **options):
        arrays = load(path, **options)
        if path == str(file):
            change(file)
        return arrays

    monkeypatch.setattr(mx, "load", late)
    with pytest.raises(CheckpointError, match="was"):
        component.read("layers.0", mx.float32)()


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_rows_of_a_changed_table_are_not_returned(folder, monkeypatch, change):
    encoder = open_checkpoint(folder).text_encoder
    table = "model.embed_tokens.weight"
    exact = encoder.rows(table, [3, 0, 3], mx.float32)
    whole = encoder.read(table, mx.float32)()
    assert np.array_equal(exact, whole[mx.array([3, 0, 3])])
    change(encoder.entries[table].file)
    with pytest.raises(CheckpointError, match="was"):
        encoder.rows(table, [0], mx.float32)


def test_ids_outside_a_table_are_refused(folder):
    encoder = open_checkpoint(folder).text_encoder
    for ids in ([512], [0, -1]):
        with pytest.raises(CheckpointError, match="has rows for ids up to 511"):
            encoder.rows("model.embed_tokens.weight", ids, mx.float32)


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_a_conversion_stops_when_its_source_changes(folder, change):
    entry = open_checkpoint(folder).transformer.entries["x_pad_token"]
    change(entry.file)
    with pytest.raises(CheckpointError, match=r"was|could not read"):
        stored_rows(entry)(0, 1)


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_a_changed_model_has_no_fingerprint(folder, change):
    checkpoint = open_checkpoint(folder)
    change(checkpoint.transformer.entries["x_pad_token"].file)
    with pytest.raises(CheckpointError, match="was"):
        fingerprint(checkpoint)


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_a_lora_that_changes_while_it_is_read_is_not_applied(tmp_path, monkeypatch, change):
    file, load = tmp_path / "lora.safetensors", mx.load
    factors = {"lora_A": mx.ones((2, tiny.TRANSFORMER["dim"])), "lora_B": mx.ones((tiny.TRANSFORMER["dim"], 2))}
    mx.save_safetensors(str(file), {f"layers.0.attention.to_q.{name}.weight": x for name, x in factors.items()})
    configs = {"transformer": TransformerConfig.from_dict(tiny.TRANSFORMER)}
    read_lora(file, configs)

    def late(*args, **options):
        arrays = load(*args, **options)
        change(file)
        return arrays

    monkeypatch.setattr(mx, "load", late)
    with pytest.raises(CheckpointError, match=r"lora.safetensors was"):
        read_lora(file, configs)


def test_a_model_that_is_removed_while_it_generates_ends_the_image(folder, streamed, monkeypatch):
    monkeypatch.setenv("MLX_ZIMAGE_HOME", str(folder.parent))
    with pytest.raises(CheckpointError, match=r"was there when the model was opened"):
        for _ in streamed.stream(REQUEST):
            if folder.exists():
                remove(folder.name)


def test_a_failing_disk_is_reported_as_a_damaged_model(folder, monkeypatch):
    component = open_checkpoint(folder).transformer

    def fail(*args, **options):
        raise RuntimeError("[read] Unable to read from file.")

    monkeypatch.setattr(mx, "load", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read .* check the disk"):
        component.read("layers.0", mx.float32)


def test_reading_changes_nothing(folder):
    entry = open_checkpoint(folder).transformer.entries["x_pad_token"]
    with unchanged.unchanged([entry]):
        entry.file.read_bytes()
