"""Embeddings cached on disk have the encoder's own bits, and anything wrong with their files costs only time."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from huggingface_hub import constants

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.models.text_encoder import TextEncoder
from mlx_zimage.weights import store as embeddings
from mlx_zimage.weights.component import Component
from mlx_zimage.weights.library import embeddings_folder, models, remove
from mlx_zimage.weights.store import Store, checksum

IDS = (5, 6, 7)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """This test's own cache folder."""
    monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", str(tmp_path / "kept"))
    return tmp_path / "kept"


class Prompts:
    """A store, used with one text encoder."""

    def __init__(self, encoder: Component, folder: Path, dtype: mx.Dtype = mx.float32):
        self.store, self.encoder, self.folder = Store(dtype, folder), encoder, folder

    def get(self, ids: tuple[int, ...] = IDS, dtype: mx.Dtype = mx.float32) -> mx.array | None:
        return self.store.get([self.encoder], ids, (len(ids), self.encoder.config.hidden_size), dtype)

    def put(self, ids: tuple[int, ...], embeddings: mx.array) -> None:
        self.store.put([self.encoder], ids, embeddings)

    def path(self, ids: tuple[int, ...]) -> Path:
        return self.store._path(self.folder, [self.encoder], ids)


@pytest.fixture
def prompts(pipe, tmp_path):
    return Prompts(pipe.checkpoint.text_encoder, tmp_path / "kept")


def numbers(length: int = len(IDS)) -> mx.array:
    return mx.random.normal((length, tiny.TEXT_ENCODER["hidden_size"]), key=mx.random.key(0))


def prompts_in(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cached_prompt_reads_nothing_of_the_encoder_and_gives_the_same_bits(
    kept, tiny_folder, watch, bytes_read, dtype
):
    encoded = watch(TextEncoder, "steps")
    request = GenerateRequest("a red fox", width=tiny.WIDTH, height=tiny.HEIGHT, seed=0, steps=1)
    images = []
    for _ in range(2):
        pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype=dtype)
        bytes_read.clear()
        images.append([step.latents for step in pipe.denoise(request)][-1])
    assert mx.array_equal(*images)
    assert len(encoded) == 1
    assert bytes_read["text_encoder"] == 0 < bytes_read["transformer"]
    assert len(prompts_in(kept)) == 1


def test_cached_arrays_come_back_unchanged(prompts):
    for computed, given in ((mx.float32, mx.float32), (mx.bfloat16, mx.bfloat16), (mx.float16, mx.float32)):
        prompts = Prompts(prompts.encoder, prompts.folder, computed)
        assert prompts.get(dtype=given) is None
        prompts.put(IDS, numbers().astype(given))
        assert prompts.get(dtype=given).dtype == given
        assert mx.array_equal(prompts.get(dtype=given), numbers().astype(given))
    assert prompts.get(IDS[:2]) is None


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def foreign(path):
    mx.save_safetensors(str(path), {"weight": mx.zeros((3, 3))})


def misshapen(path):
    short = numbers(2)
    mx.save_safetensors(str(path), {"array": short}, {"key": path.stem, "sha256": embeddings.digest(short)})


@pytest.mark.parametrize("damage", [cut, empty, flip, foreign, misshapen])
def test_a_damaged_file_is_ignored_and_written_again(prompts, damage):
    prompts.put(IDS, numbers())
    damage(*prompts_in(prompts.folder))
    assert prompts.get() is None
    prompts.put(IDS, numbers())
    assert mx.array_equal(prompts.get(), numbers())


def in_the_way(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file")


def read_only(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o500)


@pytest.mark.parametrize("spoil", [in_the_way, read_only])
def test_a_folder_that_cannot_be_written_is_ignored(pipe, tmp_path, spoil):
    spoil(tmp_path / "a" / "kept")
    prompts = Prompts(pipe.checkpoint.text_encoder, tmp_path / "a" / "kept")
    assert prompts.get() is None
    prompts.put(IDS, numbers())


def test_the_least_recently_used_are_removed_first(prompts):
    old, older = (1, 2, 3), (4, 5, 6)
    for i, ids in enumerate((older, old)):
        prompts.put(ids, numbers())
        os.utime(prompts.path(ids), ns=(i, i))
    assert prompts.get(older) is not None  # used again
    prompts.store.limit = sum(file.stat().st_size for file in embeddings.files(prompts.folder))
    prompts.put(IDS, numbers())
    assert prompts.get(old) is None
    assert prompts.get(older) is not None and prompts.get() is not None


def test_each_model_dtype_version_and_device_has_its_own_entries(prompts, monkeypatch, folder):
    paths = {prompts.path(IDS), prompts.path((5, 67))}

    def add(encoder=prompts.encoder, dtype=mx.float32):
        paths.add(Prompts(encoder, prompts.folder, dtype).path(IDS))

    add()
    assert len(paths) == 2
    add(dtype=mx.bfloat16)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5000.0}))
    add(encoder=ZImagePipeline.from_pretrained(folder).checkpoint.text_encoder)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M9"})
    add()
    monkeypatch.setattr(mx, "__version__", "9")
    add()
    assert len(paths) == 6


def test_a_checksum_does_not_depend_on_where_the_files_are(folder, tiny_folder, tmp_path, watch):
    hashed = watch(embeddings, "_sha256")
    encoder = ZImagePipeline.from_pretrained(folder).checkpoint.text_encoder
    first = checksum(encoder, tmp_path / "kept")
    assert len(hashed) == 4
    assert checksum(encoder, tmp_path / "kept") == first
    assert len(hashed) == 4, "the checksum is cached"
    assert checksum(ZImagePipeline.from_pretrained(tiny_folder).checkpoint.text_encoder, tmp_path / "kept") == first
    shard = next((folder / "text_encoder").glob("*.safetensors"))
    flip(shard)
    assert checksum(encoder, tmp_path / "kept") != first


def test_file_names_in_the_hub_cache_are_used_as_checksums(folder, tmp_path, monkeypatch):
    encoder = ZImagePipeline.from_pretrained(folder).checkpoint.text_encoder
    first = checksum(encoder, tmp_path / "kept")
    blobs = tmp_path / "hub" / "models--me--mine" / "blobs"
    blobs.mkdir(parents=True)
    for shard in (folder / "text_encoder").glob("*.safetensors"):
        blob = blobs / embeddings._sha256(shard)
        shutil.move(shard, blob)
        shard.symlink_to(blob)
        flip(blob)  # unused
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert checksum(encoder, tmp_path / "elsewhere") == first


def test_only_the_cached_files_are_listed_and_removed(kept, prompts):
    prompts.put(IDS, numbers())
    (kept / "photo.safetensors").write_text("mine")
    listed = [model for model in models() if model.kind == "prompts"]
    assert [(model.name, model.path) for model in listed] == [("embeddings", kept)]
    assert remove("embeddings") == listed[0].nbytes
    assert [path.name for path in kept.iterdir()] == ["photo.safetensors"]
    assert not [model for model in models() if model.kind == "prompts"]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_ZIMAGE_HOME", str(tmp_path))
    assert embeddings_folder() is None
    monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", "~/prompts")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(embeddings_folder()) == "/home/me/prompts"
    monkeypatch.delenv("MLX_ZIMAGE_EMBEDDINGS")
    assert embeddings_folder() == tmp_path / "embeddings"
