"""Gradients computed block by block are those of the whole network at once, in less memory."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import relative_error
from lanes import slow
from mlx.utils import tree_flatten, tree_unflatten

from mlx_zimage.models.layers import dequantize, dot_product_attention, linear, pack
from mlx_zimage.models.runner import PlainRunner
from mlx_zimage.models.transformer import Transformer, TransformerConfig, row
from mlx_zimage.quantization import Quantization
from mlx_zimage.train import attention
from mlx_zimage.train.factors import laid, new_factors
from mlx_zimage.train.gradients import Gradients, Sample
from mlx_zimage.weights.blocks import Blocks
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.deltas import LowRank
from mlx_zimage.weights.overlay import Overlay

CONFIG = TransformerConfig.from_dict(tiny.TRANSFORMER)
SCALE = 0.5
# float32, the same operations in another order: measured 2e-6 of a gradient's largest value
TOLERANCE = 2e-5


def plain_tree() -> dict:
    arrays = tiny.weights(0, "transformer", tiny.TRANSFORMER)
    found = {name: CONFIG.sanitize(name, mx.array(array)) for name, array in arrays.items()}
    return tree_unflatten(list(found.items()))


def sample(sigma: float = 0.7, weight: float = 1.0) -> Sample:
    latents, noise = (mx.array(tiny.randn(0, tag, 1, 12, 10, 16)) for tag in ("train.x", "train.noise"))
    return Sample(latents, mx.array(tiny.randn(0, "train.cap", 20, CONFIG.cap_feat_dim)), noise, sigma, weight)


def random_factors(rank: int = 4, extras: tuple = ()) -> dict:
    """Factors that change something, and so have gradients."""
    factors = new_factors(CONFIG, rank, extras, seed=0)
    for block, layers in factors.items():
        for layer, own in layers.items():
            own["up"] = mx.array(0.3 * tiny.randn(0, f"{block}.{layer}.up", *own["up"].shape))
    return factors


def whole_loss(tree: dict, factors: dict, sample: Sample) -> mx.array:
    """The loss by the network's own methods, with all factors laid over a tree that is all in memory."""
    top = tree
    for block, layers in factors.items():
        kind, number = block.split(".")
        blocks = list(top[kind])
        blocks[int(number)] = laid(blocks[int(number)], layers, SCALE, mx.float32)
        top = {**top, kind: blocks}
    network = Transformer(CONFIG, PlainRunner(top))
    _, h, w, _ = sample.latents.shape
    modulations, finals = network.modulate([1 - sample.sigma])
    captions = network.captions([sample.cap_feats], h, w)
    noisy = (1 - sample.sigma) * sample.latents + sample.sigma * sample.noise
    (found,) = network(noisy, captions, row(modulations, 0), row(finals, 0))
    return sample.weight * mx.square(found - (sample.latents - sample.noise)).mean()


@pytest.mark.parametrize("fused", [False, True], ids=["in pieces", "as a whole"])
@pytest.mark.parametrize("extras", [(), ("adaln",), ("refiners",), ("adaln", "refiners")])
def test_gradients_block_by_block_equal_those_of_the_whole_network(monkeypatch, extras, fused):
    monkeypatch.setattr(attention, "has_fused_gradient", lambda *_: fused)
    tree, factors, given = plain_tree(), random_factors(extras=extras), sample(weight=1.3)
    value, found = Gradients(CONFIG, PlainRunner(tree), SCALE)(factors, given)
    expected, wanted = mx.value_and_grad(lambda factors: whole_loss(tree, factors, given))(factors)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    found, wanted = dict(tree_flatten(found)), dict(tree_flatten(wanted))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert mx.abs(gradient).max() > 0, f"nothing depends on {name}"
        assert relative_error(found[name], np.array(gradient)) < TOLERANCE, name


def test_weights_streamed_from_disk_give_the_same_gradients(tiny_folder):
    component, given, factors = open_checkpoint(tiny_folder).transformer, sample(), random_factors()
    config = component.config
    found = [
        Gradients(config, Blocks(component, mx.float32, streamed), SCALE)(factors, given)
        for streamed in ((), config.blocks)
    ]
    (kept, by_kept), (streamed, by_streamed) = found
    assert mx.array_equal(kept, streamed)
    for (name, gradient), (_, other) in zip(tree_flatten(by_kept), tree_flatten(by_streamed), strict=True):
        assert mx.array_equal(gradient, other), name


def test_lean_blocks_have_the_same_gradients_in_less_memory(monkeypatch):
    tree, factors = plain_tree(), random_factors(extras=("adaln", "refiners"))
    latents, noise = (mx.array(tiny.randn(0, tag, 1, 40, 40, 16)) for tag in ("l.x", "l.noise"))
    given = replace(sample(), latents=latents, noise=noise)
    monkeypatch.setattr("mlx_zimage.train.block.ROWS", 80)  # of 448, with the caption: 6 parts, the last one smaller
    monkeypatch.setattr(attention, "SCORES", 2**16)
    found, peaks = [], []
    for lean in (False, True):
        gradients = Gradients(CONFIG, PlainRunner(tree), SCALE, lean=lean)
        mx.eval(tree, factors)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found.append(gradients(factors, given))
        mx.eval(found[-1])
        peaks.append(mx.get_peak_memory() - before)
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-5)
    for (name, wanted), (_, gradient) in zip(*(tree_flatten(by_factors) for _, by_factors in found), strict=True):
        assert relative_error(gradient, np.array(wanted)) < TOLERANCE, name
    assert peaks[1] < 0.9 * peaks[0]  # measured 0.81: the attention needs its memory either way


def test_an_adapter_takes_part_and_gets_no_gradient(tiny_folder):
    """As training adapters do. The result is the same as with its difference in the weights."""
    component, given, factors = open_checkpoint(tiny_folder).transformer, sample(), random_factors()
    config, name = component.config, "layers.1.attention.to_q.weight"
    down, up = (mx.array(tiny.randn(1, tag, *shape)) for tag, shape in (("down", (2, 48)), ("up", (48, 2))))
    overlay = Overlay(Blocks(component, mx.float32), config)
    overlay.attach("adapter", {name: LowRank(down, up, 0.1)})
    overlay.set({"adapter": 1.0})
    tree = {top: component.read(top, mx.float32)() for top in sorted({n.partition(".")[0] for n in component.entries})}
    layer = tree["layers"][1]["attention"]["to_q"]
    layer["weight"] = layer["weight"] + config.sanitize(name, 0.1 * up @ down)
    value, found = Gradients(config, overlay, SCALE)(factors, given)
    expected, wanted = Gradients(config, PlainRunner(tree), SCALE)(factors, given)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = dict(tree_flatten(wanted))
    for name, gradient in tree_flatten(found):
        assert relative_error(gradient, np.array(wanted[name])) < TOLERANCE, name


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_through_a_quantized_base_equal_those_through_its_dense_weights(bits):
    """Widths of 48 fit no group, so the layers are wider than the tiny model's."""
    x, probe = (mx.array(tiny.randn(0, tag, 1, 40, 64)) for tag in ("q.x", "q.probe"))
    weight = mx.array(tiny.randn(0, "q.w", 64, 64)) / 8
    q = Quantization(bits, 32)
    packed = {name.removeprefix("w."): array for name, array in pack("w.weight", weight, q).items()}
    own = {"down": mx.array(tiny.randn(0, "q.down", 4, 64)), "up": mx.array(tiny.randn(0, "q.up", 64, 4))}
    trees = [{**packed, "packing": q.to_dict()}, {"weight": dequantize({**packed, "packing": q.to_dict()}, mx.float32)}]

    def loss(own, x, tree, unpack_from):
        over = laid({"layer": tree}, {"layer": own}, SCALE, mx.float32)["layer"]
        return (linear(x, over, unpack_from) * probe).sum()

    for unpack_from in (0, 10**6):  # dequantized, and multiplied in packed form
        (packed_own, packed_x), (dense_own, dense_x) = (
            mx.grad(loss, argnums=(0, 1))(own, x, tree, unpack_from) for tree in trees
        )
        assert relative_error(packed_x, np.array(dense_x)) < TOLERANCE
        for part in own:
            assert relative_error(packed_own[part], np.array(dense_own[part])) < TOLERANCE


# ---- attention


@pytest.mark.parametrize("queries", [37, 200])
def test_attention_in_pieces_has_the_gradients_of_the_whole(monkeypatch, queries):
    shape = (1, 2, queries, 16)
    q, d = (mx.array(tiny.randn(0, tag, *shape)) for tag in ("a.q", "a.d"))
    k, v = (mx.array(tiny.randn(0, tag, 1, 2, 200, 16)) for tag in ("a.k", "a.v"))
    out, wanted = mx.vjp(lambda *given: dot_product_attention(*given), [q, k, v], [d])
    monkeypatch.setattr(attention, "SCORES", 1)  # pieces of 64
    assert relative_error(attention.attention(q, k, v), np.array(out[0])) < TOLERANCE
    for ours, theirs in zip(attention.gradients(q, k, v, out[0], d), wanted, strict=True):
        assert relative_error(ours, np.array(theirs)) < TOLERANCE


@pytest.mark.parametrize("queries", [37, 128, 200])
def test_mlx_differentiates_its_attention_for_multiples_of_128_queries_only(monkeypatch, queries):
    """MLX's CUDA build keeps all scores for the gradient of any other number of queries."""
    q, d = (mx.array(tiny.randn(0, tag, 1, 2, queries, 16)) for tag in ("f.q", "f.d"))
    k, v = (mx.array(tiny.randn(0, tag, 1, 2, 200, 16)) for tag in ("f.k", "f.v"))
    (out,), wanted = mx.vjp(dot_product_attention, [q, k, v], [d])
    counts = []

    def counted(q, k, v):
        counts.append(q.shape[2])
        return dot_product_attention(q, k, v)

    monkeypatch.setattr(attention, "dot_product_attention", counted)
    (ours,), found = mx.vjp(attention.differentiable, [q, k, v], [d])
    assert counts == [-(-queries // 128) * 128]
    for mine, theirs in zip((ours, *found), (out, *wanted), strict=True):
        assert relative_error(mine, np.array(theirs)) < TOLERANCE


@pytest.mark.metal
def test_no_array_has_a_score_for_each_pair_of_tokens(monkeypatch):
    length, heads = 2048, 2
    q, k, v, d = (mx.array(tiny.randn(0, tag, 1, heads, length, 64)) for tag in ("m.q", "m.k", "m.v", "m.d"))
    monkeypatch.setattr(attention, "SCORES", 4 * heads * length * 64)
    scores = 4 * heads * length**2
    mx.eval(q, k, v, d)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = attention.attention(q, k, v)
    mx.eval(out)
    mx.eval(attention.gradients(q, k, v, out, d))
    # the scores of 64 queries are 1/32; measured 0.39 of all scores, of which out and six gradients are 0.22
    assert mx.get_peak_memory() - before < scores / 2


@pytest.mark.parametrize("side", [32, slow(64)])
def test_the_backward_pass_needs_the_memory_of_one_block(side):
    """Deeper networks need more memory only for the inputs of their blocks."""

    def peak(layers: int) -> int:
        config = replace(CONFIG, n_layers=layers)
        arrays = tiny.weights(0, "transformer", tiny.TRANSFORMER | {"n_layers": layers})
        tree = tree_unflatten([(name, config.sanitize(name, mx.array(array))) for name, array in arrays.items()])
        latents, noise = (mx.array(tiny.randn(0, tag, 1, side, side, 16)) for tag in ("p.x", "p.noise"))
        given = Sample(latents, mx.array(tiny.randn(0, "p.cap", 20, config.cap_feat_dim)), noise, 0.5)
        factors = new_factors(config, 2, (), seed=0)
        mx.eval(tree, factors, given.latents, given.noise, given.cap_feats)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(Gradients(config, PlainRunner(tree), SCALE)(factors, given))
        return mx.get_peak_memory() - before

    tokens = (side // 2) ** 2 + 32
    more = peak(12) - peak(4)
    assert more < 8 * tokens * CONFIG.dim * 4 * 1.5  # each block's input, and its factors' gradients
