"""The VAE by strips: the whole picture's result in a fraction of its memory."""

import mlx.core as mx
import pytest

from mlx_zimage.models.vae import VAE
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
