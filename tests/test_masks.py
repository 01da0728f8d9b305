"""Masks and outpainting's canvas; see mlx_zimage/images/masks.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw

from mlx_zimage.errors import RequestError
from mlx_zimage.images.masks import (
    canvas,
    canvas_mask,
    canvas_size,
    feathered,
    fit_mask,
    largest_within,
    paste,
    read_mask,
    to_latents,
    values,
)
from mlx_zimage.images.source import cover
from mlx_zimage.request import Outpaint


def disc(size: int = 128, radius: int = 40) -> np.ndarray:
    image = Image.new("L", (size, size))
    ImageDraw.Draw(image).circle((size // 2, size // 2), radius, 255)
    return np.asarray(image, np.float32) / 255


# ---- reading


def test_white_is_regenerated_in_every_mode(tmp_path):
    grey = Image.fromarray((255 * disc()).astype(np.uint8))
    transparent = Image.new("RGBA", grey.size, "white")
    transparent.putalpha(grey)  # painted in white on a transparent layer
    for i, image in enumerate((grey, grey.convert("1"), grey.convert("RGB"), grey.convert("P"), transparent)):
        image.save(tmp_path / f"{i}.png")
        assert np.array_equal(values(read_mask(tmp_path / f"{i}.png")), disc())
    assert np.array_equal(values(read_mask(disc())), disc())


def test_transparent_is_editable_where_asked():
    image = Image.new("RGB", (128, 128), (10, 200, 90))
    image.putalpha(Image.fromarray((255 * (1 - disc())).astype(np.uint8)))
    assert np.array_equal(values(read_mask(image, transparent=True)), disc())
    with pytest.raises(RequestError, match="no transparent pixel"):
        read_mask(image.convert("RGB"), transparent=True)


def test_a_mask_is_split_at_half_as_in_diffusers_unless_it_is_soft():
    levels = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert values(levels).tolist() == [[0, 0, 1, 1]]
    assert values(levels, soft=True)[0] * 255 == pytest.approx([0, 127, 128, 255])


def test_a_black_mask_is_refused():
    with pytest.raises(RequestError, match="the mask is black"):
        values(Image.new("L", (16, 16), 100))


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(RequestError, match="the mask has 64x32 pixels, but the image has 100x50"):
        fit_mask(Image.new("L", (64, 32)), (100, 50), 96, 48)


def test_a_mask_is_resized_with_its_image():
    image, mask = Image.new("RGB", (400, 200), "black"), Image.new("L", (400, 200), 0)
    for each in (image, mask):
        ImageDraw.Draw(each).rectangle((200, 50, 299, 149), "white")
    for size in ((208, 208), (320, 96), (400, 192)):
        fitted = fit_mask(mask, (400, 200), *size)
        assert fitted.size == size and fitted == cover(image, *size).convert("L")
    assert fit_mask(mask, (1000, 500), 400, 200) is mask  # already of the final size


# ---- growing, feathering, pasting


@given(arrays.arrays(np.float32, (12, 9), elements=st.sampled_from([0, 0.25, 0.5, 1])), st.integers(0, 14))
def test_growing_takes_the_largest_value_of_the_square_around_each_pixel(mask, pixels):
    expected = [
        [mask[max(i - pixels, 0) : i + pixels + 1, max(j - pixels, 0) : j + pixels + 1].max() for j in range(9)]
        for i in range(12)
    ]
    assert np.array_equal(largest_within(mask, pixels), np.array(expected))


def test_every_masked_pixel_is_in_a_masked_latent():
    mask = np.zeros((32, 48), np.float32)
    mask[7, 8] = 1  # the nearest pixel, at (0, 8), would miss it
    mask[31, 47] = 0.25
    latents = to_latents(mask)
    assert latents.shape == (4, 6) and latents[0, 1] == 1 and latents[3, 5] == 0.25 and latents.sum() == 1.25


@given(st.integers(0, 40), st.integers(2, 60), st.integers(0, 128), st.integers(0, 128))
def test_a_feather_stays_inside_the_mask_and_something_of_it_is_left(feather, radius, x, y):
    mask = np.roll(disc(128, radius), (x, y), (0, 1))
    weights = feathered(mask, feather)
    assert (weights[mask == 0] == 0).all() and weights.max() == 1 and weights.min() == 0
    assert np.array_equal(feathered(mask, 0), mask)


def test_a_feather_rises_smoothly_over_its_width():
    mask = np.zeros((8, 64), np.float32)
    mask[:, 20:] = 1  # up to the side of the image, where it does not fall
    rising = feathered(mask, 16)[4]
    assert (np.diff(rising) >= 0).all() and np.diff(rising).max() < 2.5 / 16
    assert (rising[:20] == 0).all() and rising[20] < 0.1 and (rising[36:] == 1).all()


@settings(deadline=None)  # a busy machine takes longer
@given(st.integers(0, 32), st.integers(0, 2**32))
def test_pasting_changes_no_pixel_outside_the_mask(feather, seed):
    original, generated = np.random.default_rng(seed).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    mask = disc()
    pasted = paste(original, generated, feathered(mask, feather))
    assert np.array_equal(pasted[mask == 0], original[mask == 0])
    assert np.array_equal(pasted[64, 64], generated[64, 64])


# ---- outpainting


def test_outpaint_is_read_from_text_or_json():
    assert Outpaint.of("left=256,top=128") == Outpaint(left=256, top=128)
    assert Outpaint.of({"right": 16, "bottom": 32}) == Outpaint.of("right=16,bottom=32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("left=250", "left must be a multiple of 16 pixels, got 250; the nearest are 240 and 256"),
        ("left=0", "expected at least one side to extend"),
        ("up=16", "such as left=256,top=128"),
        ("left=16,left=32", "at most once"),
        ("left", "such as left=256,top=128"),
        ("", "such as left=256,top=128"),
        ("left=-16", "such as left=256,top=128"),
        ("left=16000", "from 0 to 8192"),
    ],
)
def test_other_text_is_refused(text, message):
    with pytest.raises(RequestError, match=message):
        Outpaint.of(text)


@pytest.mark.parametrize(
    "sides", ["left=64", "top=64", "right=64", "bottom=64", "left=64,top=32", "right=16,bottom=96"]
)
def test_a_canvas_continues_the_image_and_keeps_it_exactly(sides):
    y, x = np.mgrid[:96, :128]
    image = np.stack([2 * x, 2 * y, (x // 16 + y // 16) % 2 * 200], -1).astype(np.uint8)
    outpaint = Outpaint.of(sides)
    size = canvas_size(outpaint, (128, 96), 1024**2)
    filled, mask = canvas(Image.fromarray(image), outpaint, *size), canvas_mask(outpaint, *size)
    assert filled.shape[1::-1] == mask.shape[::-1] == size
    kept = filled[outpaint.top :, outpaint.left :][:96, :128]
    assert np.array_equal(kept, image) and mask.sum() == mask.size - 96 * 128
    assert (mask[outpaint.top :, outpaint.left :][:96, :128] == 0).all()
    for axis in (0, 1):  # the steps between pixels across the border are like those within the image
        across = np.abs(np.diff(filled.astype(int), axis=axis))[np.diff(mask, axis=axis) != 0]
        assert not len(across) or across.mean() <= 2


def test_the_size_of_a_canvas_is_that_of_the_whole():
    outpaint = Outpaint.of("left=64,top=32")
    assert canvas_size(outpaint, (640, 480), 1024**2) == (704, 512)
    assert canvas_size(outpaint, (640, 480), 1024**2, width=384) == (384, 272)
    with pytest.raises(RequestError, match="width 64 leaves no room for the image"):
        canvas_size(outpaint, (640, 480), 1024**2, width=64)
