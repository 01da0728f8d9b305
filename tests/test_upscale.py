"""Upscaling: an image, enlarged and refined in tiles."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from compare import TOLERANCE, relative_error
from hypothesis import given
from hypothesis import strategies as st
from lanes import slow
from PIL import Image
from test_noise import Generator

from mlx_zimage import GenerateRequest, Inputs, MemoryBudgetError, RequestError, Step, ZImagePipeline, cli
from mlx_zimage.images.codec import rounded
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.images.upscale import back_projected, resized
from mlx_zimage.models.transformer import Transformer
from mlx_zimage.noise import torch_randn
from mlx_zimage.pipeline import workload
from mlx_zimage.sizes import rounded_up
from mlx_zimage.tiles import Tiles, spread

PHOTO = Inputs(image=tiny.photo())  # 96x80
SMALL = np.ascontiguousarray(tiny.photo()[:32, :48])
PROMPT = "a red circle on a blue background"
ORDER = ["--mask", "--outpaint", "--upscale"]


def request_of(**changes) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a red fox", "seed": 0, "steps": 4, "guidance_scale": 0.0, **changes})


def run(pipe, request: GenerateRequest, inputs: Inputs = PHOTO) -> tuple[list[Step], np.ndarray]:
    *steps, generated = pipe.stream(request, inputs)
    return steps, generated.pixels


# ---- tiles


@given(st.integers(1, 512), st.integers(1, 512))
def test_tiles_cover_a_side_and_overlap(tokens, most):
    tile, starts = spread(16 * tokens, 16 * most)
    assert tile <= 2 * max(most, 2) and starts[0] == 0 and starts[-1] + tile == 2 * tokens
    assert all(start % 2 == 0 for start in starts)
    for a, b in pairwise(starts):
        assert a < b <= a + tile - 2
    if tokens <= most:
        assert starts == (0,)


@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_that_are_cut_and_joined_equal_the_whole(batch):
    tiles = Tiles.of(240, 400, 128)
    latents = mx.random.normal((batch, 50, 30, 16), key=mx.random.key(0))
    cut = tiles.cut(latents)
    assert cut.shape == (batch * tiles.count, tiles.h, tiles.w, 16) and tiles.count == 2 * 4
    # float32: weighted sums of equal numbers
    assert relative_error(tiles.join(cut, latents.shape), latents) < 1e-6


def test_tiles_are_blended_over_their_overlap_without_a_step():
    tiles = Tiles.of(384, 16, 256)
    values = mx.arange(tiles.count, dtype=mx.float32).reshape(-1, 1, 1, 1)
    joined = tiles.join(mx.broadcast_to(values, (tiles.count, tiles.h, tiles.w, 1)), (1, 2, 48, 1))[0, 0, :, 0]
    across = np.diff(np.array(joined))
    assert (across >= 0).all() and across.max() < 0.3  # an overlap of 4 latents and more


# ---- the result


def test_an_image_is_enlarged_and_refined_as_image_to_image_does_then_back_projected(pipe):
    steps, image = run(pipe, request_of(upscale=2, strength=0.5, tile=0), Inputs(image=SMALL))
    enlarged = Image.fromarray(SMALL).resize((96, 64), Image.Resampling.LANCZOS)
    *wanted, refined = pipe.stream(request_of(strength=0.5), Inputs(image=np.asarray(enlarged)))
    assert pipe.complete(request_of(upscale=2), PHOTO).extent[:2] == (96, 80)
    assert np.array_equal(image, rounded(back_projected(refined.unit, SMALL))) and image.shape == (64, 96, 3)
    assert not np.array_equal(image, refined.pixels)
    assert [step.index for step in steps] == [step.index for step in wanted] == [0, 1]


def test_the_image_generated_first_is_refined(pipe):
    size = {"width": 64, "height": 32}
    steps, image = run(pipe, request_of(upscale=1.5, strength=0.5, **size), Inputs())
    _, first = run(pipe, request_of(**size), Inputs())
    _, expected = run(pipe, request_of(upscale=1.5, strength=0.5), Inputs(image=first))
    assert np.array_equal(image, expected) and image.shape == (48, 96, 3)
    assert [(step.index, step.steps) for step in steps] == [(i, 6) for i in range(6)]


@pytest.mark.parametrize("size", [(64, 48), (96, 72), (80, 64)], ids=str)
def test_back_projection_shows_the_original_and_keeps_finer_detail(size):
    rng = np.random.default_rng(0)
    original = 64 + resized(tiny.photo(), 64, 48) // 2
    refined = rng.uniform(0.3, 0.7, (2 * size[1], 2 * size[0], 3)).astype(np.float32)
    apart = [  # from the original, before and after
        np.abs(resized(np.ascontiguousarray(x[:, :, 0]), 64, 48) - original[:, :, 0] / 255).mean()
        for x in (refined, back_projected(refined, original))
    ]
    assert apart[1] < apart[0] / 5

    enlarged = resized(original, 128, 96) / 255
    fine = 0.1 * (np.indices((96, 128)).sum(axis=0) % 2 - 0.5)[:, :, None]  # cancels out when reduced
    detailed = (enlarged + fine).astype(np.float32)
    # Lanczos is not quite a perfect filter, and pixels are rounded to 8 bits
    assert np.abs(back_projected(detailed, original) - detailed).mean() < 0.01


def test_every_tile_of_a_step_shares_one_read_of_the_weights(pipe, watch):
    called = watch(Transformer, "__call__")
    steps, image = run(pipe, request_of(upscale=2, tile=96))
    assert image.shape == (160, 192, 3) and len(steps) == len(called) == 1
    assert pipe.plan(request_of(upscale=2, tile=96), PHOTO).peaks["denoise"] > 0


def test_tiles_agree_with_the_whole_where_the_network_looks_at_each_latent_alone(pipe, monkeypatch):
    def alone(self, *_):
        return lambda latents, i, count=None: [mx.sin(latents)]

    monkeypatch.setattr(Transformer, "velocities", alone)
    tiled, whole = (run(pipe, request_of(upscale=2, tile=tile))[0][-1].latents for tile in (64, 0))
    assert relative_error(tiled, whole) < TOLERANCE  # float32: weighted sums of equal numbers


def test_a_call_upscales_and_the_strength_is_02_unless_given(pipe):
    assert pipe.complete(request_of(upscale=2), PHOTO).strength == 0.2
    assert pipe.complete(request_of(upscale=2), PHOTO).tile == pipe.sample_size
    out = pipe("a red fox", image=SMALL, upscale=2, num_inference_steps=4, seed=0, guidance_scale=0.0)
    assert np.array_equal(out.images[0], run(pipe, request_of(upscale=2), Inputs(image=SMALL))[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"upscale": 1}, "upscale 1 would not enlarge the image; give a factor above 1, such as 2"),
        ({"upscale": 9}, "upscale must be from 1 to 8, got 9"),
        ({"upscale": float("nan")}, "upscale must be from 1 to 8, got nan"),
        ({"upscale": "2"}, "upscale must be a number"),
        ({"upscale": 2, "num_images_per_prompt": 2}, "upscale takes one image per seed"),
        ({"upscale": 8, "width": 2048, "height": 16}, "width must be a multiple of 16 pixels from 16 to 8192"),
        ({"tile": 64}, "tile is for image to image"),
        ({"upscale": 2, "image": tiny.photo(), "mask_image": tiny.mask()}, "mask_image and upscale were both given"),
        ({"upscale": 2, "image": tiny.photo(), "outpaint": "left=16"}, "outpaint and upscale were both given"),
        ({"upscale": 2, "strength": 0}, "leaves no step to run"),
    ],
    ids=[*"abcdefghij"],
)
def test_a_call_that_cannot_work_is_refused_before_any_work(refused_at_once, call, message):
    refused_at_once(message, **call)


CALL = {"upscale": 2, "num_inference_steps": 4, "guidance_scale": 0.0}
NOISE = torch_randn(0, (2, 16, 8, 12))  # of the small photo at twice its size


def test_several_images_are_upscaled_in_one_call_each_from_noise_of_its_own(pipe):
    images = [SMALL, 255 - SMALL]
    found = pipe(["a red fox"] * 2, image=images, seed=0, **CALL).images
    for i, image in enumerate(images):
        _, alone = run(pipe, request_of(upscale=2), Inputs(latents=NOISE[i : i + 1], image=image))
        assert np.array_equal(found[i], alone)


def test_given_noise_has_the_size_of_the_enlarged_image(pipe):
    generator = Generator(0)
    for i in (0, 1):
        _, wanted = run(pipe, request_of(upscale=2), Inputs(latents=NOISE[i : i + 1], image=SMALL))
        found = pipe("a red fox", image=SMALL, generator=generator, **CALL).images[0]
        assert np.array_equal(found, wanted)
    with pytest.raises(RequestError, match=r"latents must have shape \(1, 16, 8, 12\): .*, got \(1, 16, 4, 6\)"):
        run(pipe, request_of(upscale=2), Inputs(latents=NOISE[:1, :, :4, :6], image=SMALL))


@pytest.mark.parametrize("prompts", [slow(["a red fox"]), ["a red fox"] * 2], ids=["one", "two"])
def test_an_enlarged_image_may_be_sampled_whether_it_was_given_or_generated(pipe, prompts):
    size = {"width": 48, "height": 32}
    for image in ({}, {"image": [SMALL] * len(prompts)}):
        sampled, mean = (
            pipe(prompts, sample_posterior=value, seed=0, **size, **image, **CALL).images for value in (True, False)
        )
        assert len(sampled) == len(prompts) and not np.array_equal(sampled[0], mean[0])


def test_a_callback_sees_the_steps_of_both_parts(pipe):
    seen = []

    def callback(pipe, index, timestep, values):
        seen.append((index, float(timestep), values["latents"].shape[2:], pipe.num_timesteps))

    pipe("a red fox", 32, 48, seed=0, strength=0.5, callback_on_step_end=callback, **CALL)
    starts = [float(1000 * sigma) for sigma in pipe.sigmas(request_of(width=48, height=32))[:-1]]
    sides = [(4, 6)] * 4 + [(8, 12)] * 2
    assert seen == [(*row, 6) for row in zip(range(6), [*starts, *starts[2:]], sides, strict=True)]


@pytest.mark.parametrize("last", [1, 3])
def test_an_image_whose_steps_are_stopped_is_enlarged_and_not_refined(pipe, last):
    seen = []

    def callback(pipe, index, timestep, values):
        seen.append(index)
        pipe._interrupt = index == last

    call = {**CALL, "seed": 0, "callback_on_step_end": callback}
    large = pipe("a red fox", 32, 48, **call).images[0]
    assert seen == [*range(last + 1)]
    small = pipe("a red fox", 32, 48, **{**call, "upscale": None}).images[0]
    assert np.array_equal(large, resized(np.asarray(small), 96, 64))
    latents = pipe("a red fox", 32, 48, output_type="latent", **call).images
    assert latents.shape == (1, 16, 4, 6)


# ---- the command line


def test_generate_upscales_a_file_or_what_it_generates_and_does_it_again(tmp_path, monkeypatch, light_pocket):
    monkeypatch.chdir(tmp_path)
    small = ["generate", PROMPT, "-m", "pocket", "--steps", "2", "-q", "--seed", "1", "--upscale", "2"]
    Image.fromarray(tiny.photo()).resize((48, 32)).save("a.png")
    for name, options in (("image", ["--image", "a.png"]), ("text", ["--size", "48x32"])):
        result = CliRunner().invoke(cli.main, [*small, *options, "--tile", "64", "-o", f"{name}.png"])
        assert result.exit_code == 0, result.stderr
        assert Image.open(f"{name}.png").size == (96, 64)
        assert read_origin(Path(f"{name}.png")).request.upscale == 2
        assert b"Size: 96x64" in Path(f"{name}.png").read_bytes()
        again = ["generate", "--from", f"{name}.png", *options[: 2 * (name == "image")], "-o", "again.png", "--json"]
        result = CliRunner().invoke(cli.main, [*again, "--overwrite"])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["request"]["tile"] == 64
        assert Path("again.png").read_bytes() == Path(f"{name}.png").read_bytes()


def test_generate_takes_noise_for_an_enlarged_image(tmp_path, monkeypatch, light_pocket):
    monkeypatch.chdir(tmp_path)
    generate = ["generate", PROMPT, "-m", "pocket", "--steps", "2", "-q", "--seed", "1", "--upscale", "2"]
    Image.fromarray(tiny.photo()).resize((48, 32)).save("a.png")
    np.save("noise.npy", torch_randn(1, (1, 16, 8, 12)))
    for name, options in (("seed", []), ("noise", ["--latents", "noise.npy"])):
        result = CliRunner().invoke(cli.main, [*generate, *options, "--image", "a.png", "-o", f"{name}.png"])
        assert result.exit_code == 0, result.stderr
    assert np.array_equal(*(np.asarray(Image.open(f"{name}.png")) for name in ("seed", "noise")))
    for options, size in (["--image", "a.png", "--size", "64x32"], "128x64"), (["--size", "48x32"], "48x32"):
        result = CliRunner().invoke(cli.main, [*generate, *options, "--latents", "noise.npy"])
        assert result.exit_code == 2 and f"but the requested size is {size}" in result.stderr


@pytest.mark.parametrize(
    ("old", "new", "first", "second"),
    [
        (["--outpaint", "left=16"], ["--upscale", "2"], "--outpaint", "--upscale"),
        (["--upscale", "2"], ["--mask", "mask.png"], "--upscale", "--mask"),
        (["--mask", "mask.png"], ["--outpaint", "top=16"], "--mask", "--outpaint"),
    ],
    ids=str,
)
def test_two_ways_of_starting_from_an_image_cannot_be_combined(
    tmp_path, monkeypatch, light_pocket, old, new, first, second
):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (48, 32), "white").save("mask.png")
    Image.fromarray(tiny.photo()).resize((48, 32)).save("a.png")
    run = lambda *args: CliRunner().invoke(cli.main, ["generate", *args, "--image", "a.png", "-q"])  # noqa: E731
    refused = run(PROMPT, "-m", "no/model", *old, *new)
    assert refused.exit_code == 2
    assert f"Error: {' and '.join(sorted([first, second], key=ORDER.index))} were both given" in refused.stderr
    assert run(PROMPT, "-m", "pocket", "--steps", "1", *old, "-o", "old.png").exit_code == 0
    refused = run("--from", "old.png", *new)
    assert refused.exit_code == 2
    assert f"old.png was generated with {first}, which cannot be combined with {second}; start from" in refused.stderr


def test_plan_shows_the_larger_image_and_its_tiles_as_generate_plans_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tiny.photo()).save("a.png")
    plan = lambda *args: CliRunner().invoke(cli.main, ["plan", "pocket", *args])  # noqa: E731
    assert "1 image of 192x160 in 4 tiles, memory" in plan("--image", "a.png", "--upscale", "2").stdout
    text = plan(
        "--size", "96x80", "--upscale", "2", "--tile", "0", "--tokens", "20", "--memory", "1GB", "--dtype", "float32"
    )
    assert "1 image of 96x80, upscaled to 192x160, memory" in text.stdout
    pipe = ZImagePipeline.from_pretrained("pocket", "float32", "1GB")
    peaks = pipe.plan(request_of(upscale=2, tile=0, steps=8, width=96, height=80)).peaks
    for phase in ("image", "decode"):
        assert f"{phase:13}about {rounded_up(peaks[phase])}, " in text.stdout
    assert "1 image of 128x80, memory" in plan("--image", "a.png", "--outpaint", "left=32").stdout
    assert "--outpaint is for image to image, but there is no image" in plan("--outpaint", "left=32").stderr


def test_what_does_not_fit_is_refused_with_the_largest_size_that_does(pipe):
    """In tiles, too, whose number depends on the size."""
    work = workload(pipe.complete(request_of(upscale=8, tile=96), PHOTO).parts[0], tokens=32)
    planner = pipe.networks.planner
    budget = planner.best(replace(work, width=256, height=256), 1).room
    with pytest.raises(MemoryBudgetError, match=r"the largest size that fits is 256x256; .*use smaller tiles"):
        planner.plan(work, budget)


@pytest.mark.parametrize(
    ("memory", "size", "tile"),
    [
        ("13MB", (48, 32), 64),
        slow("1GB", (48, 32), 64),
        *(pytest.param(memory, (96, 80), 96, marks=pytest.mark.slow) for memory in ("17MB", "1GB")),
    ],
)
def test_upscaling_stays_within_the_plan(memory, size, tile):
    inputs = Inputs(image=np.asarray(Image.fromarray(tiny.photo()).resize(size)))
    pipe = ZImagePipeline.from_pretrained("pocket", "float32", memory)
    request = request_of(prompt=PROMPT, upscale=2, tile=tile, steps=4)
    plan = pipe.plan(request, inputs)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run(pipe, request, inputs)
    assert mx.get_peak_memory() - before <= plan.peak <= plan.budget


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 128])
def test_upscaled_images_keep_the_judges_verdict(monkeypatch, side):
    """By the judge of examples/pocket: right images, enlarged to the size that pocket knows, and beyond it in tiles."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "pocket")
    from judge import judge
    from render import ground_truth
    from scenes import held_out_scenes

    pipe = ZImagePipeline.from_pretrained("pocket")
    for seed, scene in enumerate(held_out_scenes(20, 11, (128, 128))):
        small = Image.fromarray(ground_truth([scene])[0]).resize((side, side), Image.Resampling.BOX)
        large = pipe(scene.caption, image=small, upscale=2, seed=seed).images[0]
        assert large.size == (2 * side, 2 * side)
        assert judge(np.asarray(large.resize((128, 128), Image.Resampling.LANCZOS)), scene).is_right, scene.caption
