"""GPU failures: how they are explained, where they are caught, and how a pipeline recovers."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from lanes import slow
from mlx.utils import tree_map

from mlx_zimage import GenerateRequest, Step, ZImagePipeline, cli, errors, generate
from mlx_zimage.failures import explain, explained
from mlx_zimage.request import LoraUse

REQUEST = GenerateRequest("a red circle", 16, 16, seed=1, steps=3)
METAL = "[METAL] Command buffer execution failed: "
# MLX's message, the exit code, and what the advice must contain
FAILURES = [
    (f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).", 9, "slow disk"),
    (f"{METAL}Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang).", 9, "slow disk"),
    (
        f"{METAL}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
        9,
        "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1",
    ),
    (f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).", 5, "--memory"),
    (
        f"{METAL}Ignored (for causing prior/excessive GPU errors) "
        "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
        9,
        "start a new process",
    ),
    (
        f"{METAL}Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
        9,
        "this work was lost: try again",
    ),
    (f"{METAL}Internal Error (0000010a:Internal Error).", 9, "doctor"),
    (
        "[metal::load_device] No Metal device available. This typically occurs in headless, sandboxed, or virtualized "
        "macOS sessions where the GPU is not accessible.",
        9,
        "logged in at the Mac",
    ),
    (
        "[metal::malloc] Attempting to allocate 15600000000 bytes which is greater than the maximum allowed buffer "
        "size of 8589934592 bytes.",
        5,
        "smaller images",
    ),
    ("[metal::malloc] Resource limit (499000) exceeded.", 5, "--memory"),
    ("[malloc] Unable to allocate 15600000000 bytes.", 5, "--memory"),
    ("cudaMallocAsync(&data, size, stream) failed: out of memory", 5, "--memory"),
    ("cudaGraphLaunch(graph, stream) failed: an illegal memory access was encountered", 9, "doctor"),
]


@pytest.fixture
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained("pocket", dtype="float32")


@pytest.fixture
def fail(monkeypatch):
    """fail(said, after=n) makes the n-th evaluation from now raise MLX's message `said`."""
    evaluate, left = mx.eval, []

    def fail(said: str, after: int = 0, then=lambda: None) -> None:
        left[:] = [after]

        def failing(*arrays):
            if left and not left[0]:
                left.clear()
                then()
                raise RuntimeError(said)
            left[:] = [left[0] - 1] if left else []
            return evaluate(*arrays)

        monkeypatch.setattr(mx, "eval", failing)

    return fail


@pytest.mark.parametrize(("said", "code", "advice"), FAILURES)
def test_a_failure_is_explained_to_python(pipe, fail, said, code, advice):
    fail(said, after=5)
    with pytest.raises(errors.ZImageError) as caught:
        pipe("a red circle", 32, 32, num_inference_steps=1, seed=1)
    assert caught.value.exit_code == code
    assert advice in str(caught.value) and said in str(caught.value)
    assert isinstance(caught.value, MemoryError if code == 5 else RuntimeError)
    assert str(caught.value.__cause__) == said


# All reach Python; from there on, those with the same exit code take the same path, so one of each is enough.
ONE_OF_EACH = [case if i in (0, 3) else slow(*case) for i, case in enumerate(FAILURES)]


@pytest.mark.parametrize(("said", "code", "advice"), ONE_OF_EACH)
def test_a_failure_is_explained_on_the_command_line(fail, tmp_path, monkeypatch, said, code, advice):
    monkeypatch.chdir(tmp_path)
    fail(said, after=5)
    args = ["generate", "a red circle", "-m", "pocket", "--steps", "2", "--size", "32x32"]
    result = CliRunner().invoke(cli.main, args)
    assert result.exit_code == code
    assert result.stdout == "" and not list(tmp_path.iterdir())
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert advice in line and said in line


@pytest.mark.parametrize(("said", "code", "advice"), ONE_OF_EACH)
def test_a_failure_ends_a_stream_of_events_after_the_completed_ones(pipe, fail, said, code, advice):
    seen = []
    model = generate.OpenModel(pipe, "pocket", "")
    with pytest.raises(errors.ZImageError) as caught:
        for event in generate.events(model, REQUEST):
            seen.append(event)
            if isinstance(event, Step) and event.index == 1:
                fail(said)
    assert caught.value.exit_code == code and advice in str(caught.value)
    assert [event.index for event in seen if isinstance(event, Step)] == [0, 1]


@pytest.fixture(scope="module", params=[slow({"keep": True}), {"keep": False}, slow({"memory": "60MB"})], ids=str)
def unhurt(request):
    """Options of a pipeline, and what it generates."""
    return request.param, list(
        ZImagePipeline.from_pretrained("pocket", dtype="float32", **request.param).stream(REQUEST)
    )


@pytest.mark.parametrize("after", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 10)), 40])
def test_after_a_failure_a_pipeline_generates_the_same_bits(fail, unhurt, after):
    """Even though nothing that the GPU computed earlier, and that is still cached, can be trusted."""
    options, expected = unhurt
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", **options)
    list(pipe.stream(REQUEST))

    def spoil() -> None:
        networks = pipe.networks
        for runner in networks.runners.values():
            for name, tree in runner._kept.items():
                runner._kept[name] = tree_map(lambda x: mx.full(x.shape, 9, x.dtype) if is_array(x) else x, tree)
        for ids in networks._embeddings:
            networks._embeddings[ids] = mx.zeros_like(networks._embeddings[ids])

    fail(f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).", after, spoil)
    with pytest.raises(errors.DeviceError):
        for _ in pipe.stream(REQUEST):
            pass
    found = list(pipe.stream(REQUEST))
    assert np.array_equal(found[-1].pixels, expected[-1].pixels)
    assert [step.latents.tolist() for step in found[:-1]] == [step.latents.tolist() for step in expected[:-1]]


@pytest.mark.parametrize("after", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 4)), 12])
def test_after_a_failure_loaded_loras_are_as_before(pipe, fail, tmp_path, after):
    """Also when it happens while LoRAs are being laid over the model."""
    for name in ("a", "b"):
        layer, ones = "transformer.layers.1.attention.to_v", 0.1 * mx.ones((2, 192))
        factors = {f"{layer}.lora_A.weight": ones, f"{layer}.lora_B.weight": ones.T}
        mx.save_safetensors(
            str(tmp_path / f"{name}.safetensors"),
            factors | {f"{layer}.dora_scale": (1 + (name == "a")) * mx.ones((192, 1))},
        )
        pipe.load_lora(tmp_path / f"{name}.safetensors", strength=0)
    uses = [LoraUse("a"), LoraUse("b", 0.5)]
    request = replace(REQUEST, loras=uses)
    expected, model = list(pipe.stream(request)), list(pipe.stream(REQUEST))
    assert (expected[-1].pixels != model[-1].pixels).any()

    def spoil() -> None:
        for overlay in pipe.networks.overlays.values():
            computed = [*(side.arrays for sides in overlay._sides.values() for side in sides.values())]
            for array in (array for own in (*computed, *overlay._stacks.values()) for array in own.values()):
                array[:] = 9

    fail(f"{METAL}Caused GPU Timeout Error.", after, spoil)
    with pytest.raises(errors.DeviceError):
        list(pipe.stream(request))
    assert np.array_equal(list(pipe.stream(request))[-1].pixels, expected[-1].pixels)
    assert np.array_equal(list(pipe.stream(REQUEST))[-1].pixels, model[-1].pixels)


def is_array(x: object) -> bool:
    return isinstance(x, mx.array)


def test_failures_of_separate_encoding_and_decoding_are_explained_too(pipe, fail):
    for call in (
        lambda: pipe.encode("a red circle"),
        lambda: pipe.decode(mx.zeros((4, 4, 16))),
        lambda: pipe.encode_image(np.zeros((32, 32, 3), np.float32)),
    ):
        fail(f"{METAL}Caused GPU Timeout Error.")
        with pytest.raises(errors.DeviceError):
            call()
        call()


def test_a_session_without_a_gpu_is_explained_when_a_model_is_opened(monkeypatch):
    def device_info(*_):
        raise RuntimeError("[metal::load_device] No Metal device available. This typically occurs in ...")

    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", device_info)
    with pytest.raises(errors.DeviceError, match="logged in at the Mac"):
        ZImagePipeline.from_pretrained("pocket")


def test_errors_unrelated_to_the_gpu_are_left_unchanged():
    for error in (RuntimeError("generator raised StopIteration"), ValueError("out of memory"), errors.DeviceError("x")):
        assert explain(error) is None
    with pytest.raises(RuntimeError, match="cannot schedule"), explained():
        raise RuntimeError("cannot schedule new futures after shutdown")
