"""With PlainRunner, gradients pass through the networks' own functions, and match torch's in diffusers' modules."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import relative_error
from mlx.utils import tree_flatten, tree_unflatten

from mlx_zimage.models.layers import linear
from mlx_zimage.models.runner import PlainRunner
from mlx_zimage.models.transformer import Stream, Transformer, TransformerConfig, row

# float32: sums over tokens in another order, forward and back through seven blocks; measured 2e-5 of a tensor's
# largest value
TOLERANCE = 1e-4
CONFIG = TransformerConfig.from_dict(tiny.TRANSFORMER)


@pytest.fixture(scope="module")
def torch(reference):
    with reference.torch.enable_grad():
        yield reference.torch


@pytest.fixture(scope="module")
def model(golden, reference, torch):
    """diffusers' transformer on the fresh weights."""
    return reference.open_pipeline(golden.folder).transformer.requires_grad_(True)


@pytest.fixture(scope="module")
def arrays(golden) -> dict[str, mx.array]:
    """The same weights by name, in the layout used for computing."""
    weights = tiny.weights(golden.seed, "transformer", tiny.TRANSFORMER)
    return {name: CONFIG.sanitize(name, mx.array(array)) for name, array in weights.items()}


def compare_gradients(ours: dict, theirs: dict) -> None:
    """Compare gradients by the names of weights; ours are in the layout used for computing."""
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        wanted = np.array(CONFIG.sanitize(name, mx.array(wanted.numpy())))
        assert np.abs(wanted).max() > 0, f"nothing depends on {name}"
        assert relative_error(ours[name], wanted) < TOLERANCE, name


def test_gradients_of_the_whole_transformer_match_torch(golden, torch, model, arrays):
    (latents, caption, time), *_ = tiny.case_inputs(golden.seed, "a_pad_both")
    probe = tiny.randn(golden.seed, "probe", *latents.shape)

    x, c = (torch.from_numpy(array.copy()).requires_grad_() for array in (latents, caption))
    out = model([x[:, None]], torch.tensor([time]), [c], return_dict=False)[0][0][:, 0]
    model.zero_grad()
    (out * torch.from_numpy(probe)).sum().backward()

    def loss(tree, latents, caption) -> mx.array:
        network = Transformer(CONFIG, PlainRunner(tree))
        modulations, finals = network.modulate([time])
        captions = network.captions([caption], *latents.shape[1:3])
        (out,) = network(latents, captions, row(modulations, 0), row(finals, 0))
        return (out[0].transpose(2, 0, 1) * mx.array(probe)).sum()

    tree = tree_unflatten(list(arrays.items()))
    value, (by_weight, by_latents, by_caption) = mx.value_and_grad(loss, argnums=(0, 1, 2))(
        tree, mx.array(latents).transpose(1, 2, 0)[None], mx.array(caption)
    )
    terms = out * torch.from_numpy(probe)
    # the terms may cancel, so that their sum is small; its error is theirs
    assert value.item() == pytest.approx(terms.sum().item(), abs=TOLERANCE * terms.norm().item())
    compare_gradients(dict(tree_flatten(by_weight)), {name: p.grad for name, p in model.named_parameters()})
    assert relative_error(by_latents[0].transpose(2, 0, 1), x.grad.numpy()) < TOLERANCE
    assert relative_error(by_caption, c.grad.numpy()) < TOLERANCE


def test_gradients_of_a_block_match_torch(golden, torch, model, arrays):
    length, (block, prefix) = 40, (model.layers[1], "layers.1.")
    x = tiny.randn(golden.seed, "block.x", 1, length, CONFIG.dim)
    time = tiny.randn(golden.seed, "block.time", 1, CONFIG.time_dim)
    probe = tiny.randn(golden.seed, "block.probe", *x.shape)
    angles = tiny.randn(golden.seed, "block.angles", length, CONFIG.dim // CONFIG.n_heads // 2)

    theirs, given = (torch.from_numpy(array.copy()).requires_grad_() for array in (x, time))
    turns = torch.polar(torch.ones(angles.shape), torch.from_numpy(angles))[None]
    model.zero_grad()
    (block(theirs, None, turns, given) * torch.from_numpy(probe)).sum().backward()

    def loss(weights, x, time) -> mx.array:
        m = linear(time, weights["adaLN_modulation"][0]).reshape(4, CONFIG.dim)
        modulation = mx.stack([1 + m[0], mx.tanh(m[1]), 1 + m[2], mx.tanh(m[3])])[None]
        stream = Stream(x, modulation, mx.cos(mx.array(angles)), mx.sin(mx.array(angles)))
        network = Transformer(CONFIG, PlainRunner({"layers": [weights]}))
        return (network.run(["layers.0"], [stream])[0].x * mx.array(probe)).sum()

    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    by_weight, by_x, by_time = mx.grad(loss, argnums=(0, 1, 2))(
        tree_unflatten(list(own.items())), mx.array(x), mx.array(time)
    )
    assert relative_error(by_x, theirs.grad.numpy()) < TOLERANCE
    assert relative_error(by_time, given.grad.numpy()) < TOLERANCE
    gradients = {f"{prefix}{name}": array for name, array in tree_flatten(by_weight)}
    compare_gradients(gradients, {f"{prefix}{name}": p.grad for name, p in block.named_parameters()})


def test_the_plain_runner_gives_the_same_bits_as_streaming(golden, arrays):
    (latents, caption, time), *_ = tiny.case_inputs(golden.seed, "a_pad_both")
    plain = Transformer(CONFIG, PlainRunner(tree_unflatten(list(arrays.items()))))
    x = mx.array(latents).transpose(1, 2, 0)[None]
    found = [
        network.velocity(mx.array(caption), [1 - time], 12, 10)(x, 0) for network in (plain, golden.pipe.transformer)
    ]
    assert mx.array_equal(*found)
