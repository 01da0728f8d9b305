"""An untrusted model, or what others write into the cache, must not change the images of your own model."""

import json
import os
import shutil
import stat
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from lanes import slow

from mlx_zimage import ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.models.text_encoder import TextEncoder
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.component import Component
from mlx_zimage.weights.store import Store, checksum, digest

IDS, OTHER = (5, 6, 7), (8, 9, 10)
WIDTH = tiny.TEXT_ENCODER["hidden_size"]


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def encoder(pipe) -> Component:
    return pipe.checkpoint.text_encoder


@pytest.fixture
def store(kept) -> Store:
    return Store(mx.float32, kept)


def numbers(seed: int) -> mx.array:
    return mx.random.normal((len(IDS), WIDTH), key=mx.random.key(seed))


def get(store: Store, encoder: Component, ids: tuple[int, ...] = IDS) -> mx.array | None:
    return store.get([encoder], ids, (len(ids), WIDTH), mx.float32)


def generate(folder: Path, dtype: str) -> np.ndarray:
    pipe = ZImagePipeline.from_pretrained(folder, dtype=dtype)
    return pipe("a fox", width=32, height=32, num_inference_steps=1, seed=0, output_type="np").images


def change(file: Path) -> None:
    """Change the sign of the weights of an encoder's first layer."""
    arrays = mx.load(str(file))
    mx.eval(arrays)
    changed = {name: -x if ".layers.0.mlp." in name else x for name, x in arrays.items()}
    mx.save_safetensors(str(file), changed, {"format": "mlx"})


@pytest.mark.parametrize("dtype", [slow("float32"), "float16"])  # float16 caches its factors, too
def test_a_changed_encoder_with_the_good_ones_manifest_leaves_the_good_models_image_alone(
    folder, tmp_path, kept, monkeypatch, dtype
):
    good = convert(folder, tmp_path / "good")
    with monkeypatch.context() as patch:
        patch.setenv("MLX_ZIMAGE_EMBEDDINGS", "off")
        expected = generate(good, dtype)
    bad = shutil.copytree(good, tmp_path / "bad")
    for file in (bad / "text_encoder").glob("*.safetensors"):
        change(file)
    (bad / "SHA256SUMS").write_bytes((good / "SHA256SUMS").read_bytes())  # the newest file of all
    assert not np.array_equal(generate(bad, dtype), expected)
    assert np.array_equal(generate(good, dtype), expected)


def test_a_changed_encoder_named_as_in_the_hubs_cache_is_hashed(folder, tmp_path, kept):
    good = open_checkpoint(folder).text_encoder
    sums = {file.name: "0" * 63 + str(i) for i, file in enumerate(sorted((folder / "text_encoder").glob("*.safe*")))}
    seen = set()
    for name in ("good", "bad"):
        blobs = tmp_path / name / "models--me--mine" / "blobs"
        snapshot = tmp_path / name / "models--me--mine" / "snapshots" / "1"
        shutil.copytree(folder, snapshot)
        blobs.mkdir()
        for file in (snapshot / "text_encoder").glob("*.safetensors"):
            shutil.move(file, blobs / sums[file.name])
            file.symlink_to(blobs / sums[file.name])
            if name == "bad":
                blob = blobs / sums[file.name]
                blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
        seen.add(checksum(open_checkpoint(snapshot).text_encoder, kept))
    assert len(seen) == 2 and checksum(good, kept) in seen


def another_prompts(path, other):
    shutil.copy(other, path)


def linked(path, other):
    there = path.rename(path.with_suffix(".there"))
    path.symlink_to(there)


def linked_to_another(path, other):
    path.unlink()
    path.symlink_to(other)


def zeros(path, other):
    path.write_bytes(bytes(path.stat().st_size))


def a_fifo(path, other):
    path.unlink()
    os.mkfifo(path)


def not_finite(path, other):
    array = mx.full((len(IDS), WIDTH), float("nan"))
    mx.save_safetensors(str(path), {"array": array}, {"key": path.stem, "sha256": digest(array)})


def two_arrays(path, other):
    array = numbers(0)
    mx.save_safetensors(str(path), {"array": array, "b": array}, {"key": path.stem, "sha256": digest(array)})


def endless(path, other):
    os.truncate(path, 2**40)


def a_list(path, other):
    path.write_bytes((5).to_bytes(8, "little") + b"[1,2]")


@pytest.mark.parametrize(
    "spoil", [another_prompts, linked, linked_to_another, zeros, a_fifo, not_finite, two_arrays, endless, a_list]
)
def test_a_file_that_was_not_written_for_its_key_is_never_used(store, encoder, spoil):
    for ids, seed in ((IDS, 0), (OTHER, 1)):
        store.put([encoder], ids, numbers(seed))
    path, other = (store._path(store.folder, [encoder], ids) for ids in (IDS, OTHER))
    spoil(path, other)
    assert get(store, encoder) is None
    path.unlink(missing_ok=True)
    store.put([encoder], IDS, numbers(0))
    assert mx.array_equal(get(store, encoder), numbers(0))


def test_a_file_of_another_user_is_not_used(store, encoder, monkeypatch):
    store.put([encoder], IDS, numbers(0))
    assert get(store, encoder) is not None
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert get(store, encoder) is None


@pytest.mark.parametrize("spoil", [another_prompts, linked, linked_to_another, zeros, a_fifo, endless])
def test_a_checksum_that_was_not_written_for_its_files_is_computed_again(folder, encoder, tmp_path, kept, spoil):
    first = checksum(encoder, kept)
    (own,) = kept.glob("*.sum")
    change(next((folder / "text_encoder").glob("*-00001-*")))
    assert checksum(open_checkpoint(folder).text_encoder, kept) != first
    (other,) = {*kept.glob("*.sum")} - {own}
    spoil(own, other)
    assert checksum(encoder, kept) == first


def test_what_was_computed_while_the_encoder_was_replaced_is_not_cached(folder, store, kept):
    encoder = open_checkpoint(folder).text_encoder
    assert get(store, encoder) is None
    change(next((folder / "text_encoder").glob("*-00001-*")))
    store.put([encoder], IDS, numbers(0))
    assert not list(kept.glob("*.safetensors"))
    assert get(store, encoder) is None
    store.put([encoder], IDS, numbers(0))
    assert mx.array_equal(get(store, encoder), numbers(0))


def test_only_the_user_can_read_what_is_cached(folder, kept, watch):
    old = os.umask(0)
    try:
        generate(folder, "float32")
    finally:
        os.umask(old)
    files = list(kept.iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".sum"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    # and it is what is used
    encoded = watch(TextEncoder, "steps")
    generate(folder, "float32")
    assert not encoded


def test_a_cached_array_records_its_key(store, encoder, kept):
    store.put([encoder], IDS, numbers(0))
    (file,) = kept.glob("*.safetensors")
    content = file.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert metadata == {"format": "mlx", "key": file.stem, "sha256": digest(numbers(0))}


def test_another_file_at_the_same_place_and_times_is_hashed(folder, kept, monkeypatch):
    """A memo says nothing about a file with another inode, such as one from a backup."""
    monkeypatch.setattr("mlx_zimage.weights.store.placed", lambda file: 0)
    file = next((folder / "text_encoder").glob("*-00001-*"))
    before = file.stat()
    first = checksum(open_checkpoint(folder).text_encoder, kept)
    other = folder / "other.safetensors"
    other.write_bytes(file.read_bytes()[:-1] + b"\1")
    other.replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert checksum(open_checkpoint(folder).text_encoder, kept) != first
