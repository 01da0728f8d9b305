"""The benchmark's counts and reports, with random weights for a tiny architecture."""

import gc
import json
import shutil
import threading
from dataclasses import replace

import mlx.core as mx
import pytest
from lanes import slow

from mlx_zimage import MemoryBudgetError, RequestError, ZImageError, bench, pipeline, variants
from mlx_zimage.convert import convert
from mlx_zimage.machine import backend
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import Transformer, TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.variants import BASE
from mlx_zimage.weights.blocks import READS_AHEAD
from mlx_zimage.weights.random import RandomWeights

TINY = (
    TransformerConfig(dim=192, n_layers=2, n_refiner_layers=1, n_heads=6, cap_feat_dim=64, axes_dims=(8, 12, 12)),
    TextEncoderConfig(64, 128, 3, 4, 2, 16, vocab_size=64),
    VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench.ARCHITECTURES, "tiny", TINY)


@pytest.mark.parametrize("bits", [slow(None), 4])
def test_a_report_has_every_phase_and_the_matmul_rate(tiny, bits):
    case = bench.Case(width=64, height=48, steps=2, caption_tokens=7, dtype="float32", bits=bits)
    report = bench.bench(architecture="tiny", case=case, repeat=1)
    for phase in ("encode", "steps", "decode"):
        assert report[phase]["median_s"] > 0 and 0 < report[phase]["peak_gb"] < 0.1
    assert report["fraction_of_matmul"] == pytest.approx(report["steps_tflops"] / report["matmul_tflops"])
    text = bench.bench_table(report)
    assert ("4-bit affine" if bits else "float32") in text and "64x48" in text


def test_a_checkpoint_can_be_timed_too(light_pocket):
    case = bench.Case(width=64, height=64, steps=1, caption_tokens=9, dtype="float32")
    assert bench.bench("pocket", case=case, repeat=1)["model"] == "pocket"


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        slow({"bits": 8}, "8-bit affine in float32"),
        slow({"bits": 8, "text_encoder_bits": 16}, "8-bit affine in float32"),
        ({"bits": 4, "transformer_bits": 8}, "8-bit affine in float32"),  # the transformer has more layers
        slow({"bits": 4, "text_encoder_bits": 4, "transformer_bits": 16}, "4-bit affine in float32"),
        ({}, "pocket, float32"),
    ],
    ids=["all", "transformer", "two", "text encoder", "none"],
)
def test_the_report_has_the_models_own_bits(tmp_path, monkeypatch, bits, expected):
    monkeypatch.setattr(bench, "time_first_step", lambda *_: 1.0)
    case = bench.Case(width=32, height=32, steps=1, caption_tokens=9, dtype="float32")
    model = convert("pocket", tmp_path / "packed", **bits) if bits else "pocket"
    report = bench.bench(model, case=case, repeat=1)
    assert expected in bench.bench_table(report)
    with pytest.raises(RequestError, match=r"bits only applies to random weights, and .* has its own"):
        bench.bench(model, case=replace(case, bits=4))
    for wrong in ({"bits": 0}, {"mode": "mxfp4"}):
        with pytest.raises(RequestError, match="only applies to random weights"):
            bench.bench(model, case=replace(case, **wrong))


def test_steps_default_to_the_models_own(light_pocket, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "time_first_step", lambda *_: 1.0)
    monkeypatch.setattr(variants, "BASE", replace(BASE, steps=3))
    folder = shutil.copytree(light_pocket, tmp_path / "base")
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": BASE.shift}))
    report = bench.bench(str(folder), case=bench.Case(32, 32, caption_tokens=9, dtype="float32"), repeat=1)
    assert report["case"]["steps"] == 3 and "3 guided steps" in bench.bench_table(report)


def test_a_mode_implies_its_bits(tiny):
    case = bench.Case(width=32, height=32, steps=1, caption_tokens=7, dtype="float32", mode="mxfp4")
    with pytest.raises(RequestError, match="takes 4 bits, got 0"):
        bench.bench(architecture="tiny", case=replace(case, bits=0), repeat=1)
    assert "4-bit mxfp4 in float32" in bench.bench_table(bench.bench(architecture="tiny", case=case, repeat=1))


def test_a_size_that_does_not_fit_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(pipeline, "machine_budget", lambda: 10**7)
    monkeypatch.setattr(bench, "timed", None)
    with pytest.raises(MemoryBudgetError, match="512x512 cannot be generated within 10 MB"):
        bench.bench("pocket", case=bench.Case(width=512, height=512, dtype="float32"))


@pytest.mark.parametrize(
    "budget",
    [
        slow(None, id="kept"),
        slow(12, id="streamed"),
        pytest.param(20, id="some streamed"),
    ],
)
def test_a_model_is_timed_as_planned_and_within_what_is_planned(monkeypatch, budget):
    if budget:
        monkeypatch.setattr(pipeline, "machine_budget", lambda: budget * 10**6)
    monkeypatch.setattr(bench, "time_first_step", lambda *_: 1.0)
    gc.collect()
    others = mx.get_active_memory() / 1e9  # models of other tests
    case = bench.Case(width=64, height=64, steps=2, dtype="float32")
    report = bench.bench("pocket", case=case, repeat=1)
    for phase in ("encode", "steps", "decode"):
        assert 0 < report[phase]["peak_gb"] - others <= report[phase]["planned_gb"]
    assert bool(report["streamed_blocks"]) == bool(budget)
    assert ("streamed from disk to stay within" in bench.bench_table(report)) == bool(budget)


def test_random_weights_that_would_have_to_be_streamed_are_refused(tiny, monkeypatch):
    case = bench.Case(width=64, height=64, steps=1, caption_tokens=7, dtype="float32")
    monkeypatch.setattr(bench, "machine_budget", lambda: 10_000_000)
    with pytest.raises(MemoryBudgetError, match="choose fewer bits, or the small architecture"):
        bench.bench(architecture="tiny", case=case, repeat=1)


def test_steps_are_guided_where_the_model_needs_guidance(light_pocket, tmp_path, monkeypatch, watch):
    monkeypatch.setattr(bench, "time_first_step", lambda *_: 1.0)
    folder = shutil.copytree(light_pocket, tmp_path / "base")
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": BASE.shift}))
    case = bench.Case(width=32, height=32, steps=1, caption_tokens=7, dtype="float32")
    for model, prompts, steps in ("pocket", 1, "1 step"), (folder, 2, "1 guided step"):
        called = watch(Transformer, "__call__")
        report = bench.bench(str(model), case=case, repeat=1)
        assert f"32x32, {steps}, " in bench.bench_table(report)
        assert [len(velocities) for velocities in called] == [prompts] * 2


def test_figures_have_three_digits_however_small():
    shown = [bench.digits(value) for value in (0.000061234, 0.0163, 0.99949, 1, 12.345, 999.5, 12345.6)]
    assert shown == ["0.0000612", "0.0163", "0.999", "1.00", "12.3", "1000", "12346"]


def test_a_first_step_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(bench, "FIRST_STEP", "raise SystemExit(9)")
    with pytest.raises(ZImageError, match="first step exited with code 9"):
        bench.bench("pocket", case=bench.Case(width=32, height=32, steps=1, dtype="float32"), repeat=1)


LOGGED = """
import os
from mlx_zimage import headroom

def log(text):
    with open({file!r}, "a") as file:
        file.write(text + "\\n")

def logged(*args, fit=headroom.fit):
    log("fit")
    return fit(*args)

headroom.fit = logged
log("off" if os.environ["MLX_ZIMAGE_EMBEDDINGS"] == "off" else "on")
"""


@pytest.mark.parametrize(("dtype", "done"), [slow("float32", "off step"), ("float16", "on fit fit step on step")])
def test_the_first_step_is_timed_with_a_cached_scale(monkeypatch, tmp_path, dtype, done):
    monkeypatch.setattr(
        bench, "FIRST_STEP", LOGGED.format(file=str(tmp_path / "log")) + bench.FIRST_STEP + 'log("step")'
    )
    case = bench.Case(width=32, height=32, steps=1, caption_tokens=7, dtype=dtype)
    assert bench.time_first_step("pocket", case) > 0
    assert (tmp_path / "log").read_text().split() == done.split()


def test_random_weights_are_generated_in_the_callers_thread(tiny, monkeypatch):
    case = bench.Case(width=32, height=32, steps=1, caption_tokens=7, dtype="float32", bits=8)
    monkeypatch.setitem(READS_AHEAD, backend(), False)
    made, names = RandomWeights.read, set()

    def noted(self, *args, **kwargs):
        names.add(threading.current_thread().name)
        return made(self, *args, **kwargs)

    monkeypatch.setattr(RandomWeights, "read", noted)
    assert bench.bench(architecture="tiny", case=case, repeat=1)["steps"]["median_s"] > 0
    assert names == {"MainThread"}, "or the peak would be that of several at once"


def test_random_weights_have_the_names_and_shapes_of_the_architecture(tiny):
    transformer = bench.random_networks(bench.Case(bits=8, dtype="float32"), "tiny").transformer
    tree = transformer.runner.once("layers.1")
    dense = transformer.config.shapes()["layers.1.attention.to_q.weight"]
    packed = tree["attention"]["to_q"]
    assert packed["weight"].shape == (dense[0], dense[1] * 8 // 32) and packed["weight"].dtype == mx.uint32
    assert tree["attention_norm1"]["weight"].shape == (192,)


def test_the_full_models_flops_follow_from_its_shapes():
    # a forward pass at 1024x1024 with 64 tokens: 55.6e12, counting two operations per weight and token
    assert bench.step_flops(TransformerConfig(), 4096, 64) == pytest.approx(55.6e12, rel=0.005)
