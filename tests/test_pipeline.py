import warnings
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import TOLERANCE, relative_error
from lanes import slow
from PIL import Image

from mlx_zimage import Generated, GenerateRequest, NumericsError, PromptTruncated, RequestError, Step, ZImagePipeline
from mlx_zimage.models.text_encoder import TextEncoder
from mlx_zimage.models.transformer import Transformer
from mlx_zimage.noise import initial_noise
from mlx_zimage.pipeline import Phase
from mlx_zimage.scheduler import sigmas
from mlx_zimage.weights.hub import POCKET

SIZE = {"width": tiny.WIDTH, "height": tiny.HEIGHT}
SHAPE = (1, 16, tiny.HEIGHT // 8, tiny.WIDTH // 8)


def request_of(**changes) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a red fox", "seed": 0, "steps": 2, **SIZE, **changes})


def golden_run(golden, golden_pipe, run: str) -> list[Step | Generated]:
    options = dict(tiny.RUNS[run])
    request = GenerateRequest(**SIZE, seed=0, steps=options.pop("num_inference_steps"), **options)
    return list(golden_pipe.stream(request, tiny.randn(golden.seed, "pipe.z0", *SHAPE)))


def nchw(step: Step) -> np.ndarray:
    return np.array(step.latents.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("run", tiny.RUNS)
def test_every_step_of_a_run_equals_the_reference(golden, golden_pipe, run):
    *steps, _ = golden_run(golden, golden_pipe, run)
    for step, wanted in zip(steps, golden[f"pipeline/{run}.steps"], strict=True):
        assert relative_error(nchw(step), wanted) < TOLERANCE, step.index


@pytest.mark.parametrize("run", ["t2i8", "cfg4"])
def test_the_image_of_a_run_equals_the_reference(golden, golden_pipe, run):
    *_, last, image = golden_run(golden, golden_pipe, run)
    pixels = np.clip(np.array(golden_pipe.vae.decode(last.latents)) / 2 + 0.5, 0, 1)
    assert relative_error(pixels, golden[f"pipeline/{run}.image"]) < TOLERANCE
    # a value halfway between two integers may round either way, but there are few of them
    apart = np.abs(image.pixels.astype(int) - golden[f"pipeline/{run}.image_u8"])
    assert apart.max() <= 1
    assert apart.mean() < 1e-2


def test_running_two_prompts_at_once_equals_two_runs(golden, golden_pipe):
    noise = tiny.randn(golden.seed, "pipe.zz", 2, *SHAPE[1:])
    for i, key in enumerate(("short", "medium")):
        out = golden_pipe(
            tiny.PROMPTS[key], **SIZE, num_inference_steps=2, latents=noise[i : i + 1], output_type="latent"
        )
        assert relative_error(out.images[0], golden["pipeline/batch2.latents"][i]) < TOLERANCE


def test_a_stream_yields_its_steps_and_then_its_images(pipe):
    request = request_of(steps=3, num_images=2)
    events = list(pipe.stream(request))
    assert [type(event) for event in events] == [Step] * 3 + [Generated] * 2
    assert [event.index for event in events] == [0, 1, 2, 0, 1]
    assert np.array_equal(np.float32([step.sigma for step in events[:3]]), sigmas(3)[1:])
    for image in events[3:]:
        assert image.pixels.shape == (tiny.HEIGHT, tiny.WIDTH, 3)
        assert image.pixels.dtype == np.uint8
        assert image.request == pipe.complete(request)


def test_the_transformer_runs_once_per_step(pipe, watch):
    evaluations = watch(Transformer, "finish")
    pipe("a red fox", **SIZE, num_inference_steps=5, seed=0, negative_prompt="blurry", output_type="latent")
    assert len(evaluations) == 5


def test_guidance_runs_the_transformer_twice_per_step(pipe, watch):
    evaluations = watch(Transformer, "finish")
    pipe("a red fox", **SIZE, num_inference_steps=5, seed=0, guidance_scale=1.0, output_type="latent")
    assert len(evaluations) == 10


def test_events_include_the_phases_around_the_steps(tiny_folder):
    pipe, request = ZImagePipeline.from_pretrained(tiny_folder, dtype="float32"), request_of(num_images=2)
    layers = pipe.text_encoder.config.used_layers
    encode = [Phase("encode", done, layers) for done in range(layers + 1)]
    blocks = pipe.vae.config.decoder_blocks
    decode = [Phase("decode", done, blocks) for done in range(blocks + 1)]
    work = [Step, Step, *decode, Generated, *decode, Generated]
    events = [event if isinstance(event, Phase) else type(event) for event in pipe.events(request)]
    assert events == encode + work
    events = [event if isinstance(event, Phase) else type(event) for event in pipe.events(request)]
    assert events == work, "the prompt's embeddings are cached"


def test_leaving_the_stream_stops_the_work(pipe, watch):
    evaluations = watch(Transformer, "finish")
    for event in pipe.stream(request_of(steps=8)):
        if event.index == 1:
            break
    assert len(evaluations) == 2


def test_a_seed_determines_the_image(pipe):
    def generate(seed):
        return pipe("a red fox", **SIZE, num_inference_steps=2, seed=seed, output_type="np").images

    assert np.array_equal(generate(1), generate(1))
    assert not np.array_equal(generate(1), generate(2))


def test_a_random_seed_is_reported(pipe):
    generated = pipe("a red fox", **SIZE, num_inference_steps=1, output_type="latent")
    again = pipe("a red fox", **SIZE, num_inference_steps=1, seed=generated.seed, output_type="latent")
    other = pipe("a red fox", **SIZE, num_inference_steps=1, output_type="latent")
    assert np.array_equal(again.images, generated.images)
    assert other.seed != generated.seed


def big_endian(noise: mx.array) -> np.ndarray:
    return np.array(noise).astype(">f4")


def long_double(noise: mx.array) -> np.ndarray:
    return np.array(noise).astype(np.longdouble)


@pytest.mark.parametrize("rng", ["torch", "mlx"])
@pytest.mark.parametrize("wrap", [np.array, mx.array, big_endian, long_double])
def test_latents_replace_the_noise(pipe, rng, wrap):
    given = pipe(
        "a red fox", **SIZE, num_inference_steps=2, latents=wrap(initial_noise(5, SHAPE, rng)), output_type="latent"
    )
    generated = pipe("a red fox", **SIZE, num_inference_steps=2, seed=5, rng=rng, output_type="latent")
    assert np.array_equal(given.images, generated.images)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (
            np.zeros(SHAPE[1:], np.float32),
            "latents must have shape (1, 16, 10, 12): (images, channels, height / 8, width / 8), got (16, 10, 12)",
        ),
        (
            np.zeros((1, 16, 12, 10), np.float32),
            "latents must have shape (1, 16, 10, 12): (images, channels, height / 8, width / 8), got (1, 16, 12, 10)",
        ),
        (
            np.zeros((2, *SHAPE[1:]), np.float32),
            "latents must have shape (1, 16, 10, 12): (images, channels, height / 8, width / 8), got (2, 16, 10, 12)",
        ),
        (np.full(SHAPE, np.nan, np.float32), "latents must be finite, got NaN"),
        (np.zeros(SHAPE, complex), "real numbers, got complex128"),
        (np.zeros(SHAPE, bool), "real numbers, got bool"),
        ("noise", "real numbers, got <U5"),
        ([[1.0], [2.0, 3.0]], "latents must be an array"),
    ],
    ids=["no batch", "turned", "two for one", "not numbers", "complex", "booleans", "text", "ragged"],
)
def test_latents_that_do_not_fit_are_refused_before_any_work(pipe, watch, latents, message):
    encoded = watch(TextEncoder, "__call__")
    with pytest.raises(RequestError) as caught:
        pipe("a red fox", **SIZE, latents=latents)
    assert message in str(caught.value)
    assert not encoded


def test_a_batch_splits_the_noise_of_one_seed(pipe):
    noise = initial_noise(3, (3, *SHAPE[1:]))
    together = pipe("a red fox", **SIZE, num_inference_steps=2, seed=3, num_images_per_prompt=3, output_type="latent")
    for i, image in enumerate(together.images):
        alone = pipe("a red fox", **SIZE, num_inference_steps=2, latents=noise[i : i + 1], output_type="latent")
        # float32: only the order of the sums may differ
        assert relative_error(alone.images[0], image) < 1e-5


def test_a_prompt_of_over_512_tokens_is_truncated_with_a_warning(pipe):
    prompt = tiny.PROMPTS["long"]
    with pytest.warns(PromptTruncated, match=r"has \d+ tokens, but the model reads only 512"):
        cut = pipe.encode(prompt)
    assert cut.shape[0] == 512
    assert mx.array_equal(cut, pipe.text_encoder(pipe.tokenizer.encode(prompt)[:512]))
    with pytest.warns(PromptTruncated):
        assert mx.array_equal(pipe.encode(prompt + "and a hare"), cut)


def test_a_prompt_of_512_tokens_is_not_truncated(pipe):
    words = 512 - len(pipe.tokenizer.encode(""))
    prompt = "!" * words
    while len(pipe.tokenizer.encode(prompt)) < 512:
        prompt += " !"
    assert len(pipe.tokenizer.encode(prompt)) == 512
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe.encode(prompt).shape[0] == 512


def test_a_negative_prompt_without_guidance_gives_a_warning_and_so_does_guidance_on_turbo(pipe):
    call = {**SIZE, "num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    plain = pipe("a red fox", **call).images
    with pytest.warns(UserWarning, match="the negative prompt changes nothing, since guidance is 0, as Turbo requires"):
        negative = pipe("a red fox", **call, negative_prompt="x").images
    with pytest.warns(UserWarning, match="guidance is 1, but Turbo was trained to work without it"):
        guided = pipe("a red fox", **call, negative_prompt="x", guidance_scale=1).images
    assert np.array_equal(plain, negative)
    assert not np.array_equal(plain, guided)


def test_the_prompt_changes_the_image(pipe):
    fox, hare = (
        pipe(prompt, **SIZE, num_inference_steps=1, seed=0, output_type="latent").images for prompt in ("fox", "hare")
    )
    assert relative_error(fox, hare) > 1e-3


def test_all_output_types_show_the_same_image(pipe):
    pil, unit, latent = (
        pipe("a red fox", **SIZE, num_inference_steps=2, seed=0, output_type=kind).images
        for kind in ("pil", "np", "latent")
    )
    assert isinstance(pil[0], Image.Image)
    assert pil[0].size == (tiny.WIDTH, tiny.HEIGHT)
    assert unit.shape == (1, tiny.HEIGHT, tiny.WIDTH, 3)
    assert unit.dtype == np.float32
    assert 0 <= unit.min() < unit.max() <= 1
    assert np.array_equal(np.round(unit[0] * 255), np.array(pil[0]))
    assert latent.shape == SHAPE
    assert np.array_equal(pipe.decode(mx.array(latent[0]).transpose(1, 2, 0)), np.array(pil[0]))


def test_a_shift_changes_the_sigmas(pipe):
    steps = list(pipe.denoise(request_of(steps=4, shift=6.0)))
    assert np.array_equal(np.float32([step.sigma for step in steps]), sigmas(4, 6.0)[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 100}, "the nearest are 96 and 112"),
        ({"num_inference_steps": 0}, "steps must be from 1"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"seed": -1}, "seed must be from 0"),
        ({"output_type": "jpg"}, "output_type must be 'pil', 'np' or 'latent', got 'jpg'"),
    ],
    ids=str,
)
def test_invalid_arguments_are_reported_before_any_work(pipe, watch, change, message):
    encoded = watch(TextEncoder, "__call__")
    with pytest.raises(RequestError) as caught:
        pipe(**{"prompt": "a red fox", **SIZE, **change})
    assert message in str(caught.value)
    assert not encoded


@pytest.mark.parametrize("dtype", ["fp16", "int8", 16])
def test_other_dtypes_are_refused(tiny_folder, dtype):
    with pytest.raises(RequestError, match="dtype must be one of float32, bfloat16, float16"):
        ZImagePipeline.from_pretrained(tiny_folder, dtype=dtype)


def test_damaged_weights_stop_the_run_without_an_image(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", seed=0)
    arrays = tiny.weights(0, "transformer", tiny.TRANSFORMER)
    arrays["layers.1.feed_forward.w2.weight"][0, 0] = np.nan
    for file in (folder / "transformer").iterdir():
        file.unlink()
    tiny.save_component(folder / "transformer", "transformer", arrays, tiny.TRANSFORMER)
    damaged = ZImagePipeline.from_pretrained(folder, dtype="float32")
    with pytest.raises(NumericsError, match="not finite after step 1 of 2"):
        damaged("a red fox", **SIZE, num_inference_steps=2, seed=0)


def test_a_damaged_vae_generates_nothing(pipe):
    with pytest.raises(NumericsError, match="decoded image has values that are not finite"):
        pipe.decode(mx.full((2, 2, 16), float("nan")))


def test_pocket_generates_at_its_own_size_without_internet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pocket = ZImagePipeline.from_pretrained("pocket")
    assert pocket.checkpoint.folder == POCKET
    image = pocket("a red circle on a blue background", num_inference_steps=4, seed=1).images[0]
    assert image.size == (pocket.sample_size, pocket.sample_size)
    # red somewhere in the middle, blue along most of the edge: the image shows what the prompt says
    pixels = np.array(image).astype(int)
    red = (pixels[..., 0] > 120) & (pixels[..., 2] < 110)
    blue = (pixels[..., 2] > 120) & (pixels[..., 0] < 110)
    rim = np.concatenate([blue[0], blue[-1], blue[:, 0], blue[:, -1]])
    assert red.mean() > 0.03
    assert rim.mean() > 0.5


@pytest.mark.parametrize("memory", [slow("1GB"), "13MB"], ids=["kept", "streamed"])
def test_a_pipeline_opened_in_one_thread_works_in_another(memory):
    """As in a server's workers; MLX's streams belong to the thread that created them."""
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", memory=memory)

    def generate() -> np.ndarray:
        return pipe("a red circle", width=48, height=48, num_inference_steps=1, seed=1, output_type="np").images

    with ThreadPoolExecutor(1) as worker:
        there = worker.submit(generate).result()
    assert np.array_equal(there, generate())


@pytest.mark.parametrize(
    ("memory", "dtype", "side"),
    [
        pytest.param("1GB", "float32", 32, id="kept-float32-32", marks=pytest.mark.slow),
        pytest.param("13MB", "float16", 32, id="streamed-float16-32"),
        pytest.param("1GB", "float32", 48, id="kept-float32-48", marks=pytest.mark.slow),
        pytest.param("13MB", "float32", 48, id="streamed-float32-48", marks=pytest.mark.slow),
        pytest.param("1GB", "float16", 48, id="kept-float16-48", marks=pytest.mark.slow),
        pytest.param("13MB", "float16", 48, id="streamed-float16-48", marks=pytest.mark.slow),
    ],
)
def test_each_event_may_be_taken_in_another_thread(memory, dtype, side):
    """As web frameworks consume a generator."""
    pipe = ZImagePipeline.from_pretrained("pocket", dtype=dtype, memory=memory)
    request = GenerateRequest("a red circle", side, side, seed=1, steps=2, num_images=2)

    def taken() -> list:
        events, found = pipe.events(request), []
        while True:
            with ThreadPoolExecutor(1) as worker:
                event = worker.submit(next, events, None).result()
            if event is None:
                return found
            found.append(np.array(event.clean) if isinstance(event, Step) else getattr(event, "pixels", None))

    expected = [
        np.array(event.clean) if isinstance(event, Step) else getattr(event, "pixels", None)
        for event in ZImagePipeline.from_pretrained("pocket", dtype=dtype).events(request)
    ]
    found = taken()
    assert len(found) == len(expected) > 10
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is theirs is None or np.array_equal(ours, theirs)
