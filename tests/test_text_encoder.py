import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import TOLERANCE, relative_error

from mlx_zimage.errors import CheckpointError
from mlx_zimage.models import text_encoder
from mlx_zimage.models.text_encoder import TextEncoderConfig

pytestmark = pytest.mark.metal


@pytest.mark.parametrize("key", tiny.PROMPTS)
def test_prompt_embeddings_equal_the_reference(golden, golden_pipe, key):
    ids = golden[f"text/{key}.ids"].tolist()
    assert relative_error(golden_pipe.text_encoder(ids), golden[f"text/{key}.embeds"]) < TOLERANCE


def test_every_layer_equals_the_reference(golden, golden_pipe, watch):
    layers = watch(text_encoder, "layer")
    out = golden_pipe.text_encoder(golden["text/short.ids"].tolist())
    assert len(layers) == tiny.TEXT_ENCODER["num_hidden_layers"] - 1
    for i, hidden in enumerate(layers, start=1):
        assert relative_error(hidden[0], golden[f"text/short.hidden_{i}"]) < TOLERANCE
    assert mx.array_equal(out, layers[-1][0])


def test_near_zero_prompt_embeddings_equal_the_reference(golden):
    ids = golden["text/short.ids"].tolist()
    assert relative_error(golden.faint.text_encoder(ids), golden["faint/embeds"]) < TOLERANCE


def test_embedding_rows_equal_the_reference(golden, golden_pipe):
    ids = golden["text/short.ids"].tolist()
    rows = golden_pipe.text_encoder.runner.rows("model.embed_tokens.weight", ids)
    assert np.array_equal(np.array(rows), golden["text/short.hidden_0"])


def test_a_token_does_not_depend_on_later_ones(pipe):
    ids = pipe.tokenizer.encode("a red fox in the snow")
    whole, start = pipe.text_encoder(ids), pipe.text_encoder(ids[:7])
    # float32: only the order of the sums differs, measured 5e-7
    assert relative_error(whole[:7], start) < 5e-6


def test_both_spellings_of_the_config_are_equivalent():
    old = tiny.TEXT_ENCODER
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "dtype": "bfloat16"}
    assert TextEncoderConfig.from_dict(new) == TextEncoderConfig.from_dict(old)
    new["rope_parameters"]["rope_theta"] = 5000.0
    assert TextEncoderConfig.from_dict(new).rope_theta == 5000.0


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"use_sliding_window": True},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}},
    ],
)
def test_unsupported_configs_are_refused(change):
    with pytest.raises(CheckpointError, match="must be"):
        TextEncoderConfig.from_dict(tiny.TEXT_ENCODER | change)
