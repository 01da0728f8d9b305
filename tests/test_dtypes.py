"""A bfloat16 model multiplies in bfloat16; float32 is used only in the exceptions named here.

Each network is traced, which records the input dtypes of every matrix product, convolution and attention, wherever it
is in the code. Fused operations that a device does not have appear as the products they consist of.
"""

import mlx.core as mx
import pytest
import tiny
from compare import relative_error

from mlx_zimage import ZImagePipeline, bounds, selftest
from mlx_zimage.dtypes import FLOATS
from mlx_zimage.machine import backend
from mlx_zimage.models import text_encoder, transformer, vae
from mlx_zimage.models.layers import linear, sum_dtype
from mlx_zimage.weights.blocks import Blocks
from mlx_zimage.weights.component import Component

pytestmark = pytest.mark.metal

PRODUCTS = {"Matmul", "AddMM", "GatherMM", "QuantizedMatmul", "Convolution", "ScaledDotProductAttention"}


@pytest.fixture(scope="module", params=FLOATS)
def typed_pipe(request, tiny_folder):
    return ZImagePipeline.from_pretrained(tiny_folder, dtype=request.param)


@pytest.fixture(scope="module")
def bf16_pipe(tiny_folder):
    return ZImagePipeline.from_pretrained(tiny_folder, dtype="bfloat16")


def test_every_dtype_that_networks_compute_in_has_its_measured_bounds_and_limit():
    assert set(FLOATS) == set(selftest.LIMITS)
    assert {getattr(mx, dtype) for dtype in FLOATS} == set(bounds.GPU)


def vae_of(pipe) -> vae.VAE:
    """The VAE as on a GPU: on a CPU, it computes in float32 whatever the model's dtype."""
    return vae.VAE(pipe.vae.config, Blocks(pipe.checkpoint.vae, sum_dtype(pipe.dtype)))


@pytest.fixture
def products(monkeypatch):
    """products(function, *arrays) lists the floating-point input dtypes of each product that function computes."""
    evaluate, read = mx.eval, Component.read

    def products(function, *arrays: mx.array) -> list[set[mx.Dtype]]:
        def read_now(self, *args, **kwargs):
            tree = read(self, *args, **kwargs)()
            evaluate(tree)  # a trace cannot read files
            return lambda: tree

        trace = []
        with monkeypatch.context() as patch:
            patch.setattr(Component, "read", read_now)
            for name in ("eval", "async_eval"):  # nor evaluate halfway
                patch.setattr(mx, name, lambda *trees: None)
            mx.export_function(trace.append, function, *arrays)
        found = [event["inputs"] for event in trace if event["type"] == "primitive" and event["name"] in PRODUCTS]
        return [{dtype for _, _, dtype in inputs if mx.issubdtype(dtype, mx.floating)} for inputs in found]

    mx.disable_compile()  # fused operations cannot be exported
    yield products
    mx.enable_compile()


def run_transformer(pipe, latents: mx.array) -> mx.array:
    """One call for latents (B, h, w, 16), including the caption embedding."""
    network = pipe.transformer
    captions = network.captions([mx.ones((20, network.config.cap_feat_dim))], *latents.shape[1:3])
    blocks, final = mx.ones((5, 4, network.config.dim), pipe.dtype), mx.ones(network.config.dim, pipe.dtype)
    return network(latents, captions, blocks, final)[0]


def test_the_transformer_multiplies_in_its_dtype(typed_pipe, products):
    found = products(lambda x: run_transformer(typed_pipe, x), mx.zeros((2, 12, 10, 16)))
    # caption and image embedder, seven blocks of seven linear layers and an attention, the final layer
    assert len(found) >= 2 + 7 * 8 + 1
    assert all(dtypes == {typed_pipe.dtype} for dtypes in found)


def test_the_text_encoder_multiplies_in_its_dtype(typed_pipe, products):
    found = products(lambda x: x + typed_pipe.text_encoder([5, 6, 7, 8]), mx.zeros((1,)))
    assert len(found) >= 3 * 8
    assert all(dtypes == {typed_pipe.dtype} for dtypes in found)


@pytest.mark.parametrize(("direction", "shape"), [("decode", (1, 4, 6, 16)), ("encode", (1, 32, 48, 3))])
def test_the_vae_multiplies_in_its_dtype(typed_pipe, products, direction, shape):
    found = products(getattr(vae_of(typed_pipe), direction), mx.zeros(shape))
    weights = typed_pipe.vae.config.shapes()
    part = "decoder" if direction == "decode" else "encoder"
    layers = [name for name, shape in weights.items() if name.startswith(part) and len(shape) > 1]
    assert len(found) > len(layers)  # each layer, and the attention
    # nothing would keep float16 in range there
    dtype = mx.float32 if typed_pipe.dtype == mx.float16 else typed_pipe.dtype
    assert all(dtypes == {dtype} for dtypes in found)


def test_only_the_time_embedding_is_float32_in_the_modulations(bf16_pipe, products):
    def modulate(x):
        blocks, final = bf16_pipe.transformer.modulate([0.25, 0.5])
        return x + blocks.sum() + final.sum()

    found = products(modulate, mx.zeros((1,)))
    assert found.count({mx.float32}) == 2  # the exception: the two layers of its MLP
    assert found.count({mx.bfloat16}) == len(bf16_pipe.transformer.config.modulated) + 1
    assert len(found) == found.count({mx.float32}) + found.count({mx.bfloat16})


def test_the_time_embedding_of_a_bfloat16_model_is_that_of_a_float32_one(pipe, bf16_pipe, watch):
    embeddings = watch(transformer, "time_embedding")
    for model in (pipe, bf16_pipe):
        model.transformer.modulate([0.125, 0.5])  # a schedule that is not cached
    assert mx.array_equal(*embeddings)


@pytest.mark.parametrize("scales", [mx.bfloat16, mx.float32])
def test_a_quantized_layer_multiplies_in_the_dtype_of_its_input(products, scales):
    weight, scale, bias = mx.quantize(mx.random.normal((32, 64)).astype(scales), group_size=32, bits=4)
    packing = {"group_size": 32, "bits": 4, "mode": "affine"}
    weights = {"weight": weight, "scales": scale, "biases": bias, "packing": packing}
    assert products(lambda x: linear(x, weights), mx.zeros((3, 64), mx.bfloat16)) == [{mx.bfloat16}]


def leave_float32(function):
    return lambda *args, **kwargs: function(*args, **kwargs).astype(mx.float32)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (transformer, "rotate"),
        (transformer, "rms_norm"),
        (text_encoder, "rms_norm"),
        (vae, "silu"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_float32_result_that_is_not_cast_back_is_detected(bf16_pipe, products, monkeypatch, module, name):
    monkeypatch.setattr(module, name, leave_float32(getattr(module, name)))
    run = {
        transformer: (lambda x: run_transformer(bf16_pipe, x), mx.zeros((1, 12, 10, 16))),
        text_encoder: (lambda x: x + bf16_pipe.text_encoder([5, 6, 7]), mx.zeros((1,))),
        vae: (vae_of(bf16_pipe).decode, mx.zeros((1, 4, 6, 16))),
    }
    assert any(mx.float32 in dtypes for dtypes in products(*run[module]))


def test_the_residual_stream_has_the_models_dtype_but_float32_for_float16(typed_pipe, watch):
    sums = watch(transformer.Transformer, "run"), watch(text_encoder, "layer")
    run_transformer(typed_pipe, mx.zeros((1, 12, 10, 16)))
    typed_pipe.text_encoder([5, 6, 7])
    assert [len(seen) for seen in sums] == [3, 3]
    dtype = mx.float32 if typed_pipe.dtype == mx.float16 else typed_pipe.dtype
    streams, hidden = sums
    assert {x.dtype for x in [*(stream.x for run in streams for stream in run), *hidden]} == {dtype}


def test_values_passed_between_networks_have_the_expected_dtype(typed_pipe):
    caption = typed_pipe.encode("a red fox")
    assert caption.dtype == (mx.float32 if typed_pipe.dtype == mx.float16 else typed_pipe.dtype)
    velocity = typed_pipe.transformer.velocity(caption, [1.0, 0.5], 4, 6)
    latents = mx.zeros((1, 4, 6, 16))
    for out in (velocity(latents, 0), typed_pipe.vae.decode(latents), typed_pipe.vae.encode(mx.zeros((1, 32, 48, 3)))):
        assert out.dtype == mx.float32


def test_bfloat16_stays_close_to_float32(pipe, bf16_pipe):
    # a single call from the same input: over a whole run the two drift apart
    ids = pipe.tokenizer.encode("a red fox in the snow")
    caption = pipe.text_encoder(ids)
    latents = mx.array(tiny.randn(0, "latents", 1, 12, 10, 16))
    pixels = mx.array(tiny.encoder_image(0)).transpose(0, 2, 3, 1)

    def outputs(model):
        return {
            "embeddings": model.text_encoder(ids).astype(mx.float32),
            "velocity": model.transformer.velocity(caption, [0.5], 12, 10)(latents, 0),
            "pixels": vae_of(model).decode(latents),
            "latents": vae_of(model).encode(pixels),
        }

    exact = outputs(pipe)
    for name, rounded in outputs(bf16_pipe).items():
        # one rounding to 8 bits errs by 4e-3; measured 1.7e-2 after all of them
        assert 1e-3 < relative_error(rounded, exact[name]) < 5e-2, name


def test_a_cpu_decodes_in_float32_and_a_gpu_in_the_models_dtype(typed_pipe):
    dtype = sum_dtype(typed_pipe.dtype)
    assert typed_pipe.vae.runner.dtype == (mx.float32 if backend() == "cpu" else dtype)
