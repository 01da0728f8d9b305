"""The VAE in strips: the same result as for the whole image, in a fraction of the memory."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from lanes import slow

from mlx_zimage.distributed import Group
from mlx_zimage.models import vae
from mlx_zimage.models.vae import VAE, Rows, Strips
from mlx_zimage.weights.blocks import Blocks
from mlx_zimage.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.metal


@pytest.fixture(scope="module")
def runner():
    return Blocks(open_checkpoint("pocket").vae, mx.float32)


def peak_of(compute) -> tuple[mx.array, int]:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    result = compute()
    mx.eval(result)
    return result, mx.get_peak_memory() - before


@pytest.mark.parametrize("strip_bytes", [slow(2**17), 2**15, slow(2**13)])
@pytest.mark.parametrize("size", [(4, 8), (7, 4), slow((8, 12))])
def test_decoding_in_strips_equals_decoding_whole(runner, strip_bytes, size):
    mx.random.seed(1)
    latents = mx.random.normal((1, *size, 16))
    whole = VAE(runner.weights.config, runner).decode(latents)
    strips = VAE(runner.weights.config, runner, strip_bytes).decode(latents)
    # float32: only products of few rows may be summed in another order; measured 1.2e-6 of the largest value
    assert mx.abs(whole - strips).max() < 1e-5 * mx.abs(whole).max()


@pytest.mark.parametrize("strip_bytes", [slow(2**17), 2**15, slow(2**13)])
def test_encoding_in_strips_equals_encoding_whole(runner, strip_bytes):
    mx.random.seed(2)
    pixels = mx.tanh(mx.random.normal((1, 112, 48, 3)))
    whole = VAE(runner.weights.config, runner).encode(pixels)
    strips = VAE(runner.weights.config, runner, strip_bytes).encode(pixels)
    # as above; white noise through a trained encoder gives values of several units
    assert mx.abs(whole - strips).max() < 1e-5 * mx.abs(whole).max()


@pytest.mark.parametrize("size", [(12, 8), pytest.param((16, 16), marks=pytest.mark.slow)])
def test_strips_need_a_fraction_of_the_memory(on_cpu, size):
    """On a CPU: for so small an image, nearly all the memory on a GPU would be scratch memory for convolutions, whose
    size does not depend on the image's."""
    runner = Blocks(open_checkpoint("pocket").vae, mx.float32)
    latents = mx.random.normal((1, *size, 16))
    runner.tree("decoder")
    _, whole = peak_of(lambda: VAE(runner.weights.config, runner).decode(latents))
    _, strips = peak_of(lambda: VAE(runner.weights.config, runner, 2**15).decode(latents))
    assert strips < whole / 3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (7, 2), (6, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_sum_of_products_equals_a_convolution(on_cpu, watch, height, width, batch):
    mx.random.seed(3)
    x, kernel = mx.random.normal((batch, height, width, 8)), mx.random.normal((16, 3, 3, 8))
    weights = {"weight": kernel, "bias": mx.random.normal((16,))}
    expected = mx.conv2d(x, kernel, padding=1) + weights["bias"]
    products = watch(vae, "sum_of_products")
    # float32: sums of 72 products of order 1, in another order
    assert mx.abs(vae.conv(Rows.of(x), weights).get(0, height) - expected).max() < 1e-4
    for row in range(height):
        assert mx.abs(vae.conv(Rows.of(x), weights).get(row, row + 1) - expected[:, row : row + 1]).max() < 1e-4
    assert len(products) == 1 + height


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_cpu_uses_mlx_convolutions_in_16_bits(on_cpu, dtype):
    x, kernel = (mx.random.normal(shape).astype(dtype) for shape in ((1, 5, 4, 8), (16, 3, 3, 8)))
    weights = {"weight": kernel, "bias": mx.zeros((16,), dtype)}
    assert mx.array_equal(vae.conv(Rows.of(x), weights).get(0, 5), mx.conv2d(x, kernel, padding=1))


def test_a_mac_can_compute_on_its_cpu(on_cpu, runner, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    latents = mx.random.normal((1, 4, 4, 16))
    assert VAE(runner.weights.config, runner).decode(latents).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("height", [1, 2, 5])
def test_computing_in_two_halves_changes_nothing(on_cpu, height):
    rows, scale, shift = (mx.random.normal((2, height, 3, 4)) for _ in range(3))
    scale, shift = scale[:, :1], shift[:, :1]
    assert mx.array_equal(vae.in_halves(vae.affine, rows, scale, shift), vae.affine(rows, scale, shift))


def test_moments_computed_in_strips_equal_those_of_the_whole():
    mx.random.seed(4)
    x = 100 + mx.random.normal((2, 9, 5, 12))  # far from zero, where summing squares would lose all digits
    groups = np.array(x, dtype=np.float64).reshape(2, 9 * 5, 4, 3)
    found = Strips(2 * 5 * 12 * 4 * 4).moments(Rows.of(x), 4)
    for name, moment in zip(("mean", "var"), found, strict=True):
        expected = getattr(groups, name)(axis=(1, 3))
        # float32: one rounding at 100 is 4e-6, and the means of means take several; measured 2e-5
        assert np.abs(np.array(moment).reshape(2, 4) - expected).max() < 5e-5, name


@pytest.mark.parametrize("strip_bytes", [2**15, pytest.param(2**13, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [(24, 40), pytest.param((40, 56), marks=pytest.mark.slow)])
def test_batches_are_encoded_and_decoded_in_strips(runner, strip_bytes, size):
    mx.random.seed(5)
    pixels = mx.tanh(mx.random.normal((3, *size, 3)))
    whole, strips = (VAE(runner.weights.config, runner, size) for size in (None, strip_bytes))
    latents = whole.encode(pixels)
    # as above
    assert mx.abs(latents - strips.encode(pixels)).max() < 1e-5 * mx.abs(latents).max()
    expected = whole.decode(latents)
    assert mx.abs(expected - strips.decode(latents)).max() < 1e-5 * mx.abs(expected).max()


class Rank(Group):
    """A rank that runs in a thread of this process beside the others."""

    def __init__(self, number: int, size: int, sent: list, barrier: threading.Barrier, speeds: list[float] | None):
        self.sent, self.barrier = sent, barrier
        super().__init__(SimpleNamespace(rank=lambda: number, size=lambda: size), speeds)

    def _all_gather(self, x: mx.array) -> mx.array:
        self.sent[self.rank] = np.array(x.astype(mx.float32))
        self.barrier.wait()
        everything = mx.array(np.concatenate(self.sent)).astype(x.dtype)
        self.barrier.wait()
        return everything


def on_each(size: int, speeds: list[float] | None, compute: Callable[[Group], mx.array]) -> list[np.ndarray]:
    """What each of several ranks computes."""
    sent, barrier = [None] * size, threading.Barrier(size, timeout=60)
    with ThreadPoolExecutor(size) as pool:
        ranks = [Rank(number, size, sent, barrier, speeds) for number in range(size)]
        return list(pool.map(lambda rank: np.array(compute(rank)), ranks))


@pytest.mark.parametrize(("size", "speeds", "strip_bytes"), [slow(2, None, None), (3, [1, 2, 1.5], 2**15)])
def test_ranks_that_decode_rows_give_what_one_rank_gives_for_all(runner, size, speeds, strip_bytes, on_cpu, watch):
    mx.random.seed(4)
    latents = mx.random.normal((1, 77, 3, 16))
    runner.tree("decoder")
    whole = np.array(VAE(runner.weights.config, runner).decode(latents))
    rows = watch(vae, "conv")
    found = on_each(
        size, speeds, lambda rank: VAE(runner.weights.config, runner, strip_bytes, ranks=rank).decode(latents)
    )
    assert all(x.end - x.first < x.height for x in rows), "no rank computes all rows"
    for image in found:
        assert np.array_equal(image, found[0])
        # float32: products of fewer rows may be summed in another order, as in strips
        assert np.abs(image - whole).max() < 1e-5 * np.abs(whole).max()


def test_ranks_that_encode_rows_give_what_one_rank_gives_for_all(runner, on_cpu, watch):
    mx.random.seed(5)
    pixels = mx.tanh(mx.random.normal((1, 480, 16, 3)))
    runner.tree("encoder")
    whole = np.array(VAE(runner.weights.config, runner).encode(pixels))
    rows = watch(vae, "conv")
    for latents in on_each(2, None, lambda rank: VAE(runner.weights.config, runner, ranks=rank).encode(pixels)):
        assert np.abs(latents - whole).max() < 1e-5 * np.abs(whole).max()  # as above
    assert all(x.end - x.first < x.height for x in rows), "no rank computes all rows"


def test_ranks_that_would_not_save_rows_compute_all_of_them(runner):
    latents = mx.random.normal((1, 16, 8, 16))
    group = Group(SimpleNamespace(rank=lambda: 0, size=lambda: 4))  # which could not gather
    assert VAE(runner.weights.config, runner, ranks=group).decode(latents).shape == (1, 128, 64, 3)
