import sys

import numpy as np
import pytest

from mlx_zimage.detectors import LIBRARIES
from mlx_zimage.images.controls import PREPARATIONS, _grown, canny, gray, prepared, scribble, tile
from mlx_zimage.request import CONTROLS


def disc(side: int = 64, radius: int = 20) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    return np.where((x**2 + y**2 < radius**2)[..., None], np.uint8(220), np.uint8(20)).repeat(3, axis=-1)


def test_every_kind_of_control_image_that_a_request_may_name_can_be_made():
    assert (*PREPARATIONS, *LIBRARIES) == CONTROLS
    for kind in PREPARATIONS:
        made = prepared(disc(), kind)
        assert made.shape == (64, 64, 3) and made.dtype == np.uint8
    assert prepared(disc(), None) is not None and np.array_equal(prepared(disc(), None), disc())


def test_canny_finds_a_thin_closed_outline():
    edges = canny(disc())[..., 0] > 0
    y, x = np.nonzero(edges)
    distance = np.hypot(x - 31.5, y - 31.5)
    assert np.abs(distance - 20).max() < 1.5
    angles = np.unique((np.arctan2(y - 31.5, x - 31.5) * 36 / np.pi).round())
    assert len(angles) >= 70  # all around, in steps of five degrees
    assert edges.sum() < 1.3 * 2 * np.pi * 20  # one pixel wide
    assert not canny(np.full((32, 32, 3), 90, np.uint8)).any()


def test_canny_keeps_weak_edges_only_next_to_strong_ones():
    ramp = np.zeros((40, 64, 3), np.uint8)
    ramp[20:] = np.linspace(255, 60, 64)[:, None]  # a strong edge that becomes weak
    edges = canny(ramp)[..., 0] > 0
    assert edges[18:22].any(axis=0)[:50].all()
    ramp[20:] = 70
    assert not canny(ramp).any()


def test_a_scribble_is_thicker_than_edges_and_near_them():
    assert scribble(disc()).mean() > 2 * canny(disc()).mean()


def test_gray_has_the_luminance_and_no_colour():
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    made = gray(colours)
    assert (made[..., 0] == made[..., 1]).all()
    # Pillow rounds its weights to 16 bits
    assert np.abs(made[..., 0] - colours @ [0.299, 0.587, 0.114]).max() <= 1


@pytest.mark.parametrize("size", [(64, 64), (17, 30), (1, 3)])
def test_a_tile_keeps_the_size_and_the_mean_but_not_the_detail(size):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    made = tile(noise)
    assert made.shape == noise.shape
    if min(size) > 16:
        assert abs(made.mean() - noise.mean()) < 6 and made.std() < 0.5 * noise.std()


def test_long_edges_are_found_without_a_loop_over_their_pixels():
    spiral = np.zeros((300, 300, 3), np.uint8)
    for i in range(0, 150, 8):
        spiral[i : 300 - i, i : 300 - i] = 255 * (i // 8 % 2)
    assert canny(spiral)[..., 0].any()


def test_edges_grow_along_the_longest_line_in_few_rounds():
    line = np.zeros((200, 200), bool)
    line[::2] = True
    line[1::4, -1] = line[3::4, 0] = True  # one line of 20,100 pixels through the whole image
    start = np.zeros_like(line)
    start[0, 0] = True
    executed = []

    def trace(frame, event, value):
        if frame.f_code is _grown.__code__:
            executed.append(frame.f_lineno)
            return trace
        return None

    sys.settrace(trace)
    try:
        grown = _grown(start, line)
    finally:
        sys.settrace(None)
    assert np.array_equal(grown, line)
    assert len(executed) < 500  # pixel by pixel there were about 80,000: 22 s for an image of 2048x2048


def test_edges_grow_only_within_what_a_seed_touches():
    rng = np.random.default_rng(0)
    within = rng.random((40, 60)) < 0.4
    seeds = rng.random(within.shape) < 0.02
    grown, before = seeds & within, None
    while not np.array_equal(grown, before):
        before = grown
        padded = np.pad(grown, 1)
        grown = within & np.any([padded[y : y + 40, x : x + 60] for y in range(3) for x in range(3)], axis=0)
    assert np.array_equal(_grown(seeds, within), grown) and grown.sum() < within.sum()
