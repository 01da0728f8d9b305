"""The VAE by strips: the whole picture's result in a fraction of its memory."""

import mlx.core as mx
import pytest

from mlx_zimage.models import vae
from mlx_zimage.models.vae import VAE, Rows, Strips
from mlx_zimage.weights import Source, open_checkpoint


@pytest.fixture(scope="module")
def source():
    return Source(open_checkpoint("pocket").vae, mx.float32)


def peak_of(compute) -> tuple[mx.array, int]:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    result = compute()
    mx.eval(result)
    return result, mx.get_peak_memory() - before


@pytest.mark.parametrize("strip_bytes", [2**17, 2**15, 2**13])
@pytest.mark.parametrize("size", [(8, 12), (7, 4)])
def test_decoding_by_strips_equals_decoding_whole(source, strip_bytes, size):
    mx.random.seed(1)
    latents = mx.random.normal((1, *size, 16))
    whole = VAE(source.component.config, source).decode(latents)
    strips = VAE(source.component.config, source, strip_bytes).decode(latents)
    # float32: only the statistics' sums are taken in another order; measured 7e-6 of 1.1
    assert mx.abs(whole - strips).max() < 1e-5 * mx.abs(whole).max() * 2


@pytest.mark.parametrize("strip_bytes", [2**17, 2**15, 2**13])
def test_encoding_by_strips_equals_encoding_whole(source, strip_bytes):
    mx.random.seed(2)
    pixels = mx.tanh(mx.random.normal((1, 112, 48, 3)))
    whole = VAE(source.component.config, source).encode(pixels)
    strips = VAE(source.component.config, source, strip_bytes).encode(pixels)
    # as above; white noise through a trained encoder makes values of several units
    assert mx.abs(whole - strips).max() < 1e-5 * mx.abs(whole).max() * 2


def test_strips_need_a_fraction_of_the_memory(source):
    latents = mx.random.normal((1, 16, 16, 16))
    source.tree("decoder")
    _, whole = peak_of(lambda: VAE(source.component.config, source).decode(latents))
    _, strips = peak_of(lambda: VAE(source.component.config, source, 2**15).decode(latents))
    assert strips < whole / 3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (7, 2), (6, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_sum_of_products_is_the_convolution(height, width, batch):
    mx.random.seed(3)
    x, kernel = mx.random.normal((batch, height, width, 8)), mx.random.normal((16, 3, 3, 8))
    weights = {"weight": kernel, "bias": mx.random.normal((16,))}
    expected = mx.conv2d(x, kernel, padding=1) + weights["bias"]
    # float32: sums of 72 products of order 1, in another order
    assert mx.abs(vae.conv(Rows.of(x), weights).get(0, height) - expected).max() < 1e-4
    for row in range(height):
        assert mx.abs(vae.conv(Rows.of(x), weights).get(row, row + 1) - expected[:, row : row + 1]).max() < 1e-4


@pytest.mark.parametrize("height", [1, 2, 5])
def test_work_in_two_halves_is_the_work_at_once(height):
    rows, scale, shift = (mx.random.normal((2, height, 3, 4)) for _ in range(3))
    scale, shift = scale[:, :1], shift[:, :1]
    assert mx.array_equal(vae.spread(vae.affine, rows, scale, shift), vae.affine(rows, scale, shift))


def test_moments_of_strips_are_those_of_the_whole():
    mx.random.seed(4)
    x = 100 + mx.random.normal((2, 9, 5, 12))  # far from zero, where sums of squares would lose every digit
    groups = x.reshape(2, 9 * 5, 4, 3)
    found = Strips(2 * 5 * 12 * 4 * 4).moments(Rows.of(x), 4)
    for name, moment, expected in zip(
        ("mean", "variance"), found, (groups.mean(axis=(1, 3)), groups.var(axis=(1, 3))), strict=True
    ):
        # float32 at 100: a rounding of the inputs alone is 4e-6
        assert mx.abs(moment.reshape(2, 4) - expected).max() < 1e-4, name
