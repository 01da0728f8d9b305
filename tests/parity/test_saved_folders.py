"""Folders saved by diffusers itself, in the forms that its users have. Skipped if diffusers is not installed."""

import json

import numpy as np
import pytest
import tiny

from mlx_zimage import ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.errors import CheckpointError, RequestError
from mlx_zimage.weights.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def diffusers():
    for module in ("torch", "transformers"):
        pytest.importorskip(module)
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("original") / "tiny", seed=0)


@pytest.fixture(scope="module")
def theirs(diffusers, original):
    return diffusers.ZImagePipeline.from_pretrained(original)


def generate(folder, variant=None):
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32", variant=variant)
    return pipe("a red fox", width=32, height=32, num_inference_steps=1, seed=0, output_type="latent").images


@pytest.mark.parametrize("max_shard_size", ["10GB", "60KB"])
def test_a_variant_saved_by_diffusers_is_read(theirs, original, tmp_path, max_shard_size):
    theirs.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size=max_shard_size)
    names = {path.name for path in (tmp_path / "saved" / "transformer").iterdir()}
    assert ("diffusion_pytorch_model.safetensors.index.fp16.json" in names) == (max_shard_size == "60KB")
    expected = generate(original)
    assert np.array_equal(generate(tmp_path / "saved", "fp16"), expected)
    assert np.array_equal(generate(tmp_path / "saved"), expected), "the only variant need not be named"
    with pytest.raises(RequestError, match=r"\(fp16\); got 'bf16'"):
        open_checkpoint(tmp_path / "saved", "bf16")
    out = convert(tmp_path / "saved", tmp_path / "out", dtype="float32", variant="fp16")
    assert np.array_equal(generate(out), expected)


def test_both_forms_in_one_folder_are_distinguished_as_in_diffusers(diffusers, theirs, tmp_path):
    folder = tmp_path / "saved"
    theirs.save_pretrained(folder, max_shard_size="60KB")
    theirs.save_pretrained(folder, variant="fp16")
    for variant in (None, "fp16"):
        assert diffusers.ZImagePipeline.from_pretrained(folder, variant=variant)
        checkpoint = open_checkpoint(folder, variant)
        for component in checkpoint.components:
            files = {entry.file.name for entry in component.entries.values()}
            assert all((".fp16" in name) == bool(variant) for name in files)


@pytest.mark.parametrize("use", ["Img2Img", "Inpaint"])
def test_another_pipeline_of_the_same_networks_is_read(diffusers, theirs, original, tmp_path, use):
    getattr(diffusers, f"ZImage{use}Pipeline")(**theirs.components).save_pretrained(tmp_path / "saved")
    assert np.array_equal(generate(tmp_path / "saved"), generate(original))
    out = convert(tmp_path / "saved", tmp_path / "out", dtype="float32")
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "ZImagePipeline"
    assert diffusers.ZImagePipeline.from_pretrained(convert(out, tmp_path / "back", format="diffusers"))


def test_a_lora_saved_by_diffusers_is_named(diffusers, tmp_path):
    import torch

    weights = {f"layers.{i}.attention.to_q.lora_{x}.weight": torch.zeros(4, 4) for i in range(2) for x in "AB"}
    diffusers.ZImagePipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    with pytest.raises(CheckpointError, match=r"has no model_index\.json: it is a LoRA"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a LoRA, not a model"):
        convert(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "out")
