"""Runs each program in examples/ as a user would, in an empty folder, with the pocket checkpoint.

The exception is full_size.py, which would write 33 GB: it runs with small architectures.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.weights.checkpoint import open_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args: str) -> str:
        result = subprocess.run([sys.executable, EXAMPLES / name, *args], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    return run


def colour(file: str, x: int, y: int) -> np.ndarray:
    return np.asarray(Image.open(file), dtype=int)[y, x]


@pytest.mark.slow
def test_one_image(run):
    assert run("one_image.py") == "image.png, generated from seed 1\n"
    red, _, blue = colour("image.png", 64, 64)
    assert red > blue + 100


@pytest.mark.slow
def test_batch(run):
    assert run("batch.py") == "sheet.png\n"
    assert Image.open("sheet.png").size == (2 * 128, 2 * 128)
    assert colour("sheet.png", 5, 5)[2] > 150 > 60 > colour("sheet.png", 5, 250).max(), "blue above, black below"


@pytest.mark.slow
def test_progress(run):
    lines = run("progress.py").splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"step {i} of 8" for i in range(1, 9)]
    assert lines[-1].startswith("image (128, 128, 3) after")


@pytest.mark.slow
def test_custom_schedule(run):
    assert "sigmas 1.000, 0.924, 0.707, 0.383, 0.000\n" in run("custom_schedule.py")
    own, cosine = (np.asarray(Image.open(f"{name}.png"), dtype=int) for name in ("own", "cosine"))
    assert 0 < np.abs(own - cosine).mean() < 40  # of 255: the same scene, slightly different


@pytest.mark.slow
def test_latents(run):
    assert run("latents.py").endswith("between-0.png\nbetween-1.png\nbetween-2.png\n")
    assert np.load("clean.npy").shape == (3, 16, 16, 16)
    red, _, blue = colour("between-1.png", 5, 5)
    assert red > blue + 100, "yellow behind"


@pytest.mark.parametrize("steps", [["--steps", "2"], pytest.param([], marks=pytest.mark.slow)], ids=["2", "default"])
def test_peaks(run, steps):
    pocket = str(EXAMPLES.parent / "mlx_zimage/pocket")
    header, *rows = run("peaks.py", pocket, "32", "32:14MB", *steps).splitlines()
    kept, streamed = (row.split() for row in rows)
    assert "kept" in kept and "streamed" in streamed
    assert kept[-1] == streamed[-1], "the same latents"
    assert float(streamed[-2]) > float(kept[-2]) == 0, "gigabytes read per step"
    ratio = header.split().index("ratio")
    assert float(kept[ratio]) >= 1
    assert float(streamed[ratio + 1]) >= 1  # "3 streamed" is two words


@pytest.mark.parametrize(
    ("options", "dtype", "bits"),
    [([], "F32", None), (["--dtype", "bfloat16"], "BF16", None), (["--q-bits", "4"], "BF16", 4)],
    ids=["published", "dense", "packed"],
)
def test_full_size(tmp_path, monkeypatch, options, dtype, bits):
    """With architectures a thousandth of the size."""
    program = runpy.run_path(str(EXAMPLES / "full_size.py"))
    configs = (
        TransformerConfig(dim=192, n_layers=2, n_refiner_layers=1, n_heads=6, cap_feat_dim=64, axes_dims=(8, 12, 12)),
        TextEncoderConfig(64, 128, 3, 4, 2, 16, vocab_size=1024),
        VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
    )
    for (name, (_, *rest)), config in zip(list(program["COMPONENTS"].items()), configs, strict=True):
        monkeypatch.setitem(program["COMPONENTS"], name, (config, *rest))
    monkeypatch.setitem(program["main"].callback.__globals__, "SHARD_BYTES", 10**6)
    result = CliRunner().invoke(program["main"], [str(tmp_path / "model"), *options], catch_exceptions=False)
    files = result.stdout.split()
    assert len(files) > 3 and all(Path(file).is_file() for file in files)
    checkpoint = open_checkpoint(tmp_path / "model")
    entries = checkpoint.transformer.entries
    assert entries["layers.0.attention_norm1.weight"].dtype == dtype
    assert {q.bits for q in checkpoint.transformer.quantizations.values()} == ({bits} if bits else set())
    request = GenerateRequest("a red fox", 32, 32, seed=1, steps=1)
    (image,) = [event for event in ZImagePipeline(checkpoint, mx.float32).stream(request) if hasattr(event, "pixels")]
    assert image.pixels.std() > 1


def report(passed: bool = True, **machine: object) -> tuple[dict, dict]:
    """What doctor and bench write on an M1 with 16 GB."""
    facts = {"device": "Apple M1", "architecture": "applegpu_g13g", "macos": "15.1", "mlx": "0.32.4"} | machine
    checks = [{"name": "attention", "error": 1e-6 if passed else None, "limit": 1e-3}]
    speeds = {"product_tflops": 1.0349}
    doctor = {
        "machine": facts | {"memory_budget": 11_453_000_000},
        "speeds": speeds,
        "passed": passed,
        "checks": checks,
    }
    phases = {
        name: {"median_s": seconds, "peak_gb": peak}
        for name, seconds, peak in (("encode", 0.5, 4.2), ("steps", 61.25, 7.07), ("decode", 5.0, 5.5))
    }
    case = {"width": 1024, "height": 1024, "bits": 4, "dtype": "float16"}
    return doctor, {"machine": facts, "case": case, **phases}


def test_the_row_of_a_machine_is_made_from_two_files(run):
    for file, content in zip(("doctor.json", "bench.json"), report(), strict=True):
        Path(file).write_text(json.dumps(content))
    printed = run("measured_row.py", "doctor.json", "bench.json")
    assert printed == (
        "| Apple M1, 11 GB for the GPU, macOS 15.1, MLX 0.32.4, 1.03 TFLOP/s | 4 bits, float16 | 1024x1024 "
        "| 0.500 | 61.250 | 5.000 | 7.1 |\n"
    )
    header = next(
        line for line in (EXAMPLES / "measurements.md").read_text().splitlines() if line.startswith("| machine")
    )
    assert printed.count("|") == header.count("|")


def test_no_row_is_made_from_two_machines_or_from_one_that_computes_wrongly():
    row = runpy.run_path(str(EXAMPLES / "measured_row.py"))["row"]
    with pytest.raises(SystemExit, match="two machines"):
        row(report()[0], report(device="Apple M2")[1])
    with pytest.raises(SystemExit, match="wrong results for attention"):
        row(*report(passed=False))


def test_every_example_is_run_by_a_test():
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    for program in EXAMPLES.glob("*.py"):
        assert f'"{program.name}"' in tests or f"/{program.name}" in tests, program.name
