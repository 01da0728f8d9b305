import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import TOLERANCE, relative_error

from mlx_zimage.errors import CheckpointError
from mlx_zimage.models import vae
from mlx_zimage.models.vae import VAEConfig

pytestmark = pytest.mark.metal

LATENT_SIZES = {"wide": (10, 12), "one": (2, 4)}


def decode(pipe, z: np.ndarray) -> mx.array:
    """Pixels (1, 3, H, W) for unscaled latents (1, 16, h, w), like the output of diffusers' vae.decode."""
    config = pipe.vae.config
    latents = (mx.array(z).transpose(0, 2, 3, 1) - config.shift_factor) * config.scaling_factor
    return pipe.vae.decode(latents).transpose(0, 3, 1, 2)


def whole(x) -> mx.array:
    """The whole tensor, from the VAE's Rows."""
    return x if isinstance(x, mx.array) else x.get(0, x.height)


@pytest.mark.parametrize("tag", LATENT_SIZES)
def test_decoded_pixels_equal_the_reference(golden, golden_pipe, tag):
    z = tiny.randn(golden.seed, f"vae.z.{tag}", 1, 16, *LATENT_SIZES[tag])
    assert relative_error(decode(golden_pipe, z), golden[f"vae/{tag}.image"]) < TOLERANCE


def test_each_part_of_the_decoder_equals_the_reference(golden, golden_pipe, watch):
    names = {"conv_in": "conv", "mid_attn": "attention", "mid_block": "mid_block", "up_blocks.0": "upsample"}
    seen = {name: watch(vae, function) for name, function in names.items()}
    decode(golden_pipe, tiny.randn(golden.seed, "vae.z.wide", 1, 16, 10, 12))
    for name, calls in seen.items():
        assert relative_error(whole(calls[0]).transpose(0, 3, 1, 2), golden[f"vae/wide.dec.{name}"]) < TOLERANCE, name


def test_encoded_moments_and_latents_equal_the_reference(golden, golden_pipe, watch):
    pixels, moments = mx.array(tiny.encoder_image(golden.seed)).transpose(0, 2, 3, 1), watch(vae, "moments")
    latents = golden_pipe.vae.encode(pixels)
    ((mean, log_variance),) = moments
    for name, ours in {"mean": mean, "logvar": log_variance, "latents": latents}.items():
        assert relative_error(ours.transpose(0, 3, 1, 2), golden[f"vae/enc.{name}"]) < TOLERANCE, name


def test_near_zero_activations_decode_as_in_the_reference(golden):
    z = tiny.randn(golden.seed, "vae.z.one", 1, 16, 2, 4)
    assert relative_error(decode(golden.faint, z), golden["faint/image"]) < TOLERANCE


def test_near_zero_activations_encode_as_in_the_reference(golden, watch):
    moments = watch(vae, "moments")
    golden.faint.vae.encode(mx.array(tiny.encoder_image(golden.seed)).transpose(0, 2, 3, 1))
    ((mean, log_variance),) = moments
    assert relative_error(mean.transpose(0, 3, 1, 2), golden["faint/mean"]) < TOLERANCE
    # these are clipped at both ends
    assert (log_variance.min().item(), log_variance.max().item()) == (-30, 20)
    assert relative_error(log_variance.transpose(0, 3, 1, 2), golden["faint/logvar"]) < TOLERANCE


def test_images_of_a_batch_do_not_affect_each_other(pipe):
    latents = mx.array(tiny.randn(0, "vae.batch", 2, 4, 6, 16))
    together = pipe.vae.decode(latents)
    alone = mx.concatenate([pipe.vae.decode(one[None]) for one in latents])
    # float32: another size may be summed in another order, by other kernels on a GPU
    assert relative_error(together, alone) < TOLERANCE


def test_sanitize_moves_channels_last_and_changes_nothing_else():
    kernel, matrix = mx.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7), mx.arange(6).reshape(2, 3)
    assert VAEConfig().sanitize("kernel", kernel)[1, 4, 6, 2].item() == kernel[1, 2, 4, 6].item()
    assert mx.array_equal(VAEConfig().sanitize("matrix", matrix), matrix)


@pytest.mark.parametrize(
    "change", [{"act_fn": "relu"}, {"use_quant_conv": True}, {"mid_block_add_attention": False}, {"in_channels": 4}]
)
def test_unsupported_configs_are_refused(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        VAEConfig.from_dict(tiny.VAE | change)
