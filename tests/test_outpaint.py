"""Outpainting: a request that continues an image."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from PIL import Image

from mlx_zimage import GenerateRequest, Inputs, ZImagePipeline, cli
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.request import Outpaint

PHOTO = Inputs(image=tiny.photo())  # 96x80
PROMPT = "a red circle on a blue background"
SMALL = ["-m", "pocket", "--steps", "2", "-q"]


def request_of(**changes) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a red fox", "seed": 0, "steps": 4, "guidance_scale": 0.0, **changes})


def test_outpainting_keeps_the_image_and_generates_the_rest(pipe):
    *_, generated = pipe.stream(request_of(outpaint="left=32,bottom=16"), PHOTO)
    image = generated.pixels
    assert image.shape == (96, 128, 3)
    assert np.array_equal(image[:80, 32:], tiny.photo())
    assert image[:, :24].std() > 1 and image[88:].std() > 1


def test_a_call_takes_the_sides_to_continue_and_starts_from_noise_there(pipe):
    call = {"image": tiny.photo(), "num_inference_steps": 4, "guidance_scale": 0.0, "seed": 0}
    *_, generated = pipe.stream(request_of(outpaint=Outpaint(right=16)), PHOTO)
    assert np.array_equal(pipe("a red fox", outpaint={"right": 16}, **call).images[0], generated.pixels)
    assert generated.request.strength == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"outpaint": "left=16"}, "outpaint is for image to image, but there is no image to start from"),
        (
            {"image": tiny.photo(), "mask_image": tiny.mask(), "outpaint": "left=16"},
            "mask_image and outpaint were both",
        ),
        ({"image": tiny.photo(), "outpaint": "left=17"}, "left must be a multiple of 16 pixels, got 17"),
        ({"image": tiny.photo(), "outpaint": "left=64", "width": 64}, "width 64 leaves no room for the image"),
        (
            {"image": tiny.photo(), "outpaint": "left=16", "mask_grow": 2},
            "mask_grow is for a mask of your own, but outpaint makes one; leave it out",
        ),
    ],
    ids=[*"abcde"],
)
def test_a_call_that_cannot_work_is_refused_before_any_work(refused_at_once, call, message):
    refused_at_once(message, **call)


def test_a_request_with_sides_survives_json():
    request = request_of(outpaint=Outpaint(left=16))
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_generate_continues_an_image_and_does_it_again_from_the_result(tmp_path, monkeypatch, light_pocket):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tiny.photo()).resize((48, 32)).save("a.png")
    run = lambda *args: CliRunner().invoke(cli.main, ["generate", *args])  # noqa: E731
    result = run(PROMPT, *SMALL, "--image", "a.png", "--outpaint", "left=16,top=32", "--seed", "1")
    assert result.exit_code == 0, result.stderr
    image = np.asarray(Image.open("image.png"))
    assert image.shape == (64, 64, 3) and np.array_equal(image[32:, 16:], np.asarray(Image.open("a.png")))
    assert run("--from", "image.png", "--image", "a.png", "-o", "again.png").exit_code == 0
    assert Path("again.png").read_bytes() == Path("image.png").read_bytes()
    Path("r.jsonl").write_text(json.dumps({"prompt": PROMPT, "image": "a.png", "outpaint": {"right": 16}}))
    assert run(*SMALL, "--requests", "r.jsonl", "-o", "r.png").exit_code == 0
    assert read_origin(Path("r.png")).request.outpaint == Outpaint(right=16)
    result = run(PROMPT, "-m", "no/model", "--image", "a.png", "--outpaint", "up=16")
    assert (
        result.exit_code == 2
        and "--outpaint must be sides (left, top, right, bottom), each at most once" in result.stderr
    )


@pytest.mark.slow
def test_the_background_continues_in_eight_directions_without_a_seam(monkeypatch):
    """By the judge of examples/pocket, on its own scenes; the objects in them stay exactly as they are."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "pocket")
    from judge import find_objects
    from render import ground_truth
    from scenes import held_out_scenes

    pipe = ZImagePipeline.from_pretrained("pocket", "float32")
    scenes = [scene for scene in held_out_scenes(200, 5, (128, 128)) if scene.background_is_named]
    sides = [
        ("left",),
        ("right",),
        ("top",),
        ("bottom",),
        *((a, b) for a in ("left", "right") for b in ("top", "bottom")),
    ]
    for seed, (scene, names) in enumerate(zip(scenes, sides, strict=False)):
        outpaint = Outpaint(**dict.fromkeys(names, 32))
        before = ground_truth([scene])[0]
        after = pipe(scene.caption, image=before, outpaint=outpaint, seed=seed).images[0]
        after = np.asarray(after)
        rows, columns = slice(outpaint.top, outpaint.top + 128), slice(outpaint.left, outpaint.left + 128)
        assert np.array_equal(after[rows, columns], before)
        color, is_close, *_ = find_objects(after)
        assert color == scene.background and is_close
        new = np.ones(after.shape[:2], bool)
        new[rows, columns] = False
        across, within = [], []
        for axis in (0, 1):
            change = np.abs(np.diff(after.astype(int), axis=axis)).max(-1)
            border = np.diff(new.astype(int), axis=axis) != 0
            across.append(change[border])
            within.append(np.abs(np.diff(before.astype(int), axis=axis)).max(-1).ravel())
        assert np.concatenate(across).mean() <= 2 * np.concatenate(within).mean()
