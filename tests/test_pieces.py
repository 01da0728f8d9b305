"""Kernels that would take seconds are computed in pieces: the same numbers, and no more at a time than is allowed."""

import math
from math import prod

import mlx.core as mx
import pytest
import tiny
from compare import TOLERANCE, relative_error

from mlx_zimage.models import layers, vae
from mlx_zimage.models.layers import dot_product_attention, linear, pieces
from mlx_zimage.models.transformer import Transformer
from mlx_zimage.models.vae import VAE, Rows
from mlx_zimage.weights.blocks import Blocks
from mlx_zimage.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.metal


@pytest.fixture
def flops(monkeypatch) -> list[float]:
    """FLOP of every product, attention and convolution from here on."""
    seen: list[float] = []

    def note(module, name: str, count) -> None:
        original = getattr(module, name)

        def noted(*args, **options):
            result = original(*args, **options)
            seen.append(count(result, *args))
            return result

        monkeypatch.setattr(module, name, noted)

    note(mx, "matmul", lambda y, x, w: 2 * y.size * x.shape[-1])
    note(mx, "addmm", lambda y, c, x, w: 2 * y.size * x.shape[-1])
    for convolution in ("conv2d", "conv_general"):
        note(mx, convolution, lambda y, x, w: 2 * y.size * prod(w.shape[1:]))
    note(mx.fast, "scaled_dot_product_attention", lambda y, q, k, v: 4 * y.size * k.shape[2])
    return seen


@pytest.mark.parametrize(("rows", "most"), [(1, 1.0), (640, 1e3), (1000, 1e4), (1000, 64e3), (1000, math.inf)])
def test_pieces_cover_every_row_once_and_are_as_large_as_allowed(rows, most):
    found = pieces(rows, 1e2, most)
    assert [row for a, b in found for row in range(a, b)] == list(range(rows))
    assert max(b - a for a, b in found) * 1e2 <= max(64e2, most)
    assert len(found) == 1 or most < rows * 1e2


@pytest.mark.parametrize("bias", [{}, {"bias": mx.arange(96, dtype=mx.float32)}], ids=["no bias", "bias"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_product_in_pieces_equals_the_whole_one(bias, packed, flops):
    mx.random.seed(0)
    x, weight = mx.random.normal((2, 200, 128)), mx.random.normal((96, 128))
    weights = {"weight": weight} | bias
    if packed:
        packing = {"group_size": 64, "bits": 4, "mode": "affine"}
        weights |= dict(zip(("weight", "scales", "biases"), mx.quantize(weight), strict=True)) | {"packing": packing}
    whole = linear(x, weights)
    most = 2 * 128 * 96 * 128  # FLOP of 128 rows
    flops.clear()
    parts = linear(x, weights, most=most)
    assert len(flops) == 4 and max(flops) <= most
    # float32: a BLAS may sum 128 products of order 1 in another order for fewer rows
    assert parts.shape == whole.shape and mx.abs(parts - whole).max() < 1e-4


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_attention_in_pieces_equals_the_whole_one(dtype, flops):
    mx.random.seed(1)
    q, k, v = (mx.random.normal((2, 3, rows, 64)).astype(dtype) for rows in (300, 320, 320))
    whole = dot_product_attention(q, k, v)
    most = 4 * 2 * 3 * 64 * 320 * 100  # FLOP of 100 rows
    flops.clear()
    parts = dot_product_attention(q, k, v, most)
    assert len(flops) == 5 and max(flops) <= most
    # each row is computed alike; only a BLAS or a GPU's kernels may sum in another order for fewer rows, and 16 bits
    # round it
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    assert mx.abs(parts - whole).max() <= tolerance


def velocity(most: float) -> mx.array:
    component = open_checkpoint("pocket").transformer
    product = layers.product_from(0, most)
    network = Transformer(component.config, Blocks(component, mx.float32), product, most=most)
    latents = mx.array(tiny.randn(0, "pieces", 1, 24, 24, 16))
    cap_feats = mx.array(tiny.randn(0, "pieces.cap", 20, component.config.cap_feat_dim))
    return network.velocity(cap_feats, [1.0], 24, 24)(latents, 0)


def test_a_network_in_pieces_equals_the_whole_one(flops):
    whole = velocity(math.inf)
    most = max(flops) / 2
    calls = len(flops)
    flops.clear()
    parts = velocity(most)
    assert len(flops) > calls and max(flops) <= most
    # float32, a few blocks of sums in another order, by other kernels on a GPU; on a CPU 1e-5 is enough
    assert relative_error(parts, whole) < TOLERANCE


@pytest.fixture
def as_on_metal(on_cpu, monkeypatch):
    """The VAE takes the code paths that it takes on Metal, whose convolutions a CPU can do as well."""
    monkeypatch.setattr(vae, "backend", lambda: "metal")


def test_kept_strips_bound_convolutions_and_decode_the_same(as_on_metal, flops):
    runner = Blocks(open_checkpoint("pocket").vae, mx.float32)
    latents = mx.array(tiny.randn(0, "pieces.vae", 1, 12, 8, 16))
    whole = VAE(runner.weights.config, runner).decode(latents)
    most, calls = max(flops) / 3, len(flops)
    flops.clear()
    strips = VAE(runner.weights.config, runner, most=most).decode(latents)
    assert len(flops) > calls and max(flops) <= most
    # float32, sums of fewer rows in another order: measured 1.2e-6 of the largest
    assert mx.abs(strips - whole).max() < 1e-5 * mx.abs(whole).max()


def test_a_limit_that_is_not_reached_changes_no_bit(as_on_metal):
    runner = Blocks(open_checkpoint("pocket").vae, mx.float32)
    latents = mx.array(tiny.randn(0, "pieces.vae", 1, 6, 8, 16))
    whole, strips = (VAE(runner.weights.config, runner, most=most).decode(latents) for most in (math.inf, 1e15))
    assert mx.array_equal(whole, strips)


def test_scores_of_the_vae_are_bounded_on_every_backend(as_on_metal, monkeypatch):
    runner = Blocks(open_checkpoint("pocket").vae, mx.float32)
    latents = mx.array(tiny.randn(0, "pieces.vae", 1, 6, 8, 16))
    whole = VAE(runner.weights.config, runner).decode(latents)
    attention = mx.fast.scaled_dot_product_attention
    rows: list[int] = []

    def noted(q, *args, **options):
        rows.append(q.shape[2])
        return attention(q, *args, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", noted)
    VAE(runner.weights.config, runner).decode(latents)
    assert rows == [48], "so few are computed at once"
    monkeypatch.setattr(vae, "SCORES", 4 * 48 * 10)  # of 10 queries
    parts = VAE(runner.weights.config, runner).decode(latents)
    assert len(rows) == 1 + 5 and max(rows[1:]) <= 10
    assert mx.abs(parts - whole).max() < 1e-5 * mx.abs(whole).max()  # as above


@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_that_are_kept_flipped_convolve_like_plain_ones(on_cpu, monkeypatch, stride):
    mx.random.seed(2)
    x, weight, bias = mx.random.normal((1, 9, 7, 8)), mx.random.normal((4, 3, 3, 8)), mx.random.normal((4,))
    expected = mx.conv2d(x, weight, stride=stride, padding=1) + bias
    monkeypatch.setattr(vae, "backend", lambda: "metal")
    weights = {"weight": vae.kernel(weight), "bias": bias}
    assert not mx.array_equal(weights["weight"], weight)
    assert mx.array_equal(vae.convolve(x, weights, stride=stride, padding=(1, 1)), expected)
    if stride == 1:
        assert mx.array_equal(vae.conv(Rows.of(x), weights).get(0, 9), expected)
