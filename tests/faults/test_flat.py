"""Weights that are finite but absurd give an image that shows nothing, which is a warning."""

import mlx.core as mx
import numpy as np
import pytest
from lanes import slow

from mlx_zimage import ZImagePipeline
from mlx_zimage.images.codec import is_flat
from mlx_zimage.pipeline import FlatImage

FILE = "vae/diffusion_pytorch_model.safetensors"


def generate(folder, **options):
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32")
    return pipe("a fox", width=32, height=32, num_inference_steps=1, seed=3, **options).images


@pytest.mark.parametrize(
    ("weight", "bias"), [(0, 0.3), slow(0, 1e30), slow(1e20, 0)], ids=["grey", "white", "saturated"]
)
def test_an_absurd_last_layer_gives_a_warning(folder, weight, bias):
    arrays = mx.load(str(folder / FILE))
    mx.eval(arrays)
    for name, factor in (("weight", weight), ("bias", 0)):
        arrays[f"decoder.conv_out.{name}"] = arrays[f"decoder.conv_out.{name}"] * factor
    arrays["decoder.conv_out.bias"] = (arrays["decoder.conv_out.bias"] + bias).astype(mx.bfloat16)
    mx.save_safetensors(str(folder / FILE), arrays)
    with pytest.warns(FlatImage, match="image 1 of seed 3 is a single colour") as caught:
        assert len(generate(folder, num_images_per_prompt=2)) == 2
    assert sum(warning.category is FlatImage for warning in caught) == 2


def test_an_image_that_shows_something_is_not_flat(folder, recwarn):
    generate(folder)
    assert not [warning for warning in recwarn if warning.category is FlatImage]
    almost = np.full((8, 8, 3), 0.5, np.float32)
    assert is_flat(almost) and is_flat(almost * 0)
    almost[3, 4, 1] = 0.51
    assert not is_flat(almost)
    stripes = np.tile(np.array([0, 1], np.float32), 96).reshape(8, 8, 3)
    assert is_flat(stripes)
    stripes[0, 0, 0] = 0.4
    assert not is_flat(stripes)
