"""Comparisons that run torch and diffusers: noise, images of the pocket model, folders that they save."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import test_shapes
import tiny
from compare import TOLERANCE, relative_error
from PIL import Image

from mlx_zimage import ZImagePipeline
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.noise import _uniform, torch_randn
from mlx_zimage.weights.hub import POCKET

SIZE = {"width": tiny.WIDTH, "height": tiny.HEIGHT}


@pytest.fixture(scope="module")
def torch(reference):
    return reference.torch


@pytest.fixture(scope="module")
def theirs(golden, reference):
    """diffusers' pipeline on the fresh weights."""
    return reference.open_pipeline(golden.folder)


@pytest.fixture(scope="module")
def pocket_pair(reference):
    """Our pipeline and diffusers' on the pocket checkpoint, in float32."""
    return ZImagePipeline.from_pretrained("pocket", dtype="float32"), reference.open_pipeline(POCKET)


@pytest.mark.parametrize("index", range(5))
def test_normals_and_uniforms_match_torch(reference, torch, index):
    shape = reference.NOISE_SHAPES[index]
    for seed in reference.NOISE_SEEDS:
        wanted = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
        # float32 logarithms and cosines of two libraries, at values up to 6; measured 5e-7
        assert np.abs(torch_randn(seed, shape) - wanted).max() < 2e-6, seed
        uniforms = _uniform(np.random.RandomState(seed % 2**32)._bit_generator, int(np.prod(shape)))
        wanted = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).numpy()
        assert np.array_equal(uniforms, wanted.reshape(-1)), seed


@pytest.mark.parametrize("seed", [0, 2**63 + 5])
def test_a_batch_from_one_seed_matches_diffusers(golden_pipe, theirs, torch, seed):
    wanted = theirs(
        "a red fox", **SIZE, num_inference_steps=2, guidance_scale=0.0, num_images_per_prompt=3, output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
    ours = golden_pipe(
        "a red fox", **SIZE, num_inference_steps=2, num_images_per_prompt=3, output_type="latent", seed=seed
    ).images
    assert relative_error(ours, wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("prompt", "seed"),
    [
        ("a red circle on a blue background", 1),
        ("一个黄色的三角形", 42),
        ("two green squares and a black cross", 2**40),
    ],
)
def test_pocket_generates_the_same_image_as_diffusers(pocket_pair, torch, prompt, seed):
    ours, theirs = pocket_pair
    size = ours.sample_size
    wanted = theirs(
        prompt, height=size, width=size, num_inference_steps=8, guidance_scale=0.0,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip
    image = ours(prompt, seed=seed).images[0]
    assert np.abs(np.array(image).astype(int) - np.array(wanted)).max() <= 1


def test_a_folder_saved_by_diffusers_gives_the_same_model(golden_pipe, theirs, tmp_path):
    # it spells the text encoder's config differently, has no `model.` prefix, and is float32 throughout
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    saved = ZImagePipeline.from_pretrained(tmp_path / "saved", dtype="float32")
    names = [name for name in saved.checkpoint.text_encoder.entries.values() if name.name.startswith("model.")]
    assert not names
    assert "rope_parameters" in json.loads((tmp_path / "saved" / "text_encoder" / "config.json").read_text())
    run = {"prompt": "a red fox", **SIZE, "num_inference_steps": 1, "seed": 3, "output_type": "latent"}
    assert np.array_equal(saved(**run).images, golden_pipe(**run).images)


def test_transformers_reads_both_spellings_of_its_config_alike(golden, reference, tmp_path):
    transformers = pytest.importorskip("transformers")
    old = dict(tiny.TEXT_ENCODER, rope_theta=5000.0)
    new = transformers.Qwen3Config(**old).to_dict()
    assert "rope_theta" not in new
    assert TextEncoderConfig.from_dict(new) == TextEncoderConfig.from_dict(old)
    # and the value is used: both change the embeddings in the same way
    folder = shutil.copytree(golden.folder, tmp_path / "model")
    (folder / "text_encoder" / "config.json").write_text(json.dumps(old))
    ours = ZImagePipeline.from_pretrained(folder, dtype="float32").encode("a red fox")
    wanted = reference.open_pipeline(folder).encode_prompt("a red fox", do_classifier_free_guidance=False)[0][0]
    assert relative_error(ours, wanted) < TOLERANCE
    assert (
        relative_error(ZImagePipeline.from_pretrained(golden.folder, dtype="float32").encode("a red fox"), wanted)
        > 1e-2
    )


def test_names_and_shapes_of_the_real_models_match_diffusers(torch):
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        models = {
            "transformer": ZImageTransformer2DModel(**test_shapes.TRANSFORMER),
            "text_encoder": Qwen3ForCausalLM(Qwen3Config(**test_shapes.TEXT_ENCODER)),
            "vae": AutoencoderKL(
                **{key: value for key, value in test_shapes.VAE.items() if key[0] != "_"},
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
            ),
        }
    for component, model in models.items():
        # tied weights have only one name here
        wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        wanted.pop("lm_head.weight", None)  # transformers 5.0 ties it to the embeddings only when weights are loaded
        assert test_shapes.CONFIGS[component].shapes() == wanted


def test_pixels_are_rounded_to_integers_as_in_diffusers(theirs, torch):
    from mlx_zimage.images.codec import to_uint8

    pixels = np.linspace(-1.2, 1.2, 3 * 64 * 64, dtype=np.float32).reshape(64, 64, 3)
    wanted = theirs.image_processor.postprocess(torch.from_numpy(pixels.transpose(2, 0, 1))[None])[0]
    assert isinstance(wanted, Image.Image)
    assert np.array_equal(to_uint8(mx.array(pixels)), np.array(wanted))
