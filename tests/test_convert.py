"""The converter: its output is its input, cast or quantized; and it writes everything or nothing."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from lanes import slow
from safetensors import safe_open
from tiny import TRANSFORMER, save_component, weights, write_checkpoint

from mlx_zimage import ZImagePipeline
from mlx_zimage.cli import main
from mlx_zimage.convert import convert, convert_steps, layout, rows
from mlx_zimage.convert.choose import quantizations
from mlx_zimage.convert.shards import PAGE
from mlx_zimage.convert.writer import OutputFolder
from mlx_zimage.errors import CheckpointError, NumericsError, OutputError, RequestError
from mlx_zimage.machine import backend
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.quantization import MODES, Quantization
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.component import read_header
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.manifest import CONVERSION, MANIFEST

COMPONENTS = ("transformer", "text_encoder", "vae")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A tiny checkpoint as published: sharded float32 transformer, sharded bfloat16 encoder, bfloat16 VAE."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "official", seed=3)


def dense(folder, component, dtype=mx.float32):
    """Every tensor of a component by its dense name, unpacked, in the layout on disk."""
    part = getattr(open_checkpoint(folder), component)
    loaded = {file: mx.load(str(file)) for file in {entry.file for entry in part.entries.values()}}
    arrays = {name: loaded[entry.file][entry.name] for name, entry in part.entries.items()}
    for layer, q in part.quantizations.items():
        weight, scales = arrays[f"{layer}.weight"], arrays.pop(f"{layer}.scales")
        biases = arrays.pop(f"{layer}.biases", None)
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        arrays[f"{layer}.weight"] = mx.dequantize(
            weight, scales, biases, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=mx.float32
        )
    return {name: array.astype(dtype) for name, array in arrays.items()}


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


def files(folder):
    """Relative path -> content of the files in a folder, except those that depend on its origin."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in (CONVERSION, MANIFEST)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", slow("float16")])
def test_a_dense_conversion_casts_the_source(official, tmp_path, dtype):
    out = convert(official, tmp_path / "out", dtype=dtype)
    for component in COMPONENTS:
        expected, got = dense(official, component), dense(out, component, getattr(mx, dtype))
        assert expected.keys() == got.keys()
        assert all(same(expected[name].astype(getattr(mx, dtype)), got[name]) for name in expected)
        stored = {entry.dtype for entry in getattr(open_checkpoint(out), component).entries.values()}
        assert stored == {{"bfloat16": "BF16", "float32": "F32", "float16": "F16"}[dtype]}


# Largest error of a value, relative to the largest value in its group. Affine: one step if the range is one-sided and
# its end is moved onto the grid, plus the rounding of scale and bias to bfloat16. The others: half the widest gap of
# the format, or the loss where it saturates.
BOUNDS = {"affine": lambda bits: 2.0 ** (1 - bits) + 2.0**-8, "mxfp4": 1 / 4, "mxfp8": 1 / 16, "nvfp4": 1 / 4}


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [
        (mode, b, g)
        if (mode, b) in (("affine", 4), ("mxfp8", 8)) and g != 32 * (mode == "affine")
        else slow(mode, b, g)
        for mode, (bits, groups) in MODES.items()
        for b in bits
        for g in groups
        if g != 128
    ],
)
def test_quantized_weights_are_close_to_the_source_and_the_rest_is_exact(tmp_path, mode, bits, group_size):
    # not 128: the pocket transformer is 192 wide
    out = convert("pocket", tmp_path / "out", bits=bits, group_size=group_size, mode=mode)
    bound = BOUNDS[mode](bits) if callable(BOUNDS[mode]) else BOUNDS[mode]
    for component in COMPONENTS:
        source, got = dense("pocket", component), dense(out, component)
        assert source.keys() == got.keys()
        packed = getattr(open_checkpoint(out), component).quantizations
        assert set(packed.values()) <= {Quantization(bits, group_size, mode)}
        for name, exact in source.items():
            if name.removesuffix(".weight") not in packed:
                assert same(exact, got[name])
                continue
            error = mx.abs(exact - got[name]).reshape(-1, group_size).max(-1)
            assert (error <= bound * mx.abs(exact).reshape(-1, group_size).max(-1)).all()


def test_only_the_matrices_of_the_blocks_are_quantized(tmp_path):
    checkpoint = open_checkpoint(convert("pocket", tmp_path / "out", bits=4))
    config = checkpoint.transformer.config
    blocks = [f"layers.{i}" for i in range(config.n_layers)]
    blocks += [f"{refiner}_refiner.{i}" for refiner in ("noise", "context") for i in range(config.n_refiner_layers)]
    parts = [f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    parts += [f"feed_forward.w{i}" for i in (1, 2, 3)]
    assert set(checkpoint.transformer.quantizations) == {f"{block}.{part}" for block in blocks for part in parts}
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layers = checkpoint.text_encoder.config.num_hidden_layers
    assert set(checkpoint.text_encoder.quantizations) == {
        f"model.layers.{i}.{part}" for i in range(layers) for part in parts
    }
    assert not checkpoint.vae.quantizations


def test_each_network_can_have_its_own_bits(tmp_path):
    checkpoint = open_checkpoint(convert("pocket", tmp_path / "out", bits=4, transformer_bits=8, text_encoder_bits=16))
    assert {q.bits for q in checkpoint.transformer.quantizations.values()} == {8}
    assert not checkpoint.text_encoder.quantizations
    assert quantizations(None, transformer_bits=4).networks == {"transformer": Quantization(4), "text_encoder": None}
    networks = quantizations(None, mode="mxfp8", text_encoder_bits=0).networks
    assert networks == {"transformer": Quantization(8, 32, "mxfp8"), "text_encoder": None}
    assert not quantizations(None).quantizes


def test_the_config_has_mlx_lms_quantization_block_and_the_right_dtype(tmp_path):
    out = convert("pocket", tmp_path / "out", dtype="float16", bits=8, group_size=32, transformer_bits=0)
    text = (out / "text_encoder" / "config.json").read_text()
    config = json.loads(text)
    assert config["quantization"] == config["quantization_config"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert config["torch_dtype"] == "float16"
    assert text.rstrip() == json.dumps(config, indent=4, sort_keys=True)
    source = json.loads((POCKET / "transformer" / "config.json").read_text())
    assert json.loads((out / "transformer" / "config.json").read_text()) == source


def test_the_index_describes_the_quantization_to_mlx_vlm_if_it_is_the_same_for_all_layers(tmp_path):
    def metadata(folder, network):
        return json.loads((folder / network / "model.safetensors.index.json").read_text())["metadata"]

    out = convert("pocket", tmp_path / "out", bits=4, group_size=32, text_encoder_bits=8)
    for network, bits in (("transformer", "4"), ("text_encoder", "8")):
        found = metadata(out, network)
        assert found.pop("total_size") and found.pop("total_parameters")
        assert found == {
            "quantization_mode": "affine",
            "quantization_level": bits,
            "quantization_group_size": "32",
            "mlx_vlm_format": "z_image",
        }
    assert metadata(out, "vae").keys() == {"total_size", "total_parameters"}
    mixed = convert("pocket", tmp_path / "mixed", bits=4, recipe="mixed")
    assert metadata(mixed, "transformer").keys() == {"total_size", "total_parameters"}


def test_the_index_lists_every_tensor_in_shards_of_bounded_size(official, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 40_000)
    out = convert(official, tmp_path / "out") / "transformer"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    assert [shard.name for shard in shards] == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    loaded = {shard.name: mx.load(str(shard), return_metadata=True) for shard in shards}
    assert all(metadata == {"format": "mlx"} for _, metadata in loaded.values())
    assert index["weight_map"] == {name: shard for shard, (arrays, _) in loaded.items() for name in arrays}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    source = weights(3, "transformer", TRANSFORMER)
    parameters = sum(array.size for array in source.values())
    assert index["metadata"] == {"total_size": 2 * parameters, "total_parameters": parameters}
    largest = max(2 * array.size for array in source.values())
    assert all(shard.stat().st_size <= max(40_000, largest) + 20_000 for shard in shards)  # with the header


def test_converting_again_gives_the_same_bytes(official, tmp_path):
    once = convert(official, tmp_path / "once")
    assert files(convert(once, tmp_path / "twice")) == files(once)


def test_quantizing_a_converted_folder_equals_quantizing_the_source(official, tmp_path):
    dense_first = convert(convert("pocket", tmp_path / "dense"), tmp_path / "a", bits=4)
    assert files(dense_first) == files(convert("pocket", tmp_path / "b", bits=4))


def test_dequantizing_a_converted_folder_gives_its_weights(tmp_path):
    packed = convert("pocket", tmp_path / "packed", bits=4)
    out = convert(packed, tmp_path / "out", dtype="float32")
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    for component in COMPONENTS:
        expected, got = dense(packed, component), dense(out, component)
        assert all(same(expected[name], got[name]) for name in expected)


def test_small_files_are_copied(official, tmp_path):
    source, out = files(official), files(convert(official, tmp_path / "out"))
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert out[name] == source[name]
    assert not any("diffusion_pytorch_model" in name for name in out)


def test_an_encoder_without_its_unused_last_layer_is_accepted(official, tmp_path):
    source = shutil.copytree(official, tmp_path / "source")
    config = json.loads((source / "text_encoder" / "config.json").read_text())
    arrays = dense(source, "text_encoder")
    kept = {name: array for name, array in arrays.items() if not name.startswith("model.layers.3.")}
    shutil.rmtree(source / "text_encoder")
    # without the prefix, as saved from the bare model
    save_component(source / "text_encoder", "text_encoder", {n[6:]: a for n, a in kept.items()}, config)
    out = convert(source, tmp_path / "out", dtype="float32")
    got = dense(out, "text_encoder")
    assert kept.keys() == got.keys()
    assert all(same(kept[name], got[name]) for name in kept)


def test_pocket_still_generates_images_at_four_bits(tmp_path):
    out = convert("pocket", tmp_path / "out", bits=4)
    image = ZImagePipeline.from_pretrained(out, dtype="float32")(
        "a red circle on a blue background", width=64, height=64, seed=1, output_type="np"
    ).images[0]
    corner = image[:8, :8].mean((0, 1))
    assert corner[2] > 2 * corner[0]  # the background is blue


def test_progress_counts_the_bytes_of_the_source(official, tmp_path):
    steps = list(convert_steps(official, tmp_path / "out", bits=None))
    total = sum(part.nbytes for part in open_checkpoint(official).components)
    assert {step.total_bytes for step in steps} == {total}
    assert steps[-1].done_bytes == total
    assert all(a.done_bytes < b.done_bytes for a, b in pairwise(steps))
    assert len(steps) == sum(len(part.entries) for part in open_checkpoint(official).components)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"bits": 7}, "2, 3, 4, 5, 6 or 8 bits, got 7"),
        ({"bits": 4, "group_size": 48}, "group size of 32, 64 or 128, got 48"),
        ({"bits": 4, "group_size": 128}, "192 wide, which is not a multiple of the group size 128"),
        ({"bits": 8, "mode": "mxfp4"}, "mxfp4 quantization takes 4 bits, got 8"),
        ({"mode": "int4"}, "mode must be one of"),
        ({"group_size": 32}, "nothing would be quantized"),
    ],
)
def test_invalid_options_are_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(RequestError, match=message):
        convert("pocket", tmp_path / "out", **({"dtype": "bfloat16"} | options))
    assert not list(tmp_path.iterdir())


def test_an_existing_destination_is_refused(official, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match="already exists"):
        convert(official, tmp_path / "out")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(RequestError, match="already exists"):
        convert(official, tmp_path / "link")


@pytest.mark.parametrize("inside", ["converted", "transformer/converted", "../official/converted"])
def test_a_destination_in_the_source_is_refused(official, inside):
    before = files(official)
    with pytest.raises(RequestError, match="inside the source"):
        convert(official, official / inside)
    with pytest.raises(RequestError, match="inside the source"):
        convert("pocket", official / inside, vae=official)
    assert files(official) == before


def test_a_full_disk_is_reported_before_any_work(official, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    with pytest.raises(OutputError, match=r"needs 1\.75 MB more, but its disk has only 0\.00 MB free"):
        convert(official, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_bits_may_be_chosen_by_the_memory_of_a_mac(tmp_path):
    for memory, bits in (("8GB", 4), ("16gb", 6)):
        out = tmp_path / memory
        result = CliRunner().invoke(main, ["convert", "pocket", str(out), "--for", memory, "--quiet"])
        assert result.exit_code == 0, result.output
        assert {q.bits for q in open_checkpoint(out).transformer.quantizations.values()} == {bits}
    result = CliRunner().invoke(main, ["convert", "pocket", "out", "--for", "8GB", "--q-bits", "4"])
    assert result.exit_code == 2 and "--for chooses the bits itself; leave out --q-bits" in result.output


def test_info_shows_what_a_folder_was_converted_from(tmp_path):
    folder = convert(convert("pocket", tmp_path / "once", bits=4), tmp_path / "twice", bits=8)
    result = CliRunner().invoke(main, ["info", str(folder)])
    assert "converted from once (from pocket) by mlx-zimage" in result.stdout
    assert re.search(r"text_encoder .*8-bit affine .*, bfloat16: 10\.\d\d bits per weight\n", result.stdout)
    shown = json.loads(CliRunner().invoke(main, ["info", str(folder), "--json"]).stdout)
    assert shown["conversion"]["before"]["source"] == "pocket"
    assert shown["networks"]["vae"]["bits_per_weight"] == 16


def test_a_missing_parent_folder_is_created(official, tmp_path):
    assert open_checkpoint(convert(official, tmp_path / "new" / "out"))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "bfloat16", "attention.to_k.weight contains NaN"),
        (-np.inf, "float32", "attention.to_k.weight contains NaN or infinity"),
        (1e30, "float16", "attention.to_k.weight has values out of range for float16"),
    ],
)
def test_values_that_are_not_finite_are_refused_by_name(official, tmp_path, value, dtype, message):
    source = shutil.copytree(official, tmp_path / "source")
    arrays = weights(3, "transformer", TRANSFORMER)
    arrays["layers.1.attention.to_k.weight"][5, 7] = value
    shutil.rmtree(source / "transformer")
    save_component(source / "transformer", "transformer", arrays, TRANSFORMER)
    with pytest.raises(NumericsError, match=message):
        convert(source, tmp_path / "out", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_leaving_the_loop_leaves_no_files(official, tmp_path):
    steps = convert_steps(official, tmp_path / "out")
    for _ in range(30):
        next(steps)
    assert list(tmp_path.iterdir())
    steps.close()
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_no_files(official, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(official, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [0, 2_000_000])
def test_a_disk_that_fills_up_is_reported_and_leaves_no_files(tmp_path, limit):
    program = (
        "import resource, signal, sys\n"
        "from mlx_zimage.convert import convert\n"
        "from mlx_zimage.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[2]),))\n"
        "try:\n    convert('pocket', sys.argv[1])\n"
        "except OutputError as error:\n    print(error); sys.exit(error.exit_code)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "out", str(limit)], capture_output=True, text=True)
    assert run.returncode == 6, run.stderr
    assert ": File too large" in run.stdout
    assert not list(tmp_path.iterdir())


def test_the_source_is_not_modified(official, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in official.rglob("*")}, files(official)
    convert(official, tmp_path / "out", bits=None)
    assert ({path: path.stat().st_mtime_ns for path in official.rglob("*")}, files(official)) == before


@pytest.mark.parametrize("bits", [slow(None), 4])
def test_peak_memory_does_not_grow_with_the_model(tmp_path, bits):
    peaks = {}
    for layers in (1, 12):
        config = TRANSFORMER | {
            "dim": 384,
            "n_heads": 4,
            "axes_dims": [32, 32, 32],
            "n_layers": layers,
            "n_refiner_layers": 1,
        }
        source = write_checkpoint(tmp_path / f"source{layers}", seed=3)
        shutil.rmtree(source / "transformer")
        arrays = {name: mx.ones(shape) for name, shape in TransformerConfig.from_dict(config).shapes().items()}
        save_component(source / "transformer", "transformer", arrays, config)
        del arrays
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        convert(source, tmp_path / f"out{layers}", transformer_bits=bits)
        peaks[layers] = mx.get_peak_memory() - before
    assert peaks[12] <= 1.05 * peaks[1]


def test_a_tensor_is_read_a_few_rows_at_a_time(official, tmp_path, monkeypatch):
    whole = convert(official, tmp_path / "whole", bits=None)
    monkeypatch.setitem(rows.CHUNK_BYTES, backend(), 20_000)
    assert files(convert(official, tmp_path / "pieces", bits=None)) == files(whole)
    packed = convert("pocket", tmp_path / "packed", bits=4)
    monkeypatch.undo()
    assert files(packed) == files(convert("pocket", tmp_path / "packed whole", bits=4))


def test_integer_weights_without_a_quantization_config_are_refused(tmp_path):
    source = shutil.copytree(POCKET, tmp_path / "source")
    file = source / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = mx.load(str(file))
    name = "decoder.conv_in.bias"
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays | {name: arrays[name].astype(mx.uint32)})
    with pytest.raises(CheckpointError, match=f"{name} is U32"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("bits", [None, 4, slow(8)])
def test_tensors_that_fill_whole_memory_pages_begin_on_one(tmp_path, bits):
    """So that they can be mapped. Safetensors allows no gaps, so the rest is not aligned."""
    out = convert("pocket", tmp_path / "out", bits=bits)
    aligned, misaligned = [], []
    for file in out.rglob("*.safetensors"):
        with safe_open(file, framework="numpy") as reader:  # refuses gaps, and headers that do not fit
            names = set(reader.keys())
        arrays, header = mx.load(str(file)), read_header(file)
        assert names == set(arrays) == set(header)
        assert min(entry.offset for entry in header.values()) % PAGE == 0
        for name, entry in header.items():
            with file.open("rb") as stream:
                stream.seek(entry.offset)
                assert stream.read(entry.nbytes) == bytes(np.array(arrays[name].reshape(-1).view(mx.uint8)))
            layer = name.removesuffix(".weight")
            helpers = (header[f"{layer}.{part}"].nbytes for part in ("scales", "biases") if f"{layer}.{part}" in header)
            if name.endswith(".weight") and (entry.nbytes + sum(helpers)) % PAGE == 0:
                (misaligned if entry.offset % PAGE else aligned).append(name)
    assert len(aligned) >= 10 and not misaligned
