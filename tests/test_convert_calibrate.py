"""Calibration records the inputs of the matrices, and quantizing with it preserves their products."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.convert import calibrate, convert
from mlx_zimage.convert.calibrate import Calibration, cholesky, second_moments
from mlx_zimage.convert.report import compare, trajectory
from mlx_zimage.convert.rounding import dequantize_rows, quantize_rows
from mlx_zimage.errors import RequestError
from mlx_zimage.models.layers import linear
from mlx_zimage.models.transformer import Transformer
from mlx_zimage.quantization import Quantization
from mlx_zimage.weights.checkpoint import open_checkpoint

PROMPT, SIZE, STEPS = "a red circle", 48, 2


@pytest.fixture
def quick(monkeypatch):
    """Calibration with one small image."""
    monkeypatch.setattr(calibrate, "PROMPTS", (PROMPT,))
    monkeypatch.setattr(calibrate, "MAX_SIDE", SIZE)
    monkeypatch.setattr(calibrate, "STEPS", STEPS)


def test_moments_are_those_of_the_inputs_of_the_matrices(pipe, monkeypatch):
    inputs = {}

    def recording(x, weights):
        flat = x.reshape(-1, x.shape[-1])
        key = tuple(np.array(weights["weight"][0, :3]).tolist())  # random weights identify the matrix
        total, rows = inputs.get(key, (0, 0))
        inputs[key] = total + flat.T @ flat, rows + len(flat)
        return linear(x, weights)

    found = dict(second_moments(pipe, [PROMPT], SIZE, STEPS))
    request = GenerateRequest(prompt=PROMPT, width=SIZE, height=SIZE, seed=0, steps=STEPS)
    network = pipe.transformer
    with monkeypatch.context() as patched:
        patched.setattr(pipe.networks, "transformer", Transformer(network.config, network.runner, recording))
        list(pipe.denoise(request))
    config = pipe.transformer.config
    assert list(found) == [*config.modulated, *(f"context_refiner.{i}" for i in range(config.n_refiner_layers))]
    for block, parts in found.items():
        for layer, name in calibrate.INPUTS.items():
            weight = pipe.checkpoint.transformer.read(f"{block}.{layer}.weight", mx.float32)()
            total, rows = inputs[tuple(np.array(weight[0, :3]).tolist())]
            expected = np.array(total) / rows
            if (block, layer) == (f"layers.{config.n_layers - 1}", "attention.to_q"):
                continue  # runs on the image's rows only; recorded together with keys and values
            # float32 sums of squares in another order
            assert np.abs(np.array(parts[name]) - expected).max() < 1e-5 * np.abs(expected).max(), (block, layer)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (4, 64), (8, 128)])
def test_gptq_preserves_products_better_than_searched_scales(bits, group_size):
    q = Quantization(bits, group_size)
    rng = np.random.default_rng(bits)
    weight = mx.array(rng.standard_normal((96, 256), np.float32)).astype(mx.bfloat16)
    inputs = rng.standard_normal((400, 40), np.float32) @ rng.standard_normal((40, 256), np.float32)
    inputs += 0.3 * rng.standard_normal((400, 256), np.float32)
    factor = cholesky(inputs.T @ inputs / len(inputs))
    errors = []
    for packed in (quantize_rows(weight, q, search=True), quantize_rows(weight, q, factor=factor)):
        error = np.array(dequantize_rows(packed, q) - weight.astype(mx.float32))
        errors.append(np.square(error @ inputs.T).mean())
    assert errors[1] < 0.6 * errors[0]


def test_without_correlations_gptq_equals_searched_scales():
    q, weight = Quantization(4), mx.random.normal((8, 128), key=mx.random.key(3)).astype(mx.bfloat16)
    searched, gptq = (
        quantize_rows(weight, q, search=True),
        quantize_rows(weight, q, factor=np.eye(128, dtype=np.float32)),
    )
    assert all(mx.array_equal(a, b) for a, b in zip(searched, gptq, strict=True))


def test_the_first_request_can_be_for_a_later_block(quick, tiny_folder):
    names = [f"{block}.attention.to_out.0.weight" for block in ("noise_refiner.0", "layers.1", "context_refiner.1")]
    every, last = Calibration(tiny_folder), Calibration(tiny_folder)
    factors = [every.factor(name) for name in names]
    assert np.array_equal(factors[-1], last.factor(names[-1]))
    assert np.array_equal(factors[0], np.tril(factors[0]))


@pytest.mark.parametrize(("steps", "prompts"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_calibrated_folder_has_the_same_size_and_a_more_accurate_velocity(
    quick, tmp_path, monkeypatch, steps, prompts
):
    monkeypatch.setattr(calibrate, "MAX_SIDE", 64)  # with fewer tokens than features, the moments would be singular
    monkeypatch.setattr(calibrate, "STEPS", steps)

    def recipe(component, name, shape):
        chosen = re.fullmatch(r"layers\.[01]\.attention\.to_(v|out\.0)\.weight", name)
        return Quantization(3) if chosen else None

    plain, calibrated = (
        convert("pocket", tmp_path / name, recipe=recipe, **options)
        for name, options in (("plain", {}), ("calibrated", {"calibrate": True}))
    )
    stored = [open_checkpoint(folder).transformer.entries for folder in (plain, calibrated)]
    assert {n: (e.shape, e.dtype) for n, e in stored[0].items()} == {
        n: (e.shape, e.dtype) for n, e in stored[1].items()
    }
    unseen = [
        GenerateRequest(prompt=prompt, width=64, height=64, seed=seed, steps=2)
        for seed, prompt in enumerate(("two green squares", "一个蓝色的圆")[:prompts])
    ]
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32")
    generated = [trajectory(pipe, request) for request in unseen]
    errors = []
    for folder in (plain, calibrated):
        pipe = ZImagePipeline.from_pretrained(folder, dtype="float32")
        errors.append([compare(pipe, *pair)["velocity_error"] for pair in zip(unseen, generated, strict=True)])
    assert np.mean(errors[1]) < 0.7 * np.mean(errors[0])


def test_calibration_generates_with_the_networks_that_are_converted(quick, tmp_path):
    other = ZImagePipeline.from_pretrained("pocket").checkpoint.transformer
    blank = {name: mx.zeros(shape, mx.bfloat16) for name, shape in other.shapes.items()}
    (tmp_path / "blank").mkdir()
    mx.save_safetensors(str(tmp_path / "blank/model.safetensors"), blank)
    (tmp_path / "blank/config.json").write_text(json.dumps(other.raw_config))
    parts = {"transformer": tmp_path / "blank"}
    name = "layers.0.attention.to_out.0.weight"
    moments = np.square(Calibration("pocket", parts=parts).factor(name)).sum()
    assert moments == len(Calibration("pocket").factor(name)), "all inputs are zero: only the damping is left"


def test_options_that_calibration_does_not_support_are_refused(tmp_path):
    with pytest.raises(RequestError, match="calibrate cannot be combined with LoRAs or base"):
        convert("pocket", tmp_path / "out", bits=4, base="pocket", calibrate=True)
    for options in ({}, {"mode": "nvfp4"}):
        for option in ("search", "calibrate"):
            with pytest.raises(RequestError, match=f"{option} needs mode affine"):
                convert("pocket", tmp_path / "out", **options, **{option: True})


@pytest.mark.slow
def test_a_killed_calibrated_conversion_resumes_to_the_same_bytes(tmp_path):
    program = (
        "import os, sys\nfrom mlx_zimage.convert import calibrate, convert_steps, layout\n"
        "layout.SHARD_BYTES, calibrate.PROMPTS, calibrate.MAX_SIDE, calibrate.STEPS = 600_000, ('a ring',), 48, 2\n"
        "for i, _ in enumerate(convert_steps('pocket', sys.argv[1], bits=4, calibrate=True)):\n"
        "    if i == int(sys.argv[2]): os.kill(os.getpid(), 9)\n"
    )

    def run(dest, last):
        return subprocess.run([sys.executable, "-c", program, dest, str(last)], capture_output=True).returncode

    def content(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert run(tmp_path / "whole", -1) == 0
    assert run(tmp_path / "out", 60) == -signal.SIGKILL
    assert (tmp_path / ".out.partial").is_dir()
    assert run(tmp_path / "out", -1) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_the_quality_example_finds_more_bits_more_accurate():
    script = Path(__file__).parents[1] / "examples" / "quality.py"
    small = ["--prompts", "1", "--seeds", "1", "--size", "64", "--steps", "2", "--ways", "4bit,target,8bit"]
    done = subprocess.run([sys.executable, script, *small], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["4bit", "target", "8bit"]
    velocity = {row[0]: float(row[3]) for row in rows}
    assert velocity["8bit"] < 0.2 * velocity["4bit"]
