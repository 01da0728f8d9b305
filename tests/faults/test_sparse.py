"""Sparse files, which claim terabytes and take no space: never read or hashed to their end."""

import hashlib
import json
import math
import os

import mlx.core as mx
import pytest
import tiny
from click.testing import CliRunner

from mlx_zimage import CheckpointError, cli
from mlx_zimage.convert import convert
from mlx_zimage.convert import verify as module
from mlx_zimage.convert.verify import verify
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.lora import read_lora
from mlx_zimage.weights.manifest import MANIFEST, read_manifest, render_manifest


@pytest.fixture(autouse=True)
def only_small_files_are_hashed(monkeypatch):
    digest = hashlib.file_digest

    def file_digest(stream, kind):
        assert os.fstat(stream.fileno()).st_size < 10**9, stream.name
        return digest(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)


def list_sparse(made, size: int, *names: str) -> None:
    """Put sparse files into a model, and into its manifest."""
    for name in names:
        (made / name).touch()
        os.truncate(made / name, size)
    (made / MANIFEST).write_bytes(render_manifest(read_manifest(made) | dict.fromkeys(names, "0" * 64)))


@pytest.mark.parametrize(
    "name", ["README.md", "vae/config.json", "vae/model-00001-of-00001.safetensors", "tokenizer/notes.txt"]
)
def test_a_sparse_file_that_is_listed_is_a_fault(tmp_path, name):
    made = convert(POCKET, tmp_path / "made")
    list_sparse(made, 2**42, name)
    (fault,) = verify(made)
    assert fault == f"{MANIFEST}: lists files totalling {fault.split()[4]} bytes, expected at most 64,000,000,000"


@pytest.mark.parametrize("name", ["README.md", "vae/config.json", "tokenizer/notes.txt"])
def test_a_file_that_contains_no_weights_may_not_be_as_large_as_weights(tmp_path, name):
    made = convert(POCKET, tmp_path / "made")
    list_sparse(made, 2**35, name)
    assert f"{name}: cannot be read: [Errno 27] larger than 33,554,432 bytes" in verify(made)[0]


def test_many_sparse_files_are_bounded_together(tmp_path):
    made = convert(POCKET, tmp_path / "made")
    list_sparse(made, 10**10, *(f"vae/{i}.safetensors" for i in range(10)))
    assert "expected at most 64,000,000,000" in verify(made)[0]


def test_weights_without_checksums_are_bounded_too(folder, monkeypatch):
    # a config may make a network a hundred times as wide and as deep as the published one
    monkeypatch.setattr(module, "MAX_HASHED", 10**5)
    monkeypatch.setattr(module, "read_rows", lambda *args: pytest.fail("read"))
    assert verify(folder)[-1].endswith("bytes, expected at most 100,000")


def test_an_encoder_with_terabytes_that_no_network_uses_is_not_hashed_for_the_cache(folder, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", str(kept))
    encoder = folder / "text_encoder"
    arrays = {name: x for file in encoder.glob("*.safetensors") for name, x in mx.load(str(file)).items()}
    mx.eval(arrays)
    for file in encoder.glob("model*"):
        file.unlink()
    mx.save_safetensors(str(encoder / "model.safetensors"), arrays)
    enlarge(encoder / "model.safetensors", "logit_scale")
    words = ["generate", "a fox", "--steps", "1", "--size", "32x32", "-q", "-m", folder, "-o", tmp_path / "image.png"]
    result = CliRunner().invoke(cli.main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert not list(kept.glob("*"))


def enlarge(file, name: str) -> None:
    """Add a tensor of 4 TB to a safetensors file, which stays sparse."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header[name] = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [end, end + 2**42]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    os.truncate(file, 8 + len(text) + end + 2**42)


d, LAYER = tiny.TRANSFORMER["dim"], "transformer.layers.0.attention.to_q"
SMALL = {f"{LAYER}.lora_A.weight": (2, d), f"{LAYER}.lora_B.weight": (d, 2)}
LORAS = {
    "a rank of 2**28": {f"{LAYER}.lora_A.weight": (2**28, d), f"{LAYER}.lora_B.weight": (d, 2**28)},
    "a rank of 2**20": {f"{LAYER}.lora_A.weight": (2**20, d), f"{LAYER}.lora_B.weight": (d, 2**20)},
    "a LoKr of 2**36": {f"{LAYER}.lokr_w1": (2**18, 2**18), f"{LAYER}.lokr_w2": (1, 1)},
    "a LoKr's rank of 2**30": {
        **{f"{LAYER}.lokr_w1_a": (8, 2**30), f"{LAYER}.lokr_w1_b": (2**30, 8)},
        **{f"{LAYER}.lokr_w2": (d // 8, d // 8)},
    },
    "a LoHa's rank of 2**28": {
        f"{LAYER}.hada_{part}": (d, 2**28) if part[-1] == "a" else (2**28, d)
        for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    },
    "terabytes that match nothing": SMALL | {"x.y.lora_A.weight": (2**20, 2**20), "x.y.lora_B.weight": (2**20, 2**20)},
    "more than the model": SMALL | {f"x.y{i}.lora_A.weight": (40, d) for i in range(1000)},
}


@pytest.mark.parametrize("shapes", LORAS.values(), ids=list(LORAS))
@pytest.mark.parametrize("partial", [False, True], ids=["all keys", "partial"])
def test_a_sparse_lora_is_refused_before_it_is_read(tmp_path, monkeypatch, shapes, partial):
    header, end = {}, 0
    for name, shape in shapes.items():
        nbytes = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    (tmp_path / "lora.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / "lora.safetensors", 8 + len(text) + end)
    monkeypatch.setattr(mx, "load", lambda *args, **options: pytest.fail("read"))
    configs = {"transformer": TransformerConfig.from_dict(tiny.TRANSFORMER)}
    with pytest.raises(CheckpointError, match=r"lora.safetensors.* values, more than the "):
        read_lora(tmp_path / "lora.safetensors", configs, partial)


def test_a_manifest_of_many_files_is_refused_before_any_is_looked_for(folder):
    lines = "".join(sorted(f"{'0' * 64}  f{i}\n" for i in range(100_000)))
    (folder / MANIFEST).write_text(lines)
    assert verify(folder) == [f"{MANIFEST}: lists 100,000 files, expected at most 2,000; convert again"]
