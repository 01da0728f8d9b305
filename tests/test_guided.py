"""Image to image: a request that starts from an image."""

import json
import random
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from compare import TOLERANCE, relative_error
from lanes import slow
from PIL import Image, ImageDraw
from test_noise import Generator

from mlx_zimage import GenerateRequest, Inputs, RequestError, Step, ZImagePipeline, cli
from mlx_zimage.convert import convert
from mlx_zimage.images.codec import to_signed
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.images.source import cover, read_image
from mlx_zimage.models.transformer import Transformer
from mlx_zimage.models.vae import VAE
from mlx_zimage.noise import initial_noise, torch_randn
from mlx_zimage.pipeline import Phase
from mlx_zimage.sampling import Kept, denoise
from mlx_zimage.scheduler import add_noise
from mlx_zimage.sizes import parse_memory

SHAPE = (1, 16, tiny.HEIGHT // 8, tiny.WIDTH // 8)
PHOTO = Inputs(image=tiny.photo())
PROMPT = "a red circle on a blue background"
pytestmark = pytest.mark.usefixtures("light_pocket")
SMALL = ["-m", "pocket", "--steps", "2", "-q"]


def request_of(**changes) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a red fox", "seed": 0, "steps": 4, "guidance_scale": 0.0, **changes})


def latents_of(pipe, request: GenerateRequest, inputs: Inputs = PHOTO) -> list[mx.array]:
    return [step.latents for step in pipe.denoise(request, inputs)]


# ---- the result


@pytest.mark.parametrize("run", tiny.IMAGE_RUNS)
def test_every_step_from_an_image_equals_the_reference(golden, golden_pipe, run):
    strength, steps = tiny.IMAGE_RUNS[run]
    request = request_of(
        prompt=tiny.PROMPTS["short"], seed=tiny.IMAGE_SEED, steps=steps, strength=strength, sample_posterior=True
    )
    found = latents_of(golden_pipe, request)
    for ours, wanted in zip(found, golden[f"pipeline/{run}.steps"], strict=True):
        assert relative_error(ours.transpose(0, 3, 1, 2), wanted) < TOLERANCE


def test_a_call_with_diffusers_names_equals_the_reference(golden, golden_pipe):
    image = Image.fromarray(tiny.photo())
    common = {"num_inference_steps": 8, "sample_posterior": True, "output_type": "latent"}
    wanted = golden["pipeline/img2img_060.steps"][-1]
    for given in ({"generator": Generator(tiny.IMAGE_SEED)}, {"seed": tiny.IMAGE_SEED}):
        found = golden_pipe(tiny.PROMPTS["short"], image=image, strength=0.6, **common, **given)
        assert relative_error(found.images, wanted) < TOLERANCE


def test_the_steps_start_from_the_mean_of_the_images_latents_and_the_seeds_noise(pipe):
    request = pipe.complete(request_of(seed=3, strength=0.5), PHOTO)
    sigmas = pipe.sigmas(request)
    image = pipe.vae.encode(to_signed(tiny.photo())[None])
    start = add_noise(image, initial_noise(3, SHAPE).transpose(0, 2, 3, 1), float(sigmas[0]))
    velocity = pipe.transformer.velocity(pipe.encode("a red fox"), sigmas[:-1], *SHAPE[2:])
    wanted = [step.latents for step in denoise(velocity, start, sigmas)]
    assert len(wanted) == 2
    found = latents_of(pipe, request)
    # float32: the encoder's strips may sum products in another order
    assert all(relative_error(*pair) < TOLERANCE for pair in zip(found, wanted, strict=True))


def test_strength_1_ignores_the_image(pipe):
    size = {"width": tiny.WIDTH, "height": tiny.HEIGHT}
    found = latents_of(pipe, request_of(strength=1.0, **size))
    wanted = [step.latents for step in pipe.denoise(request_of(**size))]
    assert all(mx.array_equal(*pair) for pair in zip(found, wanted, strict=True))


def test_the_strength_is_06_unless_given(pipe):
    assert pipe.complete(request_of(), PHOTO).strength == 0.6
    assert pipe.complete(request_of()).strength is None


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 50])
def test_every_strength_above_0_runs_at_least_one_step_and_a_higher_one_never_runs_fewer(steps):
    found = [
        steps - request_of(steps=steps, strength=percent / 100, image="0" * 64).first_step for percent in range(1, 101)
    ]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (1, steps)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"strength": 0.0},
            "strength 0 leaves no step to run: the image would not change; 0.25 runs one step of 4",
        ),
        ({"strength": 0.0, "steps": None}, "a strength of 1 / steps (0.125 for 8 steps) runs one"),
        ({"strength": 1e-20}, "strength 1e-20 leaves no step to run"),
        ({"strength": 1.5}, "strength must be from 0 to 1, got 1.5"),
        ({"strength": float("nan")}, "strength must be from 0 to 1, got nan"),
        ({"strength": -0.1}, "strength must be from 0"),
        ({"strength": "0.5"}, "strength must be a number, got '0.5'"),
        ({"sample_posterior": 1}, "sample_posterior must be true or false, got 1"),
        ({"image": "photo.png"}, "image must be the SHA-256 of an array"),
    ],
)
def test_values_that_cannot_work_are_refused(values, message):
    with pytest.raises(RequestError) as caught:
        request_of(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"strength": 0.5}, "strength is for image to image, but there is no image to start from"),
        ({"sample_posterior": True}, "sample_posterior is for image to image"),
        ({"image": "none.png"}, "no image at none.png"),
        ({"image": tiny.photo(), "latents": np.zeros(SHAPE)}, "latents and image were both given"),
        ({"image": [tiny.photo()] * 2}, "image must have one entry per prompt, 1 in all, got 2"),
        (
            {"prompt": ["a", "b"], "image": [tiny.photo(), tiny.photo()[:64]]},
            "the images of one call must all be of the same size, got 96x64 and 96x80; set width and height",
        ),
        ({"image": np.zeros((5,))}, "the image is an array of shape (5,)"),
        ({"image": tiny.photo(), "strength": 0}, "leaves no step to run"),
    ],
    ids=str,
)
def test_a_call_that_cannot_work_is_refused_before_any_work(refused_at_once, call, message):
    refused_at_once(message, **call)


def test_noise_that_would_not_be_used_is_refused(pipe):
    with pytest.raises(RequestError, match="posterior_noise is given, but not used: it is for sample_posterior"):
        pipe.complete(request_of(), replace(PHOTO, posterior_noise=np.zeros(SHAPE)))


def test_a_request_expects_the_image_that_it_names(pipe):
    request = pipe.complete(request_of(), PHOTO)
    for inputs in (None, Inputs(image=255 - tiny.photo())):
        with pytest.raises(RequestError, match="the request expects an image with SHA-256"):
            next(pipe.stream(request, inputs))


# ---- inpainting


MASK = Inputs(image=tiny.photo(), mask_image=tiny.mask())
OUTSIDE = tiny.mask() == 0


def pixels_of(pipe, request: GenerateRequest, inputs: Inputs = MASK) -> np.ndarray:
    *_, image = pipe.stream(request, inputs)
    return image.pixels


def test_every_step_of_inpainting_equals_the_reference(golden, golden_pipe):
    request = request_of(prompt=tiny.PROMPTS["short"], seed=tiny.IMAGE_SEED, sample_posterior=True, mask_resample=0)
    found = latents_of(golden_pipe, request, MASK)
    for ours, wanted in zip(found, golden["pipeline/inpaint.steps"], strict=True):
        assert relative_error(ours.transpose(0, 3, 1, 2), wanted) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [{}, slow({"mask_feather": 0}), slow({"mask_resample": 0}), {"strength": 0.5}, slow({"num_images": 2})],
    ids=str,
)
def test_pixels_outside_the_mask_come_back_exactly_and_those_inside_change(pipe, changes):
    changed = (pixels_of(pipe, request_of(**changes)) != tiny.photo()).any(axis=2)
    assert not changed[OUTSIDE].any()
    assert changed[~OUTSIDE].mean() > 0.9


def test_a_feather_covers_the_image_gradually_inside_the_mask(pipe):
    sharp, feathered = (pixels_of(pipe, request_of(mask_feather=n)).astype(int) for n in (0, 16))
    middle, border = (44, 56), (44, 33)
    assert (sharp[middle] == feathered[middle]).all()
    photo = tiny.photo().astype(int)
    assert np.abs(feathered[border] - photo[border]).sum() < np.abs(sharp[border] - photo[border]).sum() / 2


def test_the_feather_is_a_64th_of_the_shorter_side_unless_given(pipe):
    large = {"width": 1024, "height": 2048}
    assert [pipe.complete(request_of(**size), MASK).mask_feather for size in ({}, large)] == [1, 16]
    assert pipe.complete(request_of(), MASK).mask_resample == 5
    assert pipe.complete(request_of(), PHOTO).mask_feather is None


def test_a_mask_may_grow(pipe):
    changed = (pixels_of(pipe, request_of(mask_grow=8, mask_feather=0)) != tiny.photo()).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 71, 24, 87)


def test_a_white_mask_at_strength_1_is_text_to_image(pipe):
    size = {"width": tiny.WIDTH, "height": tiny.HEIGHT}
    white = Inputs(image=tiny.photo(), mask_image=np.full_like(tiny.mask(), 255))
    found = latents_of(pipe, request_of(mask_resample=0), white)
    wanted = [step.latents for step in pipe.denoise(request_of(**size))]
    assert all(mx.array_equal(*pair) for pair in zip(found, wanted, strict=True))


def test_grey_parts_of_a_soft_mask_are_regenerated_in_the_last_steps(pipe):
    grey = Inputs(image=tiny.photo(), mask_image=np.full_like(tiny.mask(), 100))  # 0.39: the last of four steps
    steps = latents_of(pipe, request_of(mask_soft=True), grey)
    image = pipe.vae.encode(to_signed(tiny.photo())[None])
    noise = initial_noise(0, SHAPE).transpose(0, 2, 3, 1)
    sigmas = pipe.sigmas(request_of(width=tiny.WIDTH, height=tiny.HEIGHT))
    for i, latents in enumerate(steps):
        kept = add_noise(image, noise, float(sigmas[i + 1]))
        # float32: the encoder's strips may sum products in another order
        assert (relative_error(latents, kept) < TOLERANCE) == (i < 2), i


def test_each_step_but_the_first_resamples_the_part_inside_the_mask(pipe, watch):
    called = watch(Transformer, "__call__")
    sigmas = pipe.sigmas(request_of(width=tiny.WIDTH, height=tiny.HEIGHT))
    image = pipe.vae.encode(to_signed(tiny.photo())[None])
    noise = initial_noise(0, SHAPE).transpose(0, 2, 3, 1)
    outside = mx.array(tiny.mask()[::8, ::8] == 0)[None, :, :, None]
    for run, steps in (({}, 4), ({"strength": 0.5}, 2)):
        called.clear()
        found = latents_of(pipe, request_of(mask_resample=3, **run), MASK)
        assert (len(found), len(called)) == (steps, 4 * steps - 3 * (steps == 4))
        plain = latents_of(pipe, request_of(mask_resample=0, **run), MASK)
        assert relative_error(found[0], plain[0]) == 0 if steps == 4 else relative_error(found[0], plain[0]) > 0.1
        assert relative_error(found[-1], plain[-1]) > 0.1
        for latents, sigma in zip(found, sigmas[-steps:], strict=True):
            kept = add_noise(image, noise, float(sigma))
            # float32: the encoder's strips may sum products in another order
            assert relative_error(mx.where(outside, latents, 0), mx.where(outside, kept, 0)) < TOLERANCE


def test_resampling_leaves_what_the_network_is_sure_of():
    image, noise, latents, target = mx.random.normal((4, 2, 6, 6, 16), key=mx.random.key(0))
    mask = (mx.arange(6) > 2)[None, None, :, None].astype(mx.float32)
    sigmas = [0.9, 0.5, 0.2, 0.0]
    towards = lambda x, i: (x - target) / sigmas[i]  # noqa: E731
    *_, last = denoise(towards, latents, sigmas, Kept(image, noise, mask, resample=3))
    # float32: the same differences, summed in another order
    assert relative_error(last.latents, mx.where(mask > 0, target, image)) < 1e-6


def test_diffusers_names_inpaint_too(pipe):
    run = {"num_inference_steps": 4, "seed": 0, "guidance_scale": 0.0}
    image, mask = Image.fromarray(tiny.photo()), Image.fromarray(tiny.mask())
    found = pipe("a red fox", image=image, mask_image=mask, **run).images[0]
    assert np.array_equal(found, pixels_of(pipe, request_of()))


def test_the_strength_is_1_with_a_mask_unless_given(pipe):
    assert pipe.complete(request_of(), MASK).strength == 1.0
    assert pipe.complete(request_of(strength=0.4), MASK).strength == 0.4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"mask_image": tiny.mask()}, "mask_image is for image to image, but there is no image to start from"),
        (
            {"image": tiny.photo(), "mask_resample": 2},
            "mask_resample is for inpainting, but there is no mask; give one",
        ),
        (
            {"image": tiny.photo(), "mask_image": tiny.mask(), "mask_resample": 101},
            "mask_resample must be from 0 to 100, got 101",
        ),
        ({"image": tiny.photo(), "mask_grow": 4}, "mask_grow is for inpainting, but there is no mask; give one"),
        ({"image": tiny.photo(), "mask_image": tiny.mask()[:40]}, "the mask has 96x40 pixels, but the image has 96x80"),
        ({"image": tiny.photo(), "mask_image": 0 * tiny.mask()}, "the mask is black"),
        ({"image": tiny.photo(), "mask_image": tiny.mask(), "mask_feather": -1}, "mask_feather must be from 0 to 1024"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_a_mask_that_cannot_work_is_refused_before_any_work(refused_at_once, call, message):
    refused_at_once(message, **call)


# ---- sizes


@pytest.mark.parametrize(
    ("image", "asked", "size"),
    [
        ((80, 96), {}, (80, 96)),
        ((83, 101), {}, (80, 96)),
        ((200, 100), {"width": 64}, (64, 32)),
        ((200, 100), {"height": 64}, (128, 64)),
        ((200, 100), {"width": 64, "height": 64}, (64, 64)),
        ((4000, 1000), {}, (256, 64)),  # the area of pocket's 128x128
    ],
)
def test_the_size_comes_from_the_image_or_one_side_unless_both_are_given(image, asked, size):
    pipe = ZImagePipeline.from_pretrained("pocket")
    request = pipe.complete(request_of(**asked), Inputs(image=Image.new("RGB", image)))
    assert request.extent[:2] == size


def test_an_image_of_other_proportions_covers_the_size(pipe):
    size = {"width": 32, "height": 48}
    pixels = np.asarray(cover(read_image(tiny.photo()), *size.values()))
    wanted = latents_of(pipe, request_of(), Inputs(image=pixels))
    assert all(mx.array_equal(*pair) for pair in zip(latents_of(pipe, request_of(**size)), wanted, strict=True))


def test_transparent_pixels_are_white(pipe):
    image = Image.fromarray(tiny.photo()).convert("RGBA")
    image.paste((9, 9, 9, 0), (0, 0, 40, 40))
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(image, mask=image)
    found, wanted = (latents_of(pipe, request_of(), Inputs(image=one)) for one in (image, on_white))
    assert mx.array_equal(found[-1], wanted[-1])


# ---- several at once


def test_several_prompts_start_from_one_image_or_one_each(pipe):
    prompts, images = ["a red fox", "a hare"], [tiny.photo(), 255 - tiny.photo()]
    run = {"num_inference_steps": 2, "output_type": "latent", "strength": 0.5}
    noise = torch_randn(4, (2, *SHAPE[1:]))
    for given in (images, images[0]):
        together = pipe(prompts, image=given, seed=4, **run).images
        for i, prompt in enumerate(prompts):
            request = request_of(prompt=prompt, steps=2, strength=0.5)
            inputs = Inputs(latents=noise[i : i + 1], image=given[i] if given is images else given)
            *_, alone = latents_of(pipe, request, inputs)
            assert np.array_equal(together[i], alone.transpose(0, 3, 1, 2)[0])


def test_images_of_a_batch_start_from_the_same_image_with_noise_of_their_own(pipe):
    *_, two = latents_of(pipe, request_of(num_images=2))
    noise = torch_randn(0, (2, *SHAPE[1:]))
    for i in range(2):
        *_, one = latents_of(pipe, request_of(), Inputs(latents=noise[i : i + 1], image=tiny.photo()))
        # float32: products of two images may be summed in another order
        assert relative_error(two[i], one[0]) < TOLERANCE


def test_a_list_of_generators_gives_each_image_noise_and_a_sample_of_its_own(pipe):
    prompts, images = ["a red fox", "a hare"], [tiny.photo(), 255 - tiny.photo()]
    run = {"num_inference_steps": 2, "output_type": "latent", "sample_posterior": True}
    together = pipe(prompts, image=images, generator=[Generator(1), Generator(2)], **run).images
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, image=images[i], seed=i + 1, **run).images[0]
        assert np.array_equal(together[i], alone)


# ---- events, counts and memory


def test_the_image_is_encoded_between_the_prompt_and_the_steps(tiny_folder):
    pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")
    blocks = pipe.vae.config.encoder_blocks
    events = list(pipe.events(request_of(strength=0.5), PHOTO, decode=False))
    names = [event.name if isinstance(event, Phase) else "step" for event in events]
    assert [name for i, name in enumerate(names) if names[i - 1] != name] == ["encode", "image", "step"]
    assert [event for event in events if isinstance(event, Phase) and event.name == "image"] == [
        Phase("image", done, blocks) for done in range(blocks + 1)
    ]
    assert [(event.index, event.steps) for event in events if isinstance(event, Step)] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("keep", [slow(True), False])
def test_the_encoder_is_read_once_per_request_and_unloaded(tiny_folder, bytes_read, keep):
    pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype="float32", keep=keep)
    entries = pipe.checkpoint.vae.entries.values()
    whole, encoder = (sum(e.nbytes for e in entries if e.name.startswith(part)) for part in ("", "encoder."))
    list(pipe.stream(request_of(strength=0.5), PHOTO))
    assert bytes_read["vae"] == whole
    list(pipe.stream(request_of(strength=0.5, seed=1), PHOTO))
    assert bytes_read["vae"] == whole + (encoder if keep else whole)


def test_what_depends_on_the_steps_is_not_read_again_for_other_strengths_after_plain_generation(
    tiny_folder, bytes_read
):
    size = {"width": tiny.WIDTH, "height": tiny.HEIGHT}
    pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype="float32", keep=True)
    list(pipe.denoise(request_of(**size)))
    before = bytes_read["transformer"]
    for strength in (0.25, 0.5, 1.0):
        list(pipe.denoise(request_of(strength=strength), PHOTO))
    assert bytes_read["transformer"] == before > 0


def test_an_image_is_encoded_in_the_way_that_the_plan_says(monkeypatch):
    made = []
    init = VAE.__init__
    monkeypatch.setattr(VAE, "__init__", lambda self, *args, **kw: made.append(args) or init(self, *args, **kw))
    pipe = ZImagePipeline.from_pretrained("pocket", "float32")
    plan = pipe.plan(request_of(), PHOTO)
    ways = {**plan.ways, "image": replace(plan.ways["image"], strip_bytes=2**15)}
    monkeypatch.setattr(pipe.networks, "plan", lambda *_: replace(plan, ways=ways))
    list(pipe.denoise(request_of(prompt=PROMPT, steps=1), PHOTO))
    assert made[-1][2] == 2**15


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("1GB", (64, 64)),
        ("13MB", (64, 64)),
        pytest.param("1GB", (128, 192), marks=pytest.mark.slow),
        pytest.param("25MB", (128, 128), marks=pytest.mark.slow),
        pytest.param("16MB", (16, 1008), marks=pytest.mark.slow),
    ],
)
def test_encoding_stays_within_the_plan(memory, size):
    pipe = ZImagePipeline.from_pretrained("pocket", "float32", memory)
    inputs = Inputs(image=Image.fromarray(tiny.photo()).resize(size))
    plan = pipe.plan(request_of(steps=1), inputs)
    pipe.encode("a red fox")  # so that only the image is encoded below
    pipe.networks.release()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for event in pipe.events(request_of(steps=1), inputs):
        if isinstance(event, Phase) and (event.name, event.done) == ("image", event.total):
            break
    assert mx.get_peak_memory() - before <= plan.peaks["image"] <= parse_memory(memory)


def test_a_gpus_latents_that_are_not_finite_stop_the_run_at_the_image(folder):
    from mlx_zimage import NumericsError

    arrays = {name: np.full_like(x, np.nan) for name, x in tiny.weights(0, "vae", tiny.VAE).items()}
    tiny.save_component(folder / "vae", "vae", arrays, tiny.VAE)
    with pytest.raises(NumericsError, match="the image's latents are not finite"):
        latents_of(ZImagePipeline.from_pretrained(folder, dtype="float32"), request_of())


def test_a_request_with_an_image_survives_json():
    request = request_of(image="0" * 64, strength=0.3, sample_posterior=True)
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


# ---- the command line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run mlx-zimage in a folder that has an image, a.png, in this process."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tiny.photo()).resize((48, 32)).save("a.png")
    return lambda *args, **options: CliRunner().invoke(cli.main, [str(arg) for arg in args], **options)


def test_generate_starts_from_an_image_of_its_size(run):
    result = run("generate", PROMPT, *SMALL, "--image", "a.png", "--strength", "0.5", "--seed", "1", "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert (made["request"]["width"], made["request"]["height"], made["request"]["strength"]) == (48, 32, 0.5)
    assert made["image_seconds"] > 0
    assert b"Denoising strength: 0.5" in Path("image.png").read_bytes()
    pipe = ZImagePipeline.from_pretrained("pocket")
    image = pipe(PROMPT, image="a.png", strength=0.5, num_inference_steps=2, seed=1).images[0]
    assert np.array_equal(image, Image.open("image.png"))


def test_an_image_made_from_an_image_needs_it_again(run):
    run("generate", PROMPT, *SMALL, "--image", "a.png", "-o", "old.png")
    Image.open("a.png").save("copy.bmp")
    Image.open("a.png").rotate(180).save("other.png")
    result = run("generate", "--from", "old.png")
    assert result.exit_code == 2
    assert "old.png was generated from an image; pass that file with --image" in result.stderr
    assert "the image that" not in run("generate", "--from", "old.png", "--image", "copy.bmp").stderr
    assert Path("image.png").read_bytes() == Path("old.png").read_bytes()
    assert "--image is not the file that old.png" in run("generate", "--from", "old.png", "--image", "other.png").stderr


def test_a_mask_keeps_the_rest_and_is_needed_again(run):
    mask = np.zeros((32, 48), np.uint8)
    mask[8:24, 16:40] = 255
    Image.fromarray(mask).save("mask.png")
    options = ["--image", "a.png", "--mask", "mask.png"]
    result = run(
        "generate",
        PROMPT,
        *SMALL,
        *options,
        "--seed",
        "1",
        "--mask-feather",
        "4",
        "--mask-resample",
        "1",
        "-o",
        "old.png",
    )
    assert result.exit_code == 0, result.stderr
    changed = (np.asarray(Image.open("old.png")) != np.asarray(Image.open("a.png"))).any(axis=2)
    assert changed.any() and not changed[mask == 0].any()
    result = run("generate", "--from", "old.png", "--image", "a.png")
    assert (result.exit_code, "was generated from a mask; pass that file with --mask" in result.stderr) == (2, True)
    assert run("generate", "--from", "old.png", *options).exit_code == 0
    assert Path("image.png").read_bytes() == Path("old.png").read_bytes()
    line = {
        "prompt": PROMPT,
        "seed": 1,
        "image": "a.png",
        "mask_image": "mask.png",
        "mask_feather": 4,
        "mask_resample": 1,
    }
    Path("r.jsonl").write_text(json.dumps(line | {"output": "json.png"}))
    assert run("generate", *SMALL, "--requests", "r.jsonl").exit_code == 0
    assert Path("json.png").read_bytes() == Path("old.png").read_bytes()


def test_requests_name_images_of_their_own(run):
    Image.open("a.png").rotate(180).save("b.png")
    lines = [
        {"prompt": PROMPT, "seed": 1, "image": "a.png", "output": "1.png"},
        {"prompt": PROMPT, "seed": 1, "image": "b.png", "strength": 0.5, "output": "2.png"},
        {"prompt": PROMPT, "seed": 1, "size": "32x32", "output": "3.png"},
    ]
    Path("r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run("generate", *SMALL, "--requests", "r.jsonl").stdout == "1.png\n2.png\n3.png\n"
    found = [read_origin(Path(f"{i}.png")).request for i in (1, 2, 3)]
    assert [request.strength for request in found] == [0.6, 0.5, None]
    assert found[0].image != found[1].image and found[2].image is None
    Path("r.jsonl").write_text(json.dumps({"prompt": PROMPT, "image": "none.png"}))
    assert "no image at none.png" in run("generate", *SMALL, "--requests", "r.jsonl").stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "none.png"}, "no image at none.png"),
        ({"image": "text.png"}, "text.png is not an image"),
        ({"image": "a.png", "mask_image": "none.png"}, "no image at none.png"),
        ({"image": "a.png", "mask_image": "small.png"}, "the mask has 16x16 pixels, but the image has 48x32"),
        ({"image": "a.png", "mask_image": "black.png"}, "the mask is black"),
    ],
)
def test_images_that_cannot_work_are_refused_with_their_line_before_any_image_is_generated(run, line, message):
    Path("text.png").write_text("text")
    Image.new("L", (16, 16), 255).save("small.png")
    Image.new("L", (tiny.WIDTH, tiny.HEIGHT)).save("black.png")
    lines = [{"prompt": PROMPT, "seed": 1, **own} for own in ({}, line)]
    Path("r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = run("generate", *SMALL, "--size", "96x80", "--requests", "r.jsonl")
    assert result.exit_code == 2
    assert f"Error: r.jsonl, line 2: {message}" in result.stderr
    assert not Path("image.png").exists()


def test_every_seed_starts_from_the_image_and_shows_previews(run):
    result = run(
        "generate", PROMPT, *SMALL, "--image", "a.png", "--seed", "1", "--count", "2", "--preview-dir", "steps"
    )
    assert result.stdout == "image.png\nimage-1.png\n"
    assert not np.array_equal(Image.open("image.png"), Image.open("image-1.png"))
    # at strength 0.6, both of the two steps run
    assert len(list(Path("steps").iterdir())) == 2 * 2


def test_quantized_and_streamed_models_start_from_images(run):
    convert("pocket", "small", bits=4, group_size=32)
    small = ["generate", PROMPT, "-m", "small", "--steps", "2", "-q", "--seed", "1", "--image", "a.png"]
    assert run(*small, "-o", "kept.png").exit_code == 0
    result = run(*small, "-o", "streamed.png", "--memory", "9MB", "--json")
    assert result.exit_code == 0, result.stderr
    kept, streamed = (np.asarray(Image.open(f"{name}.png")).astype(int) for name in ("kept", "streamed"))
    # strips change the last bits of the image's latents
    assert np.abs(kept - streamed).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strength", "0.5"], "--strength is for image to image, but there is no image to start from; give one"),
        (["--image", "a.png", "--strength", "0"], "--strength 0 leaves no step to run"),
        (["--image", "a.png", "0.4"], "--image takes a file only; use --strength, which is the opposite: for mflux's"),
        (["--image", "a.png", "0.4"], "--image-strength 0.4, use --strength 0.6"),
        (["--image-path", "a.png"], "use --image FILE, and --strength, which is 1 minus mflux's --image-strength"),
        (["--image-strength", "0.4"], "use --strength, which is the opposite"),
        (["--image", "none.png"], "no image at none.png"),
        (["--image", "text.png"], "text.png is not an image that can be read"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_looked_up(run, options, message):
    Path("text.png").write_text("text")
    result = run("generate", PROMPT, "-m", "no/model", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_plan_has_a_stage_for_the_image(run):
    result = run("plan", "pocket", "--image", "a.png")
    assert "1 image of 48x32" in result.stdout
    assert "\nimage " in result.stdout
    assert "\nimage " not in run("plan", "pocket").stdout


# ---- what pocket makes of it


COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "star", "ring", "heart")


def drawn(colour: str, left: int, top: int, side: int = 96) -> Image.Image:
    """A disc of a colour on white."""
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).ellipse((left, top, left + side // 2, top + side // 2), fill=colour)
    return image


@pytest.mark.parametrize("count", [pytest.param(10, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.long)])
def test_the_distance_from_the_image_rises_with_the_strength(count):
    """Of images of a disc, with prompts for another shape in another colour."""
    pipe = ZImagePipeline.from_pretrained("pocket")
    distances = []
    for seed in range(0, 50, 50 // count):
        start = drawn(COLOURS[seed % 5], seed % 48, 7 * seed % 48)
        prompt = f"a {COLOURS[(seed + 1) % 5]} {SHAPES[seed // 10]} on a gray background"
        made = [
            pipe(prompt, image=start, strength=strength, seed=seed).images[0] for strength in (0.2, 0.4, 0.6, 0.8, 1.0)
        ]
        apart = [np.asarray(image, float) - np.asarray(start, float) for image in made]
        distances.append([np.sqrt(np.mean(difference**2)) for difference in apart])
    mean = np.mean(distances, axis=0)
    assert (np.diff(mean) > 0).all()


@pytest.mark.parametrize("count", [pytest.param(5, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.long)])
def test_resampling_makes_the_masked_part_follow_the_prompt_twice_as_often(monkeypatch, count):
    """Captions of two objects, of which the image has one, and the mask is where the other belongs; four seeds each."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "pocket")
    from judge import judge
    from render import ground_truth
    from scenes import sample_scene

    pipe = ZImagePipeline.from_pretrained("pocket")
    rng, right = random.Random(2027), {0: 0, 5: 0}
    for seed in range(count):
        scene = sample_scene(rng, "held out", kind="pair", canvas=(128, 128))
        image = ground_truth([replace(scene, kind="single", things=scene.things[:1])])[0]
        missing, reach = scene.things[1], scene.things[1].radius + 8
        mask = Image.new("L", (128, 128))
        box = (missing.x - reach, missing.y - reach, missing.x + reach, missing.y + reach)
        ImageDraw.Draw(mask).rectangle(box, fill="white")
        for times in right:
            run = {"image": image, "mask_image": mask, "mask_resample": times, "seed": seed}
            made = pipe(scene.caption, num_images_per_prompt=4, **run).images
            assert not (np.asarray(made[0]) != image)[np.asarray(mask) == 0].any()
            right[times] += sum(judge(np.asarray(one), scene).is_right for one in made)
    assert right[5] >= (2 if count == 50 else 1.5) * right[0]  # of 20 images, chance moves a few
