"""Layers that ComfyUI stores quantized have the values that comfy-kitchen, which writes them, dequantizes them to."""

import json
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from comfyui_files import mixed, pocket_tensors, random_layer, renamed, save, split
from lanes import slow

from mlx_zimage.cli import main
from mlx_zimage.convert import comfyui, convert
from mlx_zimage.convert.files import stored_weights
from mlx_zimage.convert.rows import read_packed
from mlx_zimage.convert.sources import open_source
from mlx_zimage.errors import CheckpointError, NumericsError, RequestError
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.component import read_header
from mlx_zimage.weights.hub import POCKET

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from comfyui_layers import FILE, FORMATS, SHAPES

ROTATED = ("int8-convrot", "w4a4", "w4a8", "w4a8-plain", "w6a8")


def rows_of(tensor, start=0, stop=None):
    return np.array(tensor.read(start, tensor.shape[0] if stop is None else stop).astype(mx.float32))


# ---- what comfy-kitchen wrote


@pytest.fixture(scope="module")
def recorded():
    """The recorded layers by name and rows, and what comfy-kitchen dequantizes them to."""
    entries = read_header(FILE)
    expected = {name.removesuffix(".dequantized"): name for name in entries if name.endswith(".dequantized")}
    stored = stored_weights({name: e for name, e in entries.items() if name not in expected.values()}, [], "file")
    loaded = mx.load(str(FILE))
    return {layer: (stored[f"{layer}.weight"], np.array(loaded[name])) for layer, name in expected.items()}


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_recorded_layers_are_dequantized_as_by_comfy_kitchen(recorded, name, rows, columns):
    tensor, expected = recorded[f"{name}.{rows}"]
    got = rows_of(tensor)[:rows, :columns]
    if name not in ROTATED:
        assert np.array_equal(got, expected)
    # comfy-kitchen sums a rotated group of up to 256 products in float32; here the sum is exact, and rounded once
    assert np.abs(got - expected).max() <= 2.0**-20 * np.abs(expected).max()
    for start, stop in ((0, 1), (rows // 2, rows)):
        assert np.array_equal(rows_of(tensor, start, stop)[:, :columns], got[start:stop])


def test_rotating_twice_is_the_identity_and_whole_numbers_stay_exact():
    rows = np.random.default_rng(0).integers(-128, 128, (5, 1024)).astype(np.float32)
    h4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = np.eye(1)
    for group in (4, 16, 64, 256):
        matrix = np.kron(matrix, h4 / 2)
        once = comfyui.unrotated(mx.array(rows), group)
        assert np.array_equal(np.array(once), (rows.reshape(-1, group) @ matrix).reshape(rows.shape))
        assert np.array_equal(np.array(comfyui.unrotated(once, group)), rows)


# ---- whole files, of random codes


@pytest.mark.parametrize(
    ("marked", "prefix"),
    [("tensors", ""), ("metadata", "model.diffusion_model."), ("without prefix", "model.diffusion_model.")],
)
def test_a_file_may_mix_all_formats_however_they_are_marked(tmp_path, marked, prefix):
    file, values = mixed(tmp_path / "mixed.safetensors", marked, prefix)
    tensors = open_source(file, base="pocket").components["transformer"].tensors
    expected = renamed(values)
    assert {tensor.name for tensor in tensors} == expected.keys()
    for tensor in tensors:
        exact = expected[tensor.name].astype(np.float32)
        # float32 against float64: the products are rounded up to three times
        assert np.abs(rows_of(tensor) - exact).max() <= 2.0**-22 * np.abs(exact).max(), tensor.name


def same_weights(one, other):
    tensors = [{tensor.name: tensor for tensor in source.components["transformer"].tensors} for source in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    return all(np.array_equal(rows_of(tensors[0][name]), rows_of(tensors[1][name])) for name in tensors[0])


def test_shards_of_a_folder_each_list_their_own_layers(tmp_path):
    file, _ = mixed(tmp_path / "mixed.safetensors", "metadata")
    model = shutil.copytree(POCKET, tmp_path / "model")
    for shard in (model / "transformer").glob("*.safetensors*"):
        shard.unlink()
    split(file, model / "transformer")
    whole = open_source(file, base="pocket")
    assert same_weights(open_source(model), whole)
    assert same_weights(open_source(model / "transformer", base="pocket"), whole), "a network's own folder"


def test_a_models_folder_may_have_only_quantized_files(tmp_path):
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    file, _ = mixed(folder / "z_image_int8.safetensors", forms=("convrot",))
    source = open_source(tmp_path, base="pocket")
    assert same_weights(source, open_source(file, base="pocket")) and file in source.weights
    with pytest.raises(CheckpointError, match="; convert it first: mlx-zimage convert SOURCE DEST"):
        open_checkpoint(tmp_path)
    other, _ = mixed(folder / "z_image_nvfp4.safetensors", "metadata", forms=("nvfp4",))
    with pytest.raises(
        RequestError, match=r"several files .*int8\.safetensors, .*nvfp4\.safetensors; choose one with --t"
    ):
        open_source(tmp_path, base="pocket")
    assert same_weights(open_source(tmp_path, transformer=other, base="pocket"), open_source(other, base="pocket"))
    save(folder / "z_image_bf16.safetensors", pocket_tensors())
    assert same_weights(open_source(tmp_path, base="pocket"), open_source("pocket")), "of several, the dense one"


def test_mxfp8_stays_packed_unless_bits_are_given(tmp_path):
    file, values = mixed(tmp_path / "mx.safetensors", forms=("mxfp8",))
    out = convert(file, tmp_path / "out", base="pocket", dtype="float32")
    transformer = open_checkpoint(out).transformer
    block = json.loads((out / "transformer" / "config.json").read_text())["quantization"]
    assert block == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    packed = {name for name in transformer.shapes if f"{name.removesuffix('.weight')}.scales" in transformer.entries}
    assert packed == {name for name in transformer.shapes if re.search(r"(to_.|out\.0|w[123])\.weight$", name)}
    again = {tensor.name: tensor for tensor in open_source(out).components["transformer"].tensors}
    for name, exact in renamed(values).items():
        assert np.array_equal(rows_of(again[name]), exact.astype(np.float32)), name
    dense = convert(file, tmp_path / "dense", base="pocket", bits=16)
    assert not open_checkpoint(dense).transformer.quantizations
    other = convert(file, tmp_path / "other", base="pocket", bits=4)
    assert {str(q) for q in open_checkpoint(other).transformer.quantizations.values()} == {"4-bit affine"}
    plain = convert(file, tmp_path / "plain", base="pocket", format="diffusers")
    assert not open_checkpoint(plain).transformer.quantizations


def test_packed_rows_are_those_that_are_read(tmp_path):
    file, _ = mixed(tmp_path / "mx.safetensors", forms=("mxfp8",))
    tensors = {tensor.name: tensor for tensor in open_source(file, base="pocket").components["transformer"].tensors}
    for part in ("to_q", "to_k", "to_v"):
        tensor = tensors[f"layers.1.attention.{part}.weight"]
        pieces = [mx.concatenate(list(p)) for p in zip(*read_packed(tensor.packing, tensor.shape), strict=True)]
        dense = mx.dequantize(*pieces, group_size=32, bits=8, mode="mxfp8", dtype=mx.float32)
        assert mx.array_equal(dense, tensor.read(0, tensor.shape[0]))


def test_a_scale_of_the_inputs_is_applied_to_the_columns(tmp_path):
    rng = np.random.default_rng(0)
    settings, parts, values = random_layer("nvfp4", 32, 64, rng)
    factor = rng.random(64, np.float32)
    tensors = {f"x.{part}": ("F8_E4M3", a) if part == "weight_scale" else a for part, a in parts.items()}
    tensors |= {"x.pre_quant_scale": factor, "x.comfy_quant": np.frombuffer(json.dumps(settings).encode(), np.uint8)}
    tensor = stored_weights(read_header(save(tmp_path / "x.safetensors", tensors)), [], "file")["x.weight"]
    inputs = rng.standard_normal((3, 64))
    # one more rounding to float32
    assert np.allclose(inputs @ rows_of(tensor).T, (inputs * factor) @ values.T, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "part", "content"),
    [
        ("mxfp8", "weight", np.uint8(127)),  # NaN
        slow("mxfp8", "weight_scale", np.uint8(254)),  # 2**127
        slow("nvfp4", "weight_scale_2", np.float32(np.inf)),
        ("nvfp4", "weight_scale_2", np.float32(3e38)),
        ("w4a8", "weight_codebook", np.full(16, np.inf, np.float32)),  # whose products are clipped
    ],
)
def test_values_that_are_not_finite_are_refused_whatever_is_done_with_them(tmp_path, form, part, content):
    file, _ = mixed(tmp_path / "file.safetensors", forms=(form,))
    entry = read_header(file)[f"layers.0.feed_forward.w2.{part}"]
    with file.open("r+b") as stream:
        stream.seek(entry.offset)
        stream.write(content.tobytes())
    result = CliRunner().invoke(main, ["convert", str(file), str(tmp_path / "out"), "--base", "pocket", "--quiet"])
    assert result.exit_code == NumericsError.exit_code
    layer = "layers.0.feed_forward.w2"
    assert result.output == f"Error: {layer}.weight contains NaN or infinity; download the source model again\n"
    assert not (tmp_path / "out").exists()


def test_info_counts_the_weights_of_quantized_layers_and_names_their_formats(tmp_path):
    files = save(tmp_path / "dense.safetensors", pocket_tensors()), mixed(tmp_path / "mixed.safetensors")[0]
    printed = [CliRunner().invoke(main, ["info", str(file), "--json"]).output for file in files]
    dense, quantized = (json.loads(text)["networks"]["transformer"] for text in printed)
    assert quantized["parameters"] == dense["parameters"]
    formats = ["asym_w4a8_int8", "convrot_w4a4", "float32", "int8_tensorwise", "mxfp8", "nvfp4"]
    assert (dense["stored_as"], quantized["stored_as"]) == (["float32"], formats)


def test_a_quantized_file_is_not_used_unconverted(tmp_path):
    for forms in (("convrot",), ("nvfp4",), ("mxfp8",)):
        file, _ = mixed(tmp_path / "file.safetensors", forms=forms)
        with pytest.raises(CheckpointError, match="; convert it first: mlx-zimage convert SOURCE DEST"):
            open_checkpoint(file, parts={"text_encoder": "pocket", "vae": "pocket"})
