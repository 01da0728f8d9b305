"""Which layers are quantized, and how a quantization is described."""

import mlx.core as mx
import pytest

from mlx_zimage.errors import RequestError
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.quantization import MODES, Quantization, default_quantization
from mlx_zimage.weights.quantize import tensor_quantization

ALL = [Quantization(b, g, mode) for mode, (bits, groups) in MODES.items() for b in bits for g in groups]


@pytest.mark.metal
@pytest.mark.parametrize("q", ALL, ids=str)
def test_packed_shapes_match_mlx(q):
    parts = mx.quantize(mx.ones((6, 256)), group_size=q.group_size, bits=q.bits, mode=q.mode)
    assert list(q.packed("layer.weight", (6, 256)).values()) == [part.shape for part in parts]
    assert (
        list(q.packed("layer.weight", (6, 256))) == [f"layer.{x}" for x in ("weight", "scales", "biases")][: len(parts)]
    )


@pytest.mark.parametrize("q", ALL, ids=str)
def test_a_quantization_survives_a_round_trip_through_the_config(q):
    assert Quantization.from_dict(q.to_dict()) == q
    assert Quantization.from_dict({"bits": 4, "group_size": 64}) == Quantization(4)  # as in older mlx-lm files


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("affine", 4, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_defaults_match_mlx(mode, bits, group_size):
    assert default_quantization(None, None, mode) == Quantization(bits, group_size, mode)
    parts = mx.quantize(mx.ones((6, 768)), mode=mode)
    packed = Quantization(bits, group_size, mode).packed("layer.weight", (6, 768))
    assert list(packed.values()) == [part.shape for part in parts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 64, "int4"), "mode must be one of affine, mxfp4, mxfp8, nvfp4, got 'int4'"),
        ((7,), "affine quantization takes 2, 3, 4, 5, 6 or 8 bits, got 7"),
        ((4, 16), "affine quantization takes a group size of 32, 64 or 128, got 16"),
        ((8, 32, "mxfp4"), "mxfp4 quantization takes 4 bits, got 8"),
    ],
)
def test_quantizations_that_mlx_does_not_support_are_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        Quantization(*arguments)


@pytest.mark.parametrize(
    ("component", "config", "count", "share"),
    [
        ("transformer", TransformerConfig(), 34 * 7, 0.97),
        ("text_encoder", TextEncoderConfig(), 36 * 7, 0.90),
        ("vae", VAEConfig(), 0, 0.0),
    ],
)
def test_only_the_matrices_of_blocks_are_quantized(component, config, count, share):
    shapes = config.shapes()
    chosen = [name for name, shape in shapes.items() if tensor_quantization(component, name, shape, Quantization(4))]
    assert len(chosen) == count
    sizes = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    assert sum(sizes[name] for name in chosen) >= share * sum(sizes.values())
    assert all(len(shapes[name]) == 2 for name in chosen)
    assert not any(tensor_quantization(component, name, shape, None) for name, shape in shapes.items())


def test_a_group_size_that_does_not_divide_the_width_is_refused():
    with pytest.raises(RequestError, match=r"to_q\.weight is 192 wide, which is not a multiple of the group size 128"):
        tensor_quantization("transformer", "layers.0.attention.to_q.weight", (192, 192), Quantization(4, 128))
