"""float16: products beyond its range are scaled exactly, and an image that still overflows is generated again."""

import json
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from compare import relative_error
from test_memory import smallest

from mlx_zimage import Generated, GenerateRequest, MemoryBudgetError, NumericsError, Step, ZImagePipeline, headroom
from mlx_zimage.cli import main
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.machine import default_dtype
from mlx_zimage.memory import Workload
from mlx_zimage.models import transformer
from mlx_zimage.models.layers import margin, result
from mlx_zimage.pipeline import Overflow, Phase

pytestmark = pytest.mark.metal

# With these factors products exceed 65504, and so do their sums.
LARGE = {"w1": 2.0**6, "w3": 2.0**8, "gate_proj": 2.0**6, "up_proj": 2.0**8}
TOO_LARGE = {"w3": 2.0**18}  # exceeds it on its own
MARGIN = margin(mx.float16)


def request(**changes) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a red fox", "seed": 0, "steps": 2, "width": 32, "height": 48} | changes)


def write(folder, factors: dict[str, float], component: str = "transformer"):
    """The tiny checkpoint with the weights of these layers multiplied."""
    config = tiny.CONFIGS[component]
    for file in (folder / component).iterdir():
        file.unlink()
    arrays = tiny.weights(0, component, config)
    arrays = {
        name: x * np.float32(factors.get(name.rpartition(".")[0].rpartition(".")[2], 1)) for name, x in arrays.items()
    }
    tiny.save_component(folder / component, component, arrays, config)
    return folder


def outputs(pipe: ZImagePipeline) -> dict[str, mx.array]:
    """A prompt's embeddings, and a velocity for other, fixed embeddings."""
    pipe.encode("")  # finds the scale
    velocity = pipe.transformer.velocity(mx.array(tiny.randn(0, "caption", 20, 40)), [0.5], 12, 10)
    latents = mx.array(tiny.randn(0, "latents", 1, 12, 10, 16))
    embeddings = pipe.text_encoder([5, 6, 7, 8]).astype(mx.float32)
    return {"embeddings": embeddings, "velocity": velocity(latents, 0)}


def scale_by(pipe: ZImagePipeline, factor: float) -> None:
    pipe.text_encoder.factor = pipe.transformer.factor = factor


def factors(pipe: ZImagePipeline) -> list[float]:
    return [pipe.text_encoder.factor, pipe.transformer.factor]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaling_changes_no_bits_if_nothing_overflows(tiny_folder, dtype):
    pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype=dtype)
    plain = outputs(pipe)
    scale_by(pipe, 2.0**-8)
    for name, scaled in outputs(pipe).items():
        assert mx.array_equal(scaled, plain[name]), name


def test_products_beyond_float16s_range_are_as_accurate_as_others(folder):
    for component in ("transformer", "text_encoder"):
        write(folder, LARGE, component)
    exact = outputs(ZImagePipeline.from_pretrained(folder, dtype="float32"))
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float16")
    for name, found in outputs(pipe).items():
        # one rounding errs by 5e-4; measured 3.7e-3 and 1.6e-3, in bfloat16 1.8e-2 and 1.2e-2
        assert relative_error(found, exact[name]) < 8e-3, name
    scale_by(pipe, 1.0)
    for name, found in outputs(pipe).items():
        assert not mx.isfinite(found).all(), f"{name} do not overflow, so that this test shows nothing"


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**13], ids=["faint", "large"])
def test_the_scaled_range_has_room_on_both_sides(folder, factor):
    write(folder, {"w3": factor})
    exact, found = (outputs(ZImagePipeline.from_pretrained(folder, dtype=dtype)) for dtype in ("float32", "float16"))
    # measured 2e-3 at every power of two between; at 2**14 w3's own product overflows
    assert relative_error(found["velocity"], exact["velocity"]) < 4e-3


@pytest.mark.parametrize(("needed", "tries"), [(1.0, 1), (0.9, 2), (2.0**-2, 2), (2.0**-8, 5)])
def test_the_factor_is_the_largest_without_overflow_times_a_margin(needed, tries):
    network, tried = SimpleNamespace(), []

    def run() -> mx.array:
        tried.append(network.factor)
        return mx.array([1.0, float("inf") if network.factor > needed else network.factor])

    network.factor = 0.5
    factor, last = headroom.fit(network, run)
    assert network.factor == 0.5, "fit restores the factor"
    assert last.tolist() == [1.0, tried[-1]]
    assert tried == [headroom.STEP**i for i in range(tries)]
    assert factor == tried[-1] * MARGIN


def test_each_network_has_its_own_factor(folder):
    write(folder, LARGE)
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float16")
    assert factors(pipe) == [MARGIN, MARGIN], "the default, before the search"
    pipe.encode("")
    assert factors(pipe) == [MARGIN, MARGIN * headroom.STEP]


def test_the_scale_is_found_once_per_checkpoint_and_the_image_does_not_depend_on_when(
    folder, tiny_folder, tmp_path, monkeypatch, watch
):
    monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", str(tmp_path / "kept"))
    write(folder, LARGE)
    fitted = watch(headroom, "fit")

    def generated(model, asked: GenerateRequest) -> tuple[list[Phase], list[float], mx.array]:
        pipe = ZImagePipeline.from_pretrained(model, dtype="float16")
        events = list(pipe.events(asked))
        phases = [event for event in events if isinstance(event, Phase) and event.name == "scale"]
        return phases, factors(pipe), [event.latents for event in events if isinstance(event, Step)][-1]

    found = generated(folder, request())
    assert found[0] == [Phase("scale", done, 2) for done in range(3)]
    recalled = generated(folder, request())
    assert recalled[0] == [] and recalled[1] == found[1]
    assert mx.array_equal(recalled[2], found[2])
    assert len(fitted) == 2, "both networks, once"
    *_, own, other = generated(tiny_folder, request())
    assert own != found[1] and not mx.array_equal(other, found[2])
    assert len(fitted) == 4, "another checkpoint has its own"
    monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", "off")
    *_, again = generated(folder, request())
    assert mx.array_equal(again, found[2])
    assert len(fitted) == 6


@pytest.mark.parametrize("keep", [True, False])
def test_finding_the_scale_keeps_in_memory_what_the_request_keeps(tiny_folder, keep):
    pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype="float16", keep=keep)
    with pipe.networks.running(pipe.plan(request())) as networks:
        result(networks._scale())
        runners = pipe.networks.runners["text_encoder"], pipe.networks.runners["transformer"]
        assert [bool(runner._kept) for runner in runners] == [keep, keep]


def peak_in_the_smallest_budget(size: int) -> tuple[int, int, list[float]]:
    """The peak of memory of an image of size x size, the smallest budget for it, and the factors then found.

    It is the second of two that are generated in the same way: CUDA's libraries try kernels out at their first call,
    some of which take more memory.
    """
    asked = request(width=size, height=size, steps=8)
    for _ in range(2):
        pipe = ZImagePipeline.from_pretrained("pocket", dtype="float16")
        pipe.budget = accepted = smallest(pipe.planner, size, size, len(pipe.tokenize(asked.prompt)))
        mx.clear_cache()
        mx.reset_peak_memory()
        list(pipe.stream(asked))
    return mx.get_peak_memory(), accepted, factors(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64, 128])
def test_finding_the_scale_fits_the_smallest_accepted_budget(monkeypatch, size):
    """In a process of its own: on CUDA, the peak in this one depends on the tests before.

    And with MLX's default of TF32, with which the bounds were measured: without it, cuDNN's convolutions take up to 280
    MB more even at these sizes.
    """
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        peak, accepted, found = process.submit(peak_in_the_smallest_budget, size).result()
    assert peak <= accepted
    assert found == [MARGIN, MARGIN]


def test_the_plan_includes_finding_the_scale():
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float16")
    assert len(pipe.tokenize(headroom.SAMPLE.prompt)) <= headroom.SAMPLE_TOKENS
    side = headroom.SIDE
    found_with = pipe.planner.plan(Workload(side, side, 1, headroom.SAMPLE_TOKENS, 1), 10**9)
    assert pipe.planner.plan(Workload(16, 16, 1, 14, 1), 10**9).rooms == found_with.rooms
    with pytest.raises(
        MemoryBudgetError, match=r"1 image of 16x16 cannot be generated within 1 MB.* no smaller size fits"
    ):
        pipe.planner.plan(Workload(16, 16, 1, 14, 1), 10**6)


def test_encoding_a_prompt_alone_finds_the_scale_within_the_budget():
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float16", memory="11MB")
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pipe.encode("a red circle")
    assert factors(pipe) == [MARGIN, MARGIN]
    assert mx.get_peak_memory() - before <= pipe.budget
    assert mx.get_active_memory() - before < pipe.budget / 4, "the model does not fit, so it is unloaded"


def test_other_dtypes_have_no_scale_to_find(tiny_folder, watch):
    fitted = watch(headroom, "fit")
    for dtype in ("float32", "bfloat16"):
        pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype=dtype)
        list(pipe.stream(request(steps=1)))
        assert factors(pipe) == [1.0, 1.0]
    assert not fitted


@pytest.mark.parametrize(("component", "layer"), [("transformer", "w3"), ("text_encoder", "up_proj")])
def test_a_network_that_overflows_at_every_scale_is_named(folder, component, layer, tmp_path, monkeypatch, watch):
    write(folder, {layer: TOO_LARGE["w3"]}, component)
    monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", str(tmp_path / "kept"))
    fitted = watch(headroom, "fit")
    for _ in range(2):
        pipe = ZImagePipeline.from_pretrained(folder, dtype="float16")
        with pytest.raises(
            NumericsError, match=f"{component} overflows float16, even scaled down by 256; choose dtype bfloat16"
        ):
            pipe.encode("a red fox")
    assert fitted[-1][0] == 0
    assert len(fitted) == (2 if component == "transformer" else 1), "that result is cached, too"


def test_float16_is_closer_to_float32_than_bfloat16_is(pipe, tiny_folder):
    exact = outputs(pipe)
    halves = [outputs(ZImagePipeline.from_pretrained(tiny_folder, dtype=dtype)) for dtype in ("float16", "bfloat16")]
    for name in exact:
        errors = [relative_error(half[name], exact[name]) for half in halves]
        assert errors[0] < errors[1] / 3, name


def generate(pipe: ZImagePipeline, asked: GenerateRequest) -> tuple[list[int], mx.array, Generated]:
    """The indices of all Steps, the last latents, and the image."""
    *steps, image = pipe.stream(asked)
    return [step.index for step in steps], steps[-1].latents, image


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_an_image_that_overflows_is_generated_again_in_bfloat16(folder, tmp_path, monkeypatch, component):
    monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", str(tmp_path / "kept"))
    write(folder, {"w3": TOO_LARGE["w3"], "up_proj": TOO_LARGE["w3"]}, component)
    wanted = generate(ZImagePipeline.from_pretrained(folder, dtype="bfloat16"), request())
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float16")
    with pytest.warns(Overflow, match="restarting the image from its first step in bfloat16") as caught:
        steps, latents, image = generate(pipe, request())
    assert caught[0].filename == __file__, "it points at the caller's code"
    assert steps == wanted[0] == [0, 1]
    assert mx.array_equal(latents, wanted[1])
    assert np.array_equal(image.pixels, wanted[2].pixels)
    assert image.dtype == "bfloat16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(**{"prompt": "a red fox", "width": 32, "height": 32, "num_inference_steps": 1})
    # one for the prompt, and one that says no scale works: results that are not finite are not cached
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(("gpu", "wide"), [("Apple M1", "bfloat16"), ("Apple Paravirtual device", "float32")])
def test_steps_start_again_when_a_later_one_overflows(tiny_folder, monkeypatch, gpu, wide):
    monkeypatch.setattr(mx, "device_info", lambda *_: {"device_name": gpu})
    pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype="float16")
    pipe.encode("")  # finds the scale
    call = transformer.Transformer.__call__
    calls = []

    def spoilt(self, *args):
        calls.append(self.runner.dtype)
        (v,) = call(self, *args)
        return [v * float("nan") if calls == [mx.float16] * 2 else v]

    monkeypatch.setattr(transformer.Transformer, "__call__", spoilt)
    with pytest.warns(Overflow):
        steps, _, image = generate(pipe, request(steps=3))
    assert steps == [0, 0, 1, 2]
    assert calls == [mx.float16] * 2 + [getattr(mx, wide)] * 3
    assert image.dtype == wide


def test_damaged_weights_fail_in_bfloat16_too(folder):
    write(folder, {"w2": float("nan")})
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float16")
    with pytest.warns(Overflow), pytest.raises(NumericsError, match="not finite after step 1"):
        assert not [event for event in pipe.stream(request()) if isinstance(event, Step)]


def test_the_command_line_reports_the_dtype_of_an_image(folder, tmp_path, capfd):
    write(folder, TOO_LARGE)
    size = ["--width", "32", "--height", "32", "--steps", "2", "--seed", "1"]
    result = CliRunner().invoke(
        main,
        [
            "generate",
            "a red fox",
            *size,
            "--model",
            str(folder),
            "--dtype",
            "float16",
            "--json",
            "-o",
            str(tmp_path / "x.png"),
        ],
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["dtype"] == "bfloat16"
    assert json.loads(result.stdout)["scale_seconds"] > 0
    assert "float16 overflowed with this model" in result.stderr + capfd.readouterr().err
    assert read_origin(tmp_path / "x.png").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("device", "name", "dtype"),
    [
        (mx.cpu, "Apple M1", "float32"),
        (mx.gpu, "Apple M1", "float16"),
        (mx.gpu, "Apple M2 Ultra", "float16"),
        (mx.gpu, "Apple M3 Max", "bfloat16"),
        (mx.gpu, "Apple M10", "bfloat16"),
        (mx.gpu, "Apple Paravirtual device", "float16"),
        (mx.gpu, "NVIDIA H200", "bfloat16"),
        (mx.gpu, None, "bfloat16"),
    ],
)
def test_the_default_dtype_suits_the_chip(monkeypatch, device, name, dtype):
    monkeypatch.setattr(mx, "default_device", lambda: device)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": name} if name else {})
    assert default_dtype() == dtype
