"""LoRA files of every trainer, read into differences that are the same as those merged by hand.

The keys, dtypes and alphas are those that each trainer's own code writes; its source is named in the comment above the
row.
"""

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_zimage.errors import CheckpointError
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.weights.lora import read_lora
from mlx_zimage.weights.lora_writer import write_lora

CONFIGS = {
    "transformer": TransformerConfig.from_dict(tiny.TRANSFORMER),
    "text_encoder": TextEncoderConfig.from_dict(tiny.TEXT_ENCODER),
}
D, RANK, ALPHA = tiny.TRANSFORMER["dim"], 4, 2.0
Q, V, OUT = (f"layers.0.attention.{name}" for name in ("to_q", "to_v", "to_out.0"))
RNG = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32) * 0.3


DOWN, UP = normal(RANK, D), normal(D, RANK)
W1, W2 = normal(6, 8), normal(8, 6)
BASE = normal(D, D)


def save(folder: Path, tensors: dict, metadata: dict | None = None, name: str = "lora.safetensors") -> Path:
    path = folder / name
    mx.save_safetensors(str(path), {key: mx.array(value) for key, value in tensors.items()}, metadata or {})
    return path


def flat(layer: str) -> str:
    return layer.replace(".", "_")


def low_rank(prefix: str, down: str, up: str, alpha: str | None = None, path=str) -> dict:
    """A layer's factors under a trainer's spelling of the path and the parts."""
    keys = {f"{prefix}{path(Q)}{down}": DOWN, f"{prefix}{path(Q)}{up}": UP}
    return keys | ({f"{prefix}{path(Q)}{alpha}": np.float32(ALPHA)} if alpha else {})


PEFT = {"r": RANK, "lora_alpha": ALPHA}
LOW_RANK = [
    # ai-toolkit toolkit/lora_special.py: PEFT format, no alpha
    ("ai-toolkit", low_rank("diffusion_model.", ".lora_A.weight", ".lora_B.weight"), {}, 1.0),
    # musubi-tuner networks/lora.py: kohya's names, an alpha of its own for each layer
    ("musubi", low_rank("lora_unet_", ".lora_down.weight", ".lora_up.weight", ".alpha", flat), {}, ALPHA / RANK),
    # OneTrainer, DIFFUSERS_LORA: the alpha is folded into the factors
    ("OneTrainer diffusers", low_rank("transformer.", ".lora_A.weight", ".lora_B.weight"), {}, 1.0),
    # OneTrainer, COMFY_LORA, ORIGINAL, KOHYA and LEGACY_LORA
    ("OneTrainer Comfy", low_rank("diffusion_model.", ".lora_A.weight", ".lora_B.weight", ".alpha"), {}, ALPHA / RANK),
    ("OneTrainer original", low_rank("", ".lora_A.weight", ".lora_B.weight", ".alpha"), {}, ALPHA / RANK),
    ("OneTrainer legacy", low_rank("transformer.", ".lora_down.weight", ".lora_up.weight", ".alpha"), {}, ALPHA / RANK),
    # OneTrainer's earlier mixture
    (
        "OneTrainer mixture",
        low_rank("lora_transformer_", ".lora_down.weight", ".lora_up.weight", ".alpha", flat),
        {},
        ALPHA / RANK,
    ),
    # diffusers' train_dreambooth_lora_z_image.py: the config is JSON in the header
    (
        "diffusers",
        low_rank("transformer.", ".lora_A.weight", ".lora_B.weight"),
        {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in PEFT.items()})},
        ALPHA / RANK,
    ),
    (
        "diffusers, rsLoRA",
        low_rank("transformer.", ".lora_A.weight", ".lora_B.weight"),
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": ALPHA, "transformer.use_rslora": True})},
        ALPHA / RANK**0.5,
    ),
    (
        "diffusers, an alpha for some layers",
        low_rank("transformer.", ".lora_A.weight", ".lora_B.weight"),
        {
            "lora_adapter_metadata": json.dumps(
                {"transformer.lora_alpha": 7, "transformer.alpha_pattern": {"attention.to_q": ALPHA}}
            )
        },
        ALPHA / RANK,
    ),
    # DiffSynth-Studio: no prefix, PEFT's adapter name
    ("DiffSynth", low_rank("", ".lora_A.default.weight", ".lora_B.default.weight"), {}, 1.0),
    # SimpleTuner through LyCORIS
    ("SimpleTuner", low_rank("lycoris_", ".lora_down.weight", ".lora_up.weight", ".alpha", flat), {}, ALPHA / RANK),
    # mflux's trainer
    ("mflux", low_rank("diffusion_model.", ".lora_A.weight", ".lora_B.weight"), {}, 1.0),
    # dots throughout, as in the comment of diffusers' loader
    (
        "dotted",
        low_rank("", ".lora.down.weight", ".lora.up.weight", ".alpha", lambda path: path.replace("to_", "to.")),
        {},
        ALPHA / RANK,
    ),
    # ComfyUI's extraction of all-in-one files
    ("all-in-one", low_rank("model.diffusion_model.", ".lora_down.weight", ".lora_up.weight"), {}, 1.0),
]


@pytest.mark.parametrize("tensors, metadata, scale", [row[1:] for row in LOW_RANK], ids=[row[0] for row in LOW_RANK])
def test_low_rank_factors_of_every_dialect_are_the_same_difference(tmp_path, tensors, metadata, scale):
    lora = read_lora(save(tmp_path, tensors, metadata), CONFIGS)
    assert set(lora.deltas) == {"transformer"} and set(lora.deltas["transformer"]) == {f"{Q}.weight"}
    difference = lora.deltas["transformer"][f"{Q}.weight"].difference(mx.array(BASE))
    # float32: a sum of four products
    np.testing.assert_allclose(np.array(difference), scale * UP @ DOWN, rtol=1e-5, atol=1e-6)


def test_the_keys_on_the_page_are_read_and_their_dialects_named(tmp_path):
    page = (Path(__file__).parents[1] / "examples/lora.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `(\S+)` \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for label, down in rows:
        up = down.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
        lora = read_lora(save(tmp_path, {down: DOWN, up: UP}), CONFIGS)
        assert list(lora.deltas["transformer"]) == [f"{Q}.weight"], label
        assert re.match(r"[\w-]+", lora.dialect)[0] in label, (lora.dialect, label)


def test_a_peft_folder_has_its_alpha_in_adapter_config(tmp_path):
    save(tmp_path, low_rank("base_model.model.", ".lora_A.weight", ".lora_B.weight"), name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    lora = read_lora(tmp_path, CONFIGS)
    assert lora.deltas["transformer"][f"{Q}.weight"].scale == ALPHA / RANK


@pytest.mark.parametrize("kind, scale", [("factored", 3 / 2), ("whole", 3 / 5)])
def test_pefts_lokr_has_its_alpha_in_the_config_alone_even_for_whole_factors(tmp_path, kind, scale):
    # peft tuners/lokr/layer.py: scaling = alpha / r, whatever the factors are
    second = {"lokr_w2_a": W2[:, :2], "lokr_w2_b": W2[:2]} if kind == "factored" else {"lokr_w2": W2}
    tensors = {f"base_model.model.{Q}.{part}": value for part, value in {"lokr_w1": W1, **second}.items()}
    save(tmp_path, tensors, name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 5, "alpha": 3}))
    assert read_lora(tmp_path, CONFIGS).deltas["transformer"][f"{Q}.weight"].scale == pytest.approx(scale)


WRONG_CONFIGS = {
    "not a number": ({"lora_alpha": "8"}, "alpha must be a number, got '8'"),
    "beyond float32": ({"lora_alpha": 1e300}, "has numbers that are not finite"),
    "not an object": ({"alpha_pattern": ["to_q"]}, "alpha_pattern must be an object, got ['to_q']"),
    "an expression": ({"rank_pattern": {"(a+)+x": 2}}, "the keys of rank_pattern must be layer names, got '(a+)+x'"),
}


@pytest.mark.parametrize("config, message", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_a_wrong_config_of_peft_is_refused_by_name(tmp_path, config, message):
    save(tmp_path, low_rank("base_model.model.", ".lora_A.weight", ".lora_B.weight"), name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        read_lora(tmp_path, CONFIGS)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_a_folder_without_a_config_names_the_files_in_it(tmp_path):
    save(tmp_path, low_rank("transformer.", ".lora_A.weight", ".lora_B.weight"), name="style.safetensors")
    with pytest.raises(
        CheckpointError, match=r"without adapter_config\.json.*such as one of those inside: style\.safetensors"
    ):
        read_lora(tmp_path, CONFIGS)


def test_fused_factors_are_cut_into_queries_keys_and_values(tmp_path):
    up = normal(3 * D, RANK)
    tensors = {
        "lora_unet_layers_0_attention_qkv.lora_down.weight": DOWN,
        "lora_unet_layers_0_attention_qkv.lora_up.weight": up,
        "lora_unet_layers_0_attention_qkv.alpha": np.float32(ALPHA),
    }
    deltas = read_lora(save(tmp_path, tensors), CONFIGS).deltas["transformer"]
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        difference = deltas[f"layers.0.attention.{name}.weight"].difference(mx.array(BASE))
        np.testing.assert_allclose(
            np.array(difference), ALPHA / RANK * up[i * D : (i + 1) * D] @ DOWN, rtol=1e-5, atol=1e-6
        )


def test_a_block_diagonal_fusion_of_three_files_keeps_its_scale_and_its_ranks(tmp_path):
    # musubi-tuner convert_z_image_lora_to_comfy.py: three A stacked, B block diagonal, alpha times three
    downs, ups = [normal(RANK, D) for _ in range(3)], [normal(D, RANK) for _ in range(3)]
    up = np.zeros((3 * D, 3 * RANK), np.float32)
    for i in range(3):
        up[i * D : (i + 1) * D, i * RANK : (i + 1) * RANK] = ups[i]
    tensors = {
        "diffusion_model.layers.0.attention.qkv.lora_down.weight": np.concatenate(downs),
        "diffusion_model.layers.0.attention.qkv.lora_up.weight": up,
        "diffusion_model.layers.0.attention.qkv.alpha": np.float32(3 * ALPHA),
    }
    deltas = read_lora(save(tmp_path, tensors), CONFIGS).deltas["transformer"]
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        delta = deltas[f"layers.0.attention.{name}.weight"]
        assert delta.rank == RANK
        difference = np.array(delta.difference(mx.array(BASE)))
        np.testing.assert_allclose(difference, ALPHA / RANK * ups[i] @ downs[i], rtol=1e-5, atol=1e-6)
    header = read_lora(tmp_path / "lora.safetensors", CONFIGS, headers=True)
    assert [delta.rank for delta in header.deltas["transformer"].values()] == 3 * [RANK], "planned as it will be used"


def test_fused_copies_of_layers_that_are_also_there_separately_are_listed_as_ignored(tmp_path):
    tensors = {}
    for name in ("to.q", "to.k", "to.v", "to_out.0", "out"):
        tensors |= {
            f"layers.0.attention.{name}.lora.down.weight": DOWN,
            f"layers.0.attention.{name}.lora.up.weight": UP,
        }
    fused = {
        "layers.0.attention.qkv.lora.down.weight": DOWN,
        "layers.0.attention.qkv.lora.up.weight": normal(3 * D, RANK),
    }
    lora = read_lora(save(tmp_path, tensors | fused), CONFIGS)
    assert len(lora.deltas["transformer"]) == 4
    assert set(lora.ignored) == set(fused) | {key for key in tensors if ".attention.out." in key}


# ai-toolkit saves whole factors with an alpha that means nothing; for products, alpha is divided by their rank
KRONECKER = {
    "whole": ({"lokr_w1": W1, "lokr_w2": W2, "alpha": np.float32(9999999999)}, np.kron(W1, W2)),
    "second factored": (
        {"lokr_w1": W1, "lokr_w2_a": W2[:, :3], "lokr_w2_b": W2[:3], "alpha": np.float32(ALPHA)},
        ALPHA / 3 * np.kron(W1, W2[:, :3] @ W2[:3]),
    ),
    "both factored": (
        {
            "lokr_w1_a": W1[:, :2],
            "lokr_w1_b": W1[:2],
            "lokr_w2_a": W2[:, :3],
            "lokr_w2_b": W2[:3],
            "alpha": np.float32(1),
        },
        1 / 3 * np.kron(W1[:, :2] @ W1[:2], W2[:, :3] @ W2[:3]),
    ),
}


@pytest.mark.parametrize("parts, expected", KRONECKER.values(), ids=KRONECKER)
@pytest.mark.parametrize("path", [f"diffusion_model.{Q}", f"lycoris_{flat(Q)}", f"lora_unet_{flat(Q)}"])
def test_lokr_is_a_kronecker_product(tmp_path, path, parts, expected):
    tensors = {f"{path}.{part}": value for part, value in parts.items()}
    delta = read_lora(save(tmp_path, tensors), CONFIGS).deltas["transformer"][f"{Q}.weight"]
    np.testing.assert_allclose(np.array(delta.difference(mx.array(BASE))), expected, rtol=1e-5, atol=1e-6)


def test_loha_is_an_elementwise_product_of_products(tmp_path):
    parts = {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": normal(D, RANK), "hada_w2_b": normal(RANK, D)}
    tensors = {f"lora_unet_{flat(Q)}.{part}": value for part, value in parts.items()}
    tensors[f"lora_unet_{flat(Q)}.alpha"] = np.float32(ALPHA)
    delta = read_lora(save(tmp_path, tensors), CONFIGS).deltas["transformer"][f"{Q}.weight"]
    expected = ALPHA / RANK * (UP @ DOWN) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    np.testing.assert_allclose(np.array(delta.difference(mx.array(BASE))), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["dora_scale", "magnitude", "lora_magnitude_vector.weight"])
@pytest.mark.parametrize("axis", [1, 0], ids=["rows", "columns"])
def test_dora_gives_each_row_or_column_the_length_of_its_magnitude(tmp_path, part, axis):
    magnitude = np.abs(normal(D, 1) if axis else normal(1, D))
    tensors = low_rank("transformer.", ".lora_A.weight", ".lora_B.weight") | {f"transformer.{Q}.{part}": magnitude}
    delta = read_lora(save(tmp_path, tensors), CONFIGS).deltas["transformer"][f"{Q}.weight"]
    whole = BASE + np.array(delta.difference(mx.array(BASE)))
    np.testing.assert_allclose(np.linalg.norm(whole, axis=axis, keepdims=True), magnitude, rtol=1e-4, atol=1e-6)
    direction = (BASE + UP @ DOWN) / np.linalg.norm(BASE + UP @ DOWN, axis=axis, keepdims=True)
    np.testing.assert_allclose(whole, magnitude * direction, rtol=1e-4, atol=1e-6)


def test_plain_differences_change_norms_biases_and_pad_tokens(tmp_path):
    norm, bias, pad, value = normal(D), normal(4 * D), normal(1, D), normal(D, D)
    tensors = {
        "diffusion_model.layers.0.attention_norm1.diff": norm,
        "diffusion_model.layers.1.ffn_norm2.w_norm": norm,
        "diffusion_model.layers.0.adaLN_modulation.0.diff_b": bias,
        "diffusion_model.x_pad_token.diff": pad,
        "diffusion_model.layers.0.attention.out.set_weight": value,
    }
    deltas = read_lora(save(tmp_path, tensors), CONFIGS).deltas["transformer"]
    expected = {
        "layers.0.attention_norm1.weight": norm,
        "layers.1.ffn_norm2.weight": norm,
        "layers.0.adaLN_modulation.0.bias": bias,
        "x_pad_token": pad,
        f"{OUT}.weight": value - BASE,
    }
    assert set(deltas) == set(expected)
    for name, difference in expected.items():
        np.testing.assert_allclose(np.array(deltas[name].difference(mx.array(BASE))), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "path",
    [
        "text_encoder.model.layers.0.self_attn.q_proj",
        "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj",
        "lora_te_layers_0_self_attn_q_proj",
        "lora_te1_model_layers_0_self_attn_q_proj",
    ],
)
def test_a_files_keys_for_the_text_encoder_change_the_text_encoder(tmp_path, path):
    width = tiny.TEXT_ENCODER["hidden_size"]
    rows = tiny.TEXT_ENCODER["num_attention_heads"] * tiny.TEXT_ENCODER["head_dim"]
    tensors = {f"{path}.lora_down.weight": normal(RANK, width), f"{path}.lora_up.weight": normal(rows, RANK)}
    lora = read_lora(save(tmp_path, tensors), CONFIGS)
    assert list(lora.deltas) == ["text_encoder"]
    assert list(lora.deltas["text_encoder"]) == ["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    "foreign, layer",
    [
        ("x_embedder", "all_x_embedder.2-1"),
        ("final_layer.linear", "all_final_layer.2-1.linear"),
        ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
        ("context_refiner.1.attention.out", "context_refiner.1.attention.to_out.0"),
        ("layers.2.attention.k_norm", "layers.2.attention.norm_k"),
    ],
)
def test_comfyuis_names_stand_for_the_same_layers(tmp_path, foreign, layer):
    shape = CONFIGS["transformer"].shapes()[f"{layer}.weight"]
    for path in (f"diffusion_model.{foreign}", f"lora_unet_{flat(foreign)}", f"diffusion_model.{layer}"):
        deltas = read_lora(save(tmp_path, {f"{path}.diff": normal(*shape)}), CONFIGS).deltas
        assert list(deltas["transformer"]) == [f"{layer}.weight"]


CONVERTED = {
    "LoRA": {"to_q.lora_A.weight": DOWN, "to_q.lora_B.weight": UP, "to_q.alpha": np.float32(ALPHA)},
    "LoKr": {f"to_q.{part}": value for part, value in KRONECKER["second factored"][0].items()},
    "LoHa": {
        **{f"to_q.hada_{part}": UP if part.endswith("a") else DOWN for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "to_q.alpha": np.float32(ALPHA),
    },
    "DoRA of LoKr by column": {"to_q.lokr_w1": W1, "to_q.lokr_w2": W2, "to_q.dora_scale": np.abs(normal(1, D))},
    "fused LoKr": {"qkv.lokr_w1": normal(4, 8), "qkv.lokr_w2": normal(36, 6)},
    "a difference and a weight": {"q_norm.diff": normal(D // 3), "out.set_weight": normal(D, D)},
}


@pytest.mark.parametrize("parts", CONVERTED.values(), ids=CONVERTED)
def test_a_lora_of_any_kind_converted_for_comfyui_has_the_same_differences(tmp_path, parts):
    lora = read_lora(save(tmp_path, {f"diffusion_model.layers.0.attention.{k}": v for k, v in parts.items()}), CONFIGS)
    write_lora(lora, tmp_path / "out.safetensors", "comfyui")
    old, new = lora.deltas["transformer"], read_lora(tmp_path / "out.safetensors", CONFIGS).deltas["transformer"]
    assert old.keys() == new.keys()
    for name, delta in old.items():
        base = mx.array(normal(*delta.shape))
        # float32: a LoKr's scale is folded into its first factor
        np.testing.assert_allclose(new[name].difference(base), delta.difference(base), rtol=1e-5, atol=1e-6)


# ---- what is refused


def wrong(**changes) -> dict:
    return low_rank("transformer.", ".lora_A.weight", ".lora_B.weight") | changes


FLUX = {f"transformer.single_transformer_blocks.{i}.attn.to_q.lora_A.weight": DOWN for i in range(3)}
SDXL = {f"lora_unet_down_blocks_{i}_attentions_0_proj_in.lora_down.weight": DOWN for i in range(3)}
REFUSED = {
    "a LoRA for Flux": (FLUX, "3 of 3 keys match no layer of Z-Image (it looks like a LoRA for Flux)"),
    "a LoRA for SDXL": (SDXL, "it looks like a LoRA for SDXL or SD 1.5"),
    "CLIP's part": (
        {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": DOWN},
        "it looks like the text encoder's part of a LoRA for another model",
    ),
    "a full checkpoint": ({"blocks.0.weight": BASE, "blocks.0.bias": BASE[0]}, "it looks like a full checkpoint"),
    "a ControlNet": ({"control_layers.0.after_proj.weight": BASE}, "it looks like a ControlNet"),
    "one key too many": (
        wrong(**{"transformer.layers.9.attention.to_q.lora_A.weight": DOWN}),
        "1 of 3 keys matches no layer of Z-Image: transformer.layers.9.attention.to_q.lora_A.weight; --lora-partial",
    ),
    "half of the factors": ({f"transformer.{Q}.lora_A.weight": DOWN}, "has no up; the file is incomplete"),
    "an alpha alone": ({f"transformer.{Q}.alpha": np.float32(1)}, "the file is incomplete"),
    "a magnitude alone": ({f"transformer.{Q}.dora_scale": normal(D, 1)}, "DoRA magnitude but no factors"),
    "another width": (
        {f"transformer.{Q}.lora_A.weight": normal(RANK, 64), f"transformer.{Q}.lora_B.weight": normal(64, RANK)},
        "has shape (64, 64), but the model's weight has (48, 48); it was made for another model",
    ),
    "ranks that differ": (
        {f"transformer.{Q}.lora_A.weight": normal(3, D), f"transformer.{Q}.lora_B.weight": UP},
        "do not fit together: (48, 4) and (3, 48)",
    ),
    "not a number": (
        wrong(**{f"transformer.{V}.lora_A.weight": DOWN, f"transformer.{V}.lora_B.weight": UP * np.nan}),
        "not finite",
    ),
    "OFT": ({f"lora_unet_{flat(Q)}.oft_blocks": BASE}, "OFT or BOFT is not supported (1 of 1 keys, "),
    "a Tucker decomposition": (
        wrong(**{f"lora_unet_{flat(V)}.lokr_t2": BASE}),
        "only LoRA, LoKr, LoHa, DoRA and plain differences are",
    ),
    "no tensors": ({}, "has no tensors"),
    "two adapters": (
        {**low_rank("transformer.", ".lora_A.a.weight", ".lora_B.a.weight"), f"transformer.{Q}.lora_A.b.weight": DOWN},
        "are the same part of one layer; expected only one",
    ),
    "an alpha that is not a number": (
        {**wrong(), f"transformer.{Q}.alpha": np.float32(np.nan), f"transformer.{Q}.dora_scale": normal(D, 1)},
        "not finite",
    ),
    "lengths of columns of a fused layer": (
        {
            "layers.0.attention.qkv.lora_A.weight": DOWN,
            "layers.0.attention.qkv.lora_B.weight": normal(3 * D, RANK),
            "layers.0.attention.qkv.dora_scale": normal(1, D),
        },
        "has one length per column, shared by 3 layers, so it cannot be split between them",
    ),
    "two of one layer": (
        wrong(**{f"lora_unet_{flat(Q)}.lora_down.weight": DOWN, f"lora_unet_{flat(Q)}.lora_up.weight": UP}),
        "is a second difference for layers.0.attention.to_q.weight",
    ),
}


@pytest.mark.parametrize("tensors, message", REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_whole_lora_for_this_model_is_refused_by_name(tmp_path, tensors, message):
    path = save(tmp_path, tensors)
    with pytest.raises(CheckpointError) as error:
        read_lora(path, CONFIGS)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("start", [b"\x80\x02}q\x00.", b"PK\x03\x04rest"])
def test_pickles_are_refused_before_anything_is_read(tmp_path, start):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match="pickle"):
        read_lora(path, CONFIGS)


def test_partial_applies_what_matches_and_names_the_rest_if_anything_matches(tmp_path):
    extra = "transformer.layers.9.attention.to_q.lora_A.weight"
    lora = read_lora(save(tmp_path, wrong(**{extra: DOWN})), CONFIGS, partial=True)
    assert lora.unmatched == (extra,) and list(lora.deltas["transformer"]) == [f"{Q}.weight"]
    with pytest.raises(CheckpointError, match="3 of 3 keys match no layer"):
        read_lora(save(tmp_path, FLUX), CONFIGS, partial=True)
