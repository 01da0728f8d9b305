"""The report on a converted model is true of it."""

import json
import shutil
from unittest.mock import create_autospec

import mlx.core as mx
import pytest
from mlx_zimage.convert import convert
from mlx_zimage.convert.report import model_card, report, upload
from mlx_zimage.convert.verify import verify

from mlx_zimage.errors import CheckpointError, OutputError
from mlx_zimage.weights import open_checkpoint

PROMPTS = ["a red circle | on a blue background"]
OPTIONS = {"prompts": PROMPTS, "size": 32, "steps": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return {bits: convert("pocket", folder / str(bits), bits=bits) for bits in (3, 8)}


def test_more_bits_are_nearer_by_every_measure(folders):
    low, high = (report(folders[bits], "pocket", **OPTIONS) for bits in (3, 8))
    assert high["weight_error"]["mean"] < 0.1 * low["weight_error"]["mean"]
    (a,), (b,) = low["pictures"], high["pictures"]
    assert all(more < less for more, less in zip(b["velocity_error"], a["velocity_error"], strict=True))
    assert b["latent_cosine"] > a["latent_cosine"]
    assert b["psnr_db"] > a["psnr_db"] + 10


def test_the_weight_error_is_that_of_the_layers(folders):
    quality = report(folders[8], "pocket", **(OPTIONS | {"prompts": []}))
    quantized = {
        f"{part.name} {layer}.weight" for part in open_checkpoint(folders[8]).components for layer in part.quantizations
    }
    assert quality["weight_error"]["layers"].keys() == quantized
    name = "layers.1.feed_forward.w2"
    exact = open_checkpoint("pocket").transformer.read(f"{name}.weight", mx.float32)
    packed = mx.quantize(exact.astype(mx.bfloat16), bits=8, group_size=64)
    packed = mx.dequantize(packed[0], *(x.astype(mx.float32) for x in packed[1:]), bits=8, group_size=64)
    error = (mx.square(packed - exact).mean() / mx.square(exact).mean()).sqrt().item()
    assert quality["weight_error"]["layers"][f"transformer {name}.weight"] == pytest.approx(error, rel=1e-4)


def test_a_dense_copy_is_the_same(tmp_path):
    out = convert("pocket", tmp_path / "out")
    quality = report(out, "pocket", **OPTIONS)
    assert quality["weight_error"]["layers"] == {}
    (picture,) = quality["pictures"]
    assert max(picture["velocity_error"]) < 1e-5  # theirs is taken from the difference of two steps
    assert picture["latent_cosine"] == pytest.approx(1, abs=1e-6)
    assert picture["psnr_db"] is None


def test_the_report_is_written_into_the_folder_and_its_manifest(folders):
    quality = report(folders[8], "pocket", **OPTIONS)
    assert json.loads((folders[8] / "quality.json").read_text()) == quality
    card = (folders[8] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\npipeline_tag: text-to-image\ntags:\n- mlx\n---\n")
    assert "| a red circle \\| on a blue background | 0.0" in card
    assert verify(folders[8]) == []
    assert not list(folders[8].glob(".*"))


def test_a_folder_of_another_hand_is_left_alone(tmp_path):
    folder = shutil.copytree(open_checkpoint("pocket").folder, tmp_path / "pocket")
    with pytest.raises(CheckpointError, match="was not written by this converter"):
        report(folder, "pocket", **OPTIONS)


def test_what_is_uploaded_has_a_card_that_the_hub_can_read(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HFValidationError

    api = create_autospec(huggingface_hub.HfApi, instance=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    out = convert("pocket", tmp_path / "out", bits=4)
    upload(out, "me/pocket-4bit")
    api.create_repo.assert_called_once_with("me/pocket-4bit", exist_ok=True)
    api.upload_folder.assert_called_once_with(repo_id="me/pocket-4bit", folder_path=out)
    assert ModelCard.load(out / "README.md").data.to_dict() == {
        "library_name": "mlx", "pipeline_tag": "text-to-image", "tags": ["mlx"],
    }  # fmt: skip
    told = json.loads((out / "conversion.json").read_text()) | {"source": "Tongyi-MAI/Z-Image-Turbo"}
    assert ModelCard(model_card(told)).data.base_model == "Tongyi-MAI/Z-Image-Turbo"
    assert verify(out) == []
    with pytest.raises(CheckpointError, match="was not written by this converter"):
        upload(open_checkpoint("pocket").folder, "me/pocket")
    api.create_repo.side_effect = HFValidationError("no such name\nand more")
    with pytest.raises(OutputError, match=r"could not be uploaded to me/pocket: no such name$"):
        upload(out, "me/pocket")
