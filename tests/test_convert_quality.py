"""How bits are distributed over layers, and the gain from searching for scales."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from lanes import slow

from mlx_zimage.convert import choose, convert
from mlx_zimage.convert.choose import quantizations
from mlx_zimage.convert.rounding import dequantize_rows, pack_codes, quantize_rows
from mlx_zimage.errors import RequestError
from mlx_zimage.quantization import MODES, Quantization
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.quantize import QUANTIZED

AFFINE_BITS = MODES["affine"][0]


def nbytes(folder):
    return sum(component.nbytes for component in open_checkpoint(folder).components)


def bits_of(folder):
    return {
        (component.name, layer): q.bits
        for component in open_checkpoint(folder).components
        for layer, q in component.quantizations.items()
    }


@pytest.fixture(scope="module")
def weight():
    mx.random.seed(5)
    heavy_tails = mx.random.normal((256, 512)) * mx.exp(0.5 * mx.random.normal((256, 512)))
    return (0.02 * heavy_tails).astype(mx.bfloat16)


def squared_error(weight, q, search):
    return mx.square(dequantize_rows(quantize_rows(weight, q, search), q) - weight.astype(mx.float32))


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_codes_are_packed_as_in_mlx(bits):
    q = Quantization(bits)
    weight, scales, biases = mx.quantize(mx.random.normal((16, 256)), bits=bits, group_size=64)
    codes = mx.dequantize(weight, mx.ones_like(scales), mx.zeros_like(biases), bits=bits, group_size=64)
    assert np.array_equal(pack_codes(np.array(codes).astype(np.uint8), q.bits), np.array(weight))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_searched_scales_are_never_worse_and_usually_better(weight, bits, group_size):
    q = Quantization(bits, group_size)
    plain, searched = (squared_error(weight, q, search).reshape(-1, group_size).sum(-1) for search in (False, True))
    # the plain scales are among the candidates; their codes are chosen again, for the scales as stored
    assert (searched <= plain * (1 + 1e-5) + 1e-12).all()
    assert searched.sum() < 0.93 * plain.sum()


def test_searching_keeps_values_that_are_exactly_on_the_grid():
    q = Quantization(4)
    grid = mx.arange(16).astype(mx.float32)
    rows = mx.concatenate([grid] * 4 + [mx.zeros(64), mx.full(64, 3.0)]).reshape(1, 192).astype(mx.bfloat16)
    assert mx.array_equal(dequantize_rows(quantize_rows(rows, q, search=True), q), rows.astype(mx.float32))


def test_a_folder_with_searched_scales_has_the_same_layout_and_less_error(tmp_path):
    plain = convert("pocket", tmp_path / "plain", bits=4)
    searched = convert("pocket", tmp_path / "searched", bits=4, search=True)
    a, b = (open_checkpoint(folder).transformer for folder in (plain, searched))
    assert {n: (e.shape, e.dtype) for n, e in a.entries.items()} == {
        n: (e.shape, e.dtype) for n, e in b.entries.items()
    }
    layer, source = "layers.2.feed_forward.w2", open_checkpoint("pocket").transformer
    exact = source.read(f"{layer}.weight", mx.float32)()

    def error(part):
        packed = [part.read(f"{layer}.{name}", mx.bfloat16)() for name in ("weight", "scales", "biases")]
        return mx.square(dequantize_rows(packed, Quantization(4)) - exact).sum().item()

    assert error(b) < 0.93 * error(a)


def test_mixed_gives_more_bits_to_values_and_outputs(tmp_path):
    out = convert("pocket", tmp_path / "out", bits=4, recipe="mixed")
    for (component, layer), bits in bits_of(out).items():
        expected = 4
        if component == "transformer":
            expected = 6 if layer.endswith("to_v") else 5 if layer.endswith("to_out.0") else 4
        assert bits == expected, layer
    block = json.loads((out / "transformer" / "config.json").read_text())["quantization"]
    assert (block["bits"], block["group_size"], block["mode"]) == (4, 64, "affine")
    assert block["layers.0.attention.to_v"] == {"bits": 6, "group_size": 64, "mode": "affine"}
    assert "layers.0.attention.to_q" not in block


def test_mixed_stops_at_eight_bits(tmp_path):
    assert set(bits_of(convert("pocket", tmp_path / "out", transformer_bits=8, recipe="mixed")).values()) == {8}


def test_a_recipe_is_a_function_of_component_name_and_shape(tmp_path):
    def recipe(component, name, shape):
        if component == "transformer" and ".to_v." in name:
            return Quantization(8, 32) if name.startswith("layers.0.") else Quantization(8, 32, "mxfp8")
        return None

    out = open_checkpoint(convert("pocket", tmp_path / "out", recipe=recipe))
    packed = out.transformer.quantizations
    assert {layer.rpartition(".")[2] for layer in packed} == {"to_v"}
    assert packed["layers.0.attention.to_v"] == Quantization(8, 32)
    assert packed["layers.1.attention.to_v"] == Quantization(8, 32, "mxfp8")
    assert not out.text_encoder.quantizations


@pytest.mark.parametrize("fraction", [0.56, slow(0.6), slow(0.7), 0.9])
def test_a_target_size_is_used_up_and_never_exceeded(tmp_path, fraction):
    target = int(fraction * nbytes("pocket"))
    out = convert("pocket", tmp_path / "out", target_size=target)
    assert 0.97 * target < nbytes(out) <= target


def test_a_larger_target_never_reduces_the_bits_of_a_layer(tmp_path):
    targets = int(0.6 * nbytes("pocket")), int(0.75 * nbytes("pocket"))
    small, large = (convert("pocket", tmp_path / f"{n}", target_size=n) for n in targets)
    fewer, more = bits_of(small), bits_of(large)
    assert all(bits <= more.get(layer, 16) for layer, bits in fewer.items())


def test_a_target_of_the_full_size_leaves_everything_dense(tmp_path):
    out = convert("pocket", tmp_path / "out", target_size=nbytes("pocket"))
    assert not bits_of(out)


def test_every_layer_that_is_quantized_has_an_importance():
    for name, shape in open_checkpoint("pocket").transformer.config.shapes().items():
        if QUANTIZED["transformer"].fullmatch(name):
            assert len(shape) == 2
            assert choose.KIND.match(name)[1] in choose.IMPORTANCE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.2GB", 3_200_000_000),
        ("900 mb", 900_000_000),
        ("1GiB", 2**30),
        (1234567, 1234567),
        ("5e3", None),
        ("big", None),
    ],
)
def test_sizes_are_parsed_in_the_usual_spellings(text, expected):
    if expected is None:
        with pytest.raises(RequestError, match=r"target_size must be a size such as 3\.2GB"):
            quantizations(None, target_size=text)
    else:
        assert quantizations(None, target_size=text).target == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": "1MB"}, "is too small: with 3 bits in every layer"),
        ({"target_size": "5MB", "bits": 4}, "a target size and bits were both given"),
        ({"target_size": "5MB", "mode": "mxfp4"}, "in mode affine"),
        ({"recipe": "best"}, "recipe must be one of uniform, mixed, got 'best'"),
        ({"recipe": "mixed", "mode": "mxfp4"}, "mixed needs mode affine"),
        ({"recipe": "mixed"}, "recipe mixed was given without bits"),
        ({"recipe": lambda *_: None, "bits": 4}, "a recipe function chooses bits"),
        ({"recipe": lambda *_: Quantization(4)}, "transformer x_pad_token cannot be quantized"),
    ],
)
def test_conflicting_options_are_refused(tmp_path, options, message):
    with pytest.raises(RequestError, match=message):
        convert("pocket", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_sensitivity_example_finds_values_more_sensitive_than_keys():
    script = Path(__file__).parents[1] / "examples" / "sensitivity.py"
    done = subprocess.run([sys.executable, script, "pocket", "3", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    errors = {line.split("  error ")[0].strip(): float(line.split()[-1]) for line in done.stdout.splitlines()}
    assert errors["to_v"] > 3 * errors["to_k"]
