"""The real configuration has the same tensors as the published checkpoint."""

from math import prod

import pytest

from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig

# config.json as published
TRANSFORMER = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
TEXT_ENCODER = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "attention_bias": False,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
VAE = {
    "_name_or_path": "flux-dev",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "force_upcast": True,
    "sample_size": 1024,
    "latents_mean": None,
    "latents_std": None,
}
CONFIGS = {
    "transformer": TransformerConfig.from_dict(TRANSFORMER),
    "text_encoder": TextEncoderConfig.from_dict(TEXT_ENCODER),
    "vae": VAEConfig.from_dict(VAE),
}


@pytest.mark.parametrize(
    ("component", "tensors", "parameters"),
    [("transformer", 521, 6_154_908_736), ("text_encoder", 398, 4_022_468_096), ("vae", 244, 83_819_683)],
)
def test_tensor_and_parameter_counts_match_the_published_model(component, tensors, parameters):
    shapes = CONFIGS[component].shapes()
    assert len(shapes) == tensors
    assert sum(map(prod, shapes.values())) == parameters


def test_the_defaults_are_the_published_configuration():
    assert list(CONFIGS.values()) == [TransformerConfig(), TextEncoderConfig(), VAEConfig()]


@pytest.mark.parametrize(
    ("component", "prefix", "parameters"),
    [
        ("transformer", "layers.", 5_427_310_080),
        ("transformer", "noise_refiner.", 361_820_672),
        ("transformer", "context_refiner.", 353_925_632),
        ("transformer", "cap_embedder.", 9_836_800),
        ("transformer", "all_final_layer.", 1_232_704),
        ("transformer", "t_embedder.", 525_568),
        ("transformer", "all_x_embedder.", 249_600),
        ("text_encoder", "model.layers.35.", 100_930_816),
        ("vae", "encoder.", 34_274_208),
        ("vae", "decoder.", 49_545_475),
    ],
)
def test_the_parameter_count_of_each_part_matches_the_published_model(component, prefix, parameters):
    shapes = CONFIGS[component].shapes()
    assert sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix)) == parameters


@pytest.mark.parametrize(
    ("component", "name", "shape"),
    [
        ("transformer", "all_x_embedder.2-1.weight", (3840, 64)),
        ("transformer", "all_final_layer.2-1.linear.weight", (64, 3840)),
        ("transformer", "all_final_layer.2-1.adaLN_modulation.1.weight", (3840, 256)),
        ("transformer", "t_embedder.mlp.0.weight", (1024, 256)),
        ("transformer", "t_embedder.mlp.2.bias", (256,)),
        ("transformer", "cap_embedder.0.weight", (2560,)),
        ("transformer", "cap_embedder.1.weight", (3840, 2560)),
        ("transformer", "x_pad_token", (1, 3840)),
        ("transformer", "layers.29.attention.to_out.0.weight", (3840, 3840)),
        ("transformer", "layers.0.attention.norm_q.weight", (128,)),
        ("transformer", "context_refiner.1.feed_forward.w1.weight", (10240, 3840)),
        ("transformer", "noise_refiner.1.adaLN_modulation.0.weight", (15360, 256)),
        ("text_encoder", "model.embed_tokens.weight", (151936, 2560)),
        ("text_encoder", "model.layers.35.self_attn.q_proj.weight", (4096, 2560)),
        ("text_encoder", "model.layers.0.self_attn.k_proj.weight", (1024, 2560)),
        ("text_encoder", "model.layers.0.self_attn.k_norm.weight", (128,)),
        ("text_encoder", "model.layers.0.mlp.down_proj.weight", (2560, 9728)),
        ("vae", "encoder.conv_in.weight", (128, 3, 3, 3)),
        ("vae", "encoder.conv_out.weight", (32, 512, 3, 3)),
        ("vae", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight", (256, 128, 1, 1)),
        ("vae", "encoder.down_blocks.2.downsamplers.0.conv.weight", (512, 512, 3, 3)),
        ("vae", "decoder.conv_in.weight", (512, 16, 3, 3)),
        ("vae", "decoder.mid_block.attentions.0.to_out.0.bias", (512,)),
        ("vae", "decoder.up_blocks.2.resnets.0.conv_shortcut.weight", (256, 512, 1, 1)),
        ("vae", "decoder.up_blocks.3.resnets.2.conv2.weight", (128, 128, 3, 3)),
        ("vae", "decoder.conv_out.weight", (3, 128, 3, 3)),
    ],
)
def test_a_tensor_has_its_published_name_and_shape(component, name, shape):
    assert CONFIGS[component].shapes()[name] == shape


def test_the_context_refiners_are_not_modulated():
    shapes = CONFIGS["transformer"].shapes()
    assert {name.split(".adaLN")[0].rpartition(".")[0] for name in shapes if ".adaLN_modulation.0" in name} == {
        "noise_refiner",
        "layers",
    }


def test_the_text_encoder_reads_everything_but_its_last_layer_and_norm():
    config = CONFIGS["text_encoder"]
    used = {name: shape for name, shape in config.shapes().items() if not config.unused(name)}
    assert sum(map(prod, used.values())) == 3_921_534_720
    assert set(config.shapes()) - set(used) == {"model.norm.weight"} | {
        name for name in config.shapes() if name.startswith("model.layers.35.")
    }
