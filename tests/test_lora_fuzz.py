"""LoRA files with any names, shapes and numbers: read whole, or refused with an error that names the file.

Derandomized, so that a run repeats; raise max_examples to search further.
"""

import json
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mlx_zimage.errors import CheckpointError, ZImageError
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.weights.lora import ADAPTER, HEADER_CONFIG, describe, read_lora
from mlx_zimage.weights.lora_writer import write_lora

CONFIGS = {
    "transformer": TransformerConfig.from_dict(tiny.TRANSFORMER),
    "text_encoder": TextEncoderConfig.from_dict(tiny.TEXT_ENCODER),
}
SHAPES = {network: config.shapes() for network, config in CONFIGS.items()}
FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

PREFIXES = ["", "transformer.", "diffusion_model.", "lora_unet_", "lycoris_", "base_model.model.", "lora_te_", "x."]
LAYERS = ["layers.0.attention.to_q", "layers.0.attention.qkv", "layers.1.attention.out", "layers.0.attention_norm1",
          "layers.0.adaLN_modulation.0", "x_pad_token", "x_embedder", "cap_embedder.0", "layers.0.self_attn.q_proj",
          "layers.99.attention.to_q", "single_blocks.0"]  # fmt: skip
PARTS = [".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".lora_A.default.weight", ".alpha",
         ".dora_scale", ".magnitude", ".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b",
         ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".diff", ".diff_b", ".set_weight", ".oft_blocks",
         ".weight"]  # fmt: skip
names = st.one_of(
    st.builds(lambda *words: "".join(words), *map(st.sampled_from, (PREFIXES, LAYERS, PARTS))),
    st.builds(
        lambda prefix, layer, part: prefix + layer.replace(".", "_") + part,
        *map(st.sampled_from, (PREFIXES, LAYERS, PARTS)),
    ),
    st.text(st.characters(codec="utf-8"), max_size=30),
)
sizes = st.sampled_from([0, 1, 2, 4, 40, 48, 144, 192])
shapes = st.lists(sizes, max_size=5).filter(lambda shape: np.prod(shape) < 1e5).map(tuple)
dtypes = st.sampled_from([np.float32, np.float16, np.float32, np.int64, np.uint8, np.float64, np.bool_])


@st.composite
def tensors(draw) -> dict[str, np.ndarray]:
    """Any tensors; with luck, some are parts of the same layer."""
    return {
        name: np.full(draw(shapes), draw(st.sampled_from([0, 1, 3])), draw(dtypes))
        for name in draw(st.lists(names, max_size=8, unique=True))
    }


@st.composite
def nearly_whole(draw) -> dict[str, np.ndarray]:
    """A file that would be read, and up to two things that may be wrong with it."""
    found: dict[str, np.ndarray] = {}
    for i in draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)):
        layer, rank = f"diffusion_model.layers.{i}.attention.to_q", draw(st.integers(1, 4))
        kind = draw(st.sampled_from(["LoRA", "LoKr", "LoHa"]))
        shape = {"A": (rank, 48), "B": (48, rank)}
        parts = {
            "LoRA": {"lora_A.weight": shape["A"], "lora_B.weight": shape["B"], "alpha": ()},
            "LoKr": {"lokr_w1": (6, 8), "lokr_w2_a": (8, rank), "lokr_w2_b": (rank, 6), "alpha": ()},
            "LoHa": {f"hada_w{n}_{x}": shape["B" if x == "a" else "A"] for n, x in product((1, 2), "ab")},
        }[kind] | ({"dora_scale": (48, 1)} if draw(st.booleans()) else {})
        found |= {f"{layer}.{part}": np.ones(shape, np.float32) for part, shape in parts.items()}
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(sorted(found)))
        change = draw(st.sampled_from(["drop", "shape", "name", "dtype", "number"]))
        array = found.pop(key)
        if change == "shape":
            found[key] = np.ones(draw(shapes), np.float32)
        elif change == "name":
            found[draw(names)] = array
        elif change == "dtype":
            found[key] = array.astype(draw(dtypes))
        elif change == "number":
            found[key] = np.full_like(array, draw(st.sampled_from([np.nan, np.inf, 0.0])))
        if not found:
            break
    return found


values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**30), st.floats(-1e6, 1e6),
    st.sampled_from([np.nan, np.inf, [], "x"]),
    st.dictionaries(st.one_of(st.text(max_size=8), st.just("to_q"), st.just("(a+)+")), st.one_of(
        st.integers(-2, 9), st.text(max_size=2)), max_size=2),
)  # fmt: skip
peft = st.dictionaries(
    st.sampled_from(["r", "alpha", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora"]), values
)


def check(path, keys: set[str], partial: bool) -> None:
    """Either every key is applied or named, with differences that fit and are finite, or it is a CheckpointError."""
    try:
        lora = read_lora(path, CONFIGS, partial)
    except ZImageError as error:
        assert isinstance(error, CheckpointError) and str(path) in str(error)
        return
    assert partial or not lora.unmatched
    assert {*lora.ignored, *lora.unmatched} < keys
    json.dumps(describe(lora))
    for network, deltas in lora.deltas.items():
        for name, delta in deltas.items():
            assert tuple(delta.shape) == SHAPES[network][name]
            difference = delta.difference(mx.ones(SHAPES[network][name]))
            assert difference.shape == SHAPES[network][name]
    write_lora(lora, path.with_name("out.safetensors"), "comfyui")
    again = read_lora(path.with_name("out.safetensors"), CONFIGS)
    assert {n: set(d) for n, d in again.deltas.items()} == {n: set(d) for n, d in lora.deltas.items()}


@FUZZ
@given(tensors=st.one_of(tensors(), nearly_whole()), partial=st.booleans())
def test_any_file_is_read_whole_or_refused_by_name(tmp_path, tensors, partial):
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    check(path, set(tensors), partial)


@FUZZ
@given(tensors=nearly_whole(), config=peft, in_header=st.booleans())
def test_any_config_beside_a_lora_or_in_its_header_is_read_or_refused(tmp_path, tensors, config, in_header):
    if in_header:
        path = tmp_path / "lora.safetensors"
        save_file(tensors, path, {HEADER_CONFIG: json.dumps({f"transformer.{k}": v for k, v in config.items()})})
    else:
        path = tmp_path / "peft"
        path.mkdir(exist_ok=True)
        save_file(tensors, path / ADAPTER)
        (path / "adapter_config.json").write_text(json.dumps(config))
    check(path, set(tensors), partial=False)


@FUZZ
@given(content=st.binary(max_size=200), start=st.sampled_from([b"", b"\x10" + bytes(7), b"\x02" + bytes(7) + b"{}"]))
def test_any_bytes_as_a_lora_are_read_or_refused(tmp_path, content, start):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(start + content)
    with pytest.raises(CheckpointError, match=r"lora\.safetensors"):
        read_lora(path, CONFIGS)
