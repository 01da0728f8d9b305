"""Models on this machine: what an alias stands for, and what is listed of the hub's cache."""

import json
import shutil

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_zimage import CheckpointError, ZImagePipeline
from mlx_zimage.cli import main
from mlx_zimage.convert import convert
from mlx_zimage.variants import ALIASES
from mlx_zimage.weights import library, manifest, official
from mlx_zimage.weights.checkpoint import BorrowedFromHub, Checkpoint, open_checkpoint, weight_files
from mlx_zimage.weights.hub import POCKET


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Folders in the places of the official repository and of ComfyUI's smaller transformer, which is returned."""
    repository = shutil.copytree(POCKET, tmp_path / "official")
    smaller = tmp_path / "comfy/z_image_turbo_bf16.safetensors"
    smaller.parent.mkdir()
    shutil.copy(POCKET / "transformer/diffusion_pytorch_model.safetensors", smaller)
    monkeypatch.setenv("MLX_ZIMAGE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(ALIASES, "turbo", str(repository))
    monkeypatch.setattr(official, "REPOSITORY", str(repository))
    monkeypatch.setattr(official, "BF16_TRANSFORMER", str(smaller))
    monkeypatch.setattr(official, "BF16_SHA256", manifest.sha256(smaller))
    return smaller


def test_an_alias_in_python_takes_the_smaller_transformer_and_later_what_was_converted(published, tmp_path):
    checkpoint = ZImagePipeline.from_pretrained("turbo").checkpoint
    assert checkpoint.folder == tmp_path / "official"
    assert weight_files([checkpoint.transformer]) == [published]
    assert weight_files([library.open_to_plan("turbo").transformer]) == [published], "as plan and info show it"
    convert("turbo", tmp_path / "home/official-8bit", bits=8)
    record = json.loads((tmp_path / "home/official-8bit/conversion.json").read_text())
    assert record["parts"]["transformer"] == published.name, "the converter takes it, too"
    assert ZImagePipeline.from_pretrained("turbo").checkpoint.folder == tmp_path / "home/official-8bit"


def test_an_alias_for_the_transformer_alone_is_the_smaller_one_too(published, tmp_path):
    checkpoint = ZImagePipeline.from_pretrained("pocket", transformer="turbo").checkpoint
    assert weight_files([checkpoint.transformer]) == [published]
    out = convert("pocket", tmp_path / "out", transformer="turbo")
    assert json.loads((out / "conversion.json").read_text())["parts"] == {"transformer": published.name}


def test_an_alias_takes_the_original_with_a_warning_if_the_smaller_one_is_not_as_published(published, monkeypatch):
    monkeypatch.setattr(official, "BF16_SHA256", "0" * 64)
    with pytest.warns(BorrowedFromHub, match="is not the file that was published; downloading the transformer of"):
        _, transformer = library.smaller_download("turbo")
    assert transformer is None and not published.exists()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A repository in the hub's cache with all of pocket: its folder in the cache, and its snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MLX_ZIMAGE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "hub/models--me--model"
    snapshot = folder / "snapshots" / ("c" * 40)
    (folder / "blobs").mkdir(parents=True)
    for i, file in enumerate(path for path in POCKET.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(POCKET)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(shutil.copy(file, folder / "blobs" / str(i)))
    return folder, snapshot


def listed() -> str:
    return CliRunner().invoke(main, ["models"]).stdout.splitlines()[1].partition("me/model")[2]


def test_a_repository_from_which_networks_were_borrowed_is_not_called_incomplete(cached):
    folder, snapshot = cached
    assert listed() == ""
    (snapshot / "transformer/diffusion_pytorch_model.safetensors").unlink()
    assert listed() == "  (only text_encoder, vae)"
    (folder / "blobs/x.incomplete").touch()
    assert listed() == "  (incomplete)", "a download was interrupted"
    (folder / "blobs/x.incomplete").unlink()
    vae = snapshot / "vae/diffusion_pytorch_model.safetensors"
    vae.resolve().unlink()
    assert listed() == "  (incomplete)", "a file was lost"
    vae.unlink()
    mx.save_safetensors(str(vae), {"decoder.conv_in.bias": mx.zeros(1)})
    assert listed() == "  (incomplete)", "some weights of a network are missing"


def test_a_tokenizer_that_does_not_fit_is_refused_before_weights_are_downloaded(tmp_path, monkeypatch):
    folder = shutil.copytree(POCKET, tmp_path / "folder")
    (folder / "tokenizer/tokenizer.json").write_text("[]")
    monkeypatch.setattr(Checkpoint, "to_download", 1)
    monkeypatch.setattr("mlx_zimage.weights.checkpoint.weight_files", None)  # lists what to download
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        open_checkpoint(folder)
