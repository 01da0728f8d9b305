import json
from contextlib import nullcontext
from dataclasses import replace

import controls
import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from compare import TOLERANCE, relative_error
from lanes import slow
from PIL import Image
from safetensors.numpy import save_file

from mlx_zimage import GenerateRequest, Inputs, RequestError, ZImagePipeline
from mlx_zimage.cli import main
from mlx_zimage.errors import CheckpointError
from mlx_zimage.images.metadata import Origin, read_origin
from mlx_zimage.images.source import digest, read_image
from mlx_zimage.machine import wide_dtype
from mlx_zimage.memory import Workload, make_plan
from mlx_zimage.models.controlnet import ControlNetConfig
from mlx_zimage.noise import initial_noise
from mlx_zimage.pipeline import Overflow
from mlx_zimage.request import ControlUse

CALL = {"prompt": "a red fox", "num_inference_steps": 3, "seed": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("controlnets")


@pytest.fixture
def controlled(tiny_folder, folder):
    """A pipeline with a ControlNet of version 2.1."""
    pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")
    pipe.load_controlnet(controls.write(folder, 0, "control_v21"))
    return pipe


def outline(size=(tiny.WIDTH, tiny.HEIGHT)) -> Image.Image:
    return Image.fromarray(tiny.photo()).resize(size)


def test_a_call_follows_its_control_image(controlled):
    plain = controlled(**CALL, width=tiny.WIDTH, height=tiny.HEIGHT).images
    one, other = (controlled(**CALL, control_image=image).images for image in (outline(), ("canny", outline())))
    assert one.shape == plain.shape  # the size is the control image's
    assert relative_error(one, plain) > 0.01 < relative_error(other, one)


def test_scale_0_equals_a_call_without_a_control_bit_for_bit(controlled, pipe):
    size = {"width": tiny.WIDTH, "height": tiny.HEIGHT}
    found = controlled(**CALL, **size, control_image=outline(), controlnet_conditioning_scale=0.0).images
    assert np.array_equal(found, pipe(**CALL, **size).images)


def test_a_streamed_controlnet_gives_the_bits_of_a_resident_one(controlled, monkeypatch):
    wanted = controlled(**CALL, control_image=outline()).images
    plan, blocks = controlled.networks.plan, controlled.planner.footprints["controlnet"].blocks
    assert all(name.startswith("controlnet.control_") for name in blocks)
    streamed = frozenset(blocks) | {"layers.1", "noise_refiner.0"}
    monkeypatch.setattr(controlled.networks, "plan", lambda *work: replace(plan(*work), keep=False, streamed=streamed))
    assert np.array_equal(controlled(**CALL, control_image=outline()).images, wanted)


def test_little_memory_streams_the_controlnet(controlled):
    work = Workload(16, 16, 1, 20, 2, controls=1)
    whole = controlled.planner.best(work, 10**10, keep=False)
    (denoise,) = (stage for stage in controlled.planner.stages(work) if stage.name == "denoise")
    tight = make_plan([denoise], controlled.planner.footprints, 1, keep=False)
    assert tight.room < whole.rooms["denoise"] and any(name.startswith("controlnet.") for name in tight.streamed)


def test_a_control_has_an_effect_from_its_start_to_its_end(controlled):
    def steps(**options) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        controlled(
            **CALL, **options, width=tiny.WIDTH, height=tiny.HEIGHT,
            callback_on_step_end=lambda pipe, i, t, given: found.append(np.array(given["latents"])),
        )  # fmt: skip
        return found

    plain, late = steps(), steps(control_image=outline(), control_guidance_start=0.3)
    assert np.array_equal(plain[0], late[0]) and not np.array_equal(plain[1], late[1])
    whole, early = steps(control_image=outline()), steps(control_image=outline(), control_guidance_end=0.5)
    assert np.array_equal(whole[0], early[0]) and not np.array_equal(whole[1], early[1])


def test_several_controls_are_added_and_have_their_own_scales(controlled):
    first, second = outline(), ("gray", outline())
    both = controlled(**CALL, control_image=[first, second], controlnet_conditioning_scale=[0.4, 0.5]).images
    one = controlled(**CALL, control_image=[first, second], controlnet_conditioning_scale=[0.4, 0.0]).images
    assert np.array_equal(one, controlled(**CALL, control_image=first, controlnet_conditioning_scale=0.4).images)
    assert relative_error(both, one) > 0.001


def test_inpainting_shows_the_controlnet_what_is_kept(controlled, monkeypatch):
    seen = []
    original = controlled.networks.denoise

    def denoise(*args):
        seen.append(np.array(args[6][0].latents))
        return (yield from original(*args))

    monkeypatch.setattr(controlled.networks, "denoise", denoise)
    photo, mask = Image.fromarray(tiny.photo()), Image.fromarray(tiny.mask())
    controlled(**CALL, image=photo, mask_image=mask, control_image="inpaint")
    (latents,) = seen
    kept = 1 - tiny.mask()[::8, ::8] / 255
    assert np.array_equal(latents[0, :, :, 16], kept)
    assert not latents[..., :16].any()
    grey = np.where(tiny.mask()[..., None] > 0, 127.5, tiny.photo()) / 127.5 - 1
    outside = controlled.encode_image(grey.astype(np.float32))
    # float32: an image whose grey is exact to within half a level
    assert relative_error(latents[0, ..., 17:], outside) < 1e-3
    controlled(**CALL, image=photo, control_image=photo)
    assert not seen[1][..., 16:].any() and seen[1][..., :16].any()


def test_a_request_with_controls_survives_json_and_is_replayed(controlled):
    image = outline()
    use = ControlUse(digest(read_image(image)), "canny", 0.5, 0.0, 0.7)
    inputs = Inputs(control_images=[image])
    request = controlled.complete(GenerateRequest("a red fox", steps=2, seed=1, controls=(use,)), inputs)
    assert request.controlnet == controlled.controlnet.fingerprint and request.controls == (use,)
    again = Origin.from_json(Origin(request, "tiny", "0" * 10, "float32").to_json()).request
    assert again == request and GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    first, second = (list(controlled.denoise(one, inputs))[-1].latents for one in (request, again))
    assert mx.array_equal(first, second)


def test_a_request_for_another_controlnet_is_refused(controlled):
    image = outline()
    use = ControlUse(digest(read_image(image)))
    with pytest.raises(RequestError, match="fingerprint ffffffffff"):
        controlled.complete(GenerateRequest("x", seed=0, controls=(use,), controlnet="f" * 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control_image": (128, 80)}, "would be cropped by"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "start must be below control end"),
        ({"control_guidance_start": 0.9, "control_guidance_end": 0.95}, r"none of the steps to run \(3\) lies between"),
        ({"controlnet_conditioning_scale": -1}, "control scale must be from 0"),
        ({"controlnet_conditioning_scale": [1.0, 2.0]}, "one entry per control image"),
        ({"control_image": "inpaint"}, "a control without an image needs a mask"),
        ({"control_image": [], "control_guidance_start": 0.2}, "control_guidance_start is for a control_image"),
        ({"control_image": [], "control_guidance_end": 0.7}, "control_guidance_end is for a control_image"),
        ({"control_image": ("pose2", (96, 80))}, "prepare must be one of"),
    ],
)
def test_an_impossible_control_is_refused_before_any_weight_is_read(controlled, bytes_read, options, message):
    given = {"control_image": (tiny.WIDTH, tiny.HEIGHT), **options}
    size, image = given["control_image"], None
    if isinstance(size, tuple) and isinstance(size[0], str):
        image = (size[0], outline(size[1]))
    given["control_image"] = image or (outline(size) if isinstance(size, tuple) else size)
    with pytest.raises(RequestError, match=message):
        controlled(**CALL, **given, width=tiny.WIDTH, height=tiny.HEIGHT)
    assert not bytes_read


def test_a_control_image_without_a_controlnet_is_refused(pipe):
    with pytest.raises(RequestError, match="no ControlNet is loaded; load_controlnet"):
        pipe(**CALL, control_image=outline())


def test_a_lora_in_its_place_is_refused_and_the_loaded_one_stays(controlled, tmp_path):
    lora = tmp_path / "lora.safetensors"
    mx.save_safetensors(str(lora), {"diffusion_model.layers.0.attention.to_q.lora_A.weight": mx.zeros((4, 48))})
    before = controlled.controlnet
    with pytest.raises(CheckpointError, match="is a LoRA; expected a ControlNet"):
        controlled.load_controlnet(lora)
    assert controlled.controlnet is before


def test_the_plan_includes_the_controlnet(controlled):
    inputs = Inputs(control_images=[outline()])
    use = ControlUse(digest(read_image(outline())))
    plain = GenerateRequest("a red fox", tiny.WIDTH, tiny.HEIGHT, seed=0)
    own = controlled.complete(GenerateRequest("a red fox", tiny.WIDTH, tiny.HEIGHT, 0, controls=(use,)), inputs)
    weights = controlled.planner.footprints["controlnet"].total
    staged = [controlled.planner.best(controlled._work(one, [(1,) * 20]), 10**10, keep=False) for one in (
        controlled.complete(plain), own)]  # fmt: skip
    assert staged[1].peaks["denoise"] - staged[0].peaks["denoise"] > weights
    assert "image" in staged[1].peaks and "image" not in staged[0].peaks


def test_unloading_gives_back_the_models_own_images(controlled, pipe):
    size = {"width": tiny.WIDTH, "height": tiny.HEIGHT}
    controlled(**CALL, control_image=outline())
    controlled.unload_controlnet()
    assert np.array_equal(controlled(**CALL, **size).images, pipe(**CALL, **size).images)
    assert "controlnet" not in controlled.planner.footprints


def test_a_plain_controlnet_of_version_2_needs_more_steps_than_turbos(controlled):
    image = outline()
    use = ControlUse(digest(read_image(image)))
    request = GenerateRequest("x", seed=0, controls=(use,))
    inputs = Inputs(control_images=[image])
    assert controlled.complete(request, inputs).steps == 8
    controlled.load_controlnet(controlled.controlnet.component.folder, kind="plain")
    assert controlled.complete(request, inputs).steps == 20
    assert controlled.complete(replace(request, steps=9), inputs).steps == 9
    assert ControlNetConfig.from_dict(controls.CONFIGS["control_v21"]) == controlled.controlnet.component.config


def test_a_lora_changes_a_controlled_image_and_its_strength_0_does_not(controlled, tmp_path):
    rank = {"lora_A": (4, 48), "lora_B": (48, 4)}
    tensors = {
        f"diffusion_model.layers.{i}.attention.to_q.{part}.weight": mx.array(tiny.randn(i, part, *shape))
        for i in range(3)
        for part, shape in rank.items()
    }
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), tensors)
    plain = controlled(**CALL, control_image=outline()).images
    name = controlled.load_lora(tmp_path / "lora.safetensors")
    assert relative_error(controlled(**CALL, control_image=outline()).images, plain) > 0.01
    controlled.set_loras({name: 0.0})
    assert np.array_equal(controlled(**CALL, control_image=outline()).images, plain)


@pytest.mark.parametrize("scale", [slow(1.0), 1e6])
def test_a_controlled_image_that_overflows_float16_is_redone_in_bfloat16_with_its_controlnet(
    tiny_folder, tmp_path, scale
):
    path, wide = tmp_path / "loud", wide_dtype()
    arrays = controls.weights(0, "control_v21")
    arrays["control_layers.0.after_proj.weight"] *= scale
    path.mkdir()
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(controls.CONFIGS["control_v21"]))
    found = []
    for dtype in ("float16", wide):
        pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype=dtype)
        pipe.load_controlnet(path)
        with pytest.warns(Overflow) if scale > 1 and dtype == "float16" else nullcontext():
            found.append(pipe(**CALL, control_image=outline()).images)
        plain = pipe(**CALL, width=tiny.WIDTH, height=tiny.HEIGHT).images
        assert pipe.dtype == getattr(mx, wide if scale > 1 else dtype) and np.isfinite(plain).all()
        assert relative_error(found[-1], plain) > 0.01
    assert np.array_equal(*found) == (scale > 1)


def test_an_image_is_upscaled_in_tiles_together_with_its_control_image(controlled, monkeypatch):
    seen = []
    original = controlled.networks.denoise

    def denoise(*args):
        seen.extend((control.latents, args[5]) for control in args[6])
        return (yield from original(*args))

    monkeypatch.setattr(controlled.networks, "denoise", denoise)
    photo = Image.fromarray(tiny.photo())
    call = {**CALL, "output_type": "np", "image": photo, "upscale": 2, "tile": 96, "num_inference_steps": 8}
    one = controlled(**call, control_image=photo).images
    ((latents, tile),) = seen
    assert latents.shape[1:3] == (2 * tiny.HEIGHT // 8, 2 * tiny.WIDTH // 8) and tile == 96
    assert relative_error(one, controlled(**call).images) > 0.001


def test_two_prompts_and_two_images_at_once_follow_it_as_each_does_alone(controlled):
    both = {"num_inference_steps": 1, "seed": 3, "output_type": "latent", "control_image": outline()}
    batch = controlled("a red fox", **both, num_images_per_prompt=2).images
    guided = controlled("a red fox", **both, guidance_scale=2.0, negative_prompt="blurry").images
    assert batch.shape[0] == 2 and guided.shape[0] == 1
    alone = controlled("a red fox", **both, latents=controlled_noise(batch)[1:]).images
    # float32: a batch may be summed in another order
    assert relative_error(batch[1:], alone) < TOLERANCE


def controlled_noise(batch: np.ndarray) -> np.ndarray:
    return np.array(initial_noise(3, batch.shape))


# ---- the command line


@pytest.fixture(scope="module")
def here(tiny_folder, tmp_path_factory):
    """A folder with a ControlNet for the tiny model, and an image."""
    folder = tmp_path_factory.mktemp("here")
    controls.write(folder, 0, "control_v21")
    outline().save(folder / "line.png")
    return folder


def generate(*args: object):
    return CliRunner().invoke(main, ["generate", *map(str, args)])


def test_an_image_with_controls_is_generated_again_from_its_metadata(tiny_folder, here, tmp_path):
    model = "--model", tiny_folder, "--control-model", here / "control_v21"
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    line = "--control", here / "line.png"
    first = generate(
        "a fox", *model, *line, "--control-end", 0.5, "--control", f"canny:{here / 'line.png'}", "--control-scale", 0.3,
        "--seed", 1, "--steps", 2, "-o", one,
    )  # fmt: skip
    assert first.exit_code == 0, first.output
    assert "ControlNet control_v21: ControlNet Union 2.1 lite (unknown kind), 2 + 2 blocks" in first.stderr
    request = read_origin(one).request
    assert [(use.prepare, use.scale, use.end) for use in request.controls] == [(None, 0.3, 0.5), ("canny", 0.3, 0.5)]
    missing = generate("--from", one, *model, "-o", two)
    assert "was generated from 2 control images; pass them with --control, in the same order" in missing.output
    for second in (f"canny:{here / 'line.png'}", here / "line.png"):
        again = generate("--from", one, *model, *line, "--control", second, "-o", two, "--overwrite")
        assert again.exit_code == 0, again.output
        assert read_origin(two).request == request
    other = generate("--from", one, *model, *line, "--control", f"gray:{here / 'line.png'}", "-o", two, "--overwrite")
    assert other.exit_code == 0, other.output
    last = read_origin(two).request.controls[1]
    assert (last.prepare, last.scale, last.end) == ("gray", 0.9, 1.0), "the old image has none of this kind"


def test_an_inpainted_image_keeps_the_scale_at_which_its_controlnet_saw_what_is_kept(tiny_folder, here, tmp_path):
    Image.fromarray(tiny.mask()).save(tmp_path / "mask.png")
    inputs = "--image", here / "line.png", "--mask", tmp_path / "mask.png", "--mask-resample", 0
    run = "--model", tiny_folder, "--control-model", here / "control_v21", *inputs, "--control", "inpaint"
    first = generate("a fox", *run, "--control-scale", 0.3, "--seed", 1, "--steps", 2, "-o", tmp_path / "one.png")
    assert first.exit_code == 0, first.output
    again = generate("--from", tmp_path / "one.png", *run, "-o", tmp_path / "two.png")
    assert again.exit_code == 0, again.output
    one, two = (read_origin(tmp_path / f"{name}.png").request for name in ("one", "two"))
    assert two == one and one.controls[0].scale == 0.3


def test_an_image_of_pockets_is_generated_again_with_pockets_own_controlnet(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "line.png")
    line = "--control", tmp_path / "line.png"
    first = generate("a fox", "--model", "pocket", *line, "--seed", 1, "--steps", 1, "-o", tmp_path / "one.png")
    assert first.exit_code == 0, first.output
    again = generate("--from", tmp_path / "one.png", *line, "-o", tmp_path / "two.png")
    assert again.exit_code == 0, again.output
    one, two = (read_origin(tmp_path / f"{name}.png").request for name in ("one", "two"))
    assert two == one and one.controlnet


def test_requests_name_control_images_by_path(tiny_folder, here, tmp_path):
    lines = tmp_path / "requests.jsonl"
    values = {"prompt": "a fox", "seed": 1, "steps": 1, "output": str(tmp_path / "x.png")}
    lines.write_text(json.dumps(values | {"controls": [{"image": str(here / "line.png"), "scale": 0.4}]}))
    done = generate("--requests", lines, "--model", tiny_folder, "--control-model", here / "control_v21")
    assert done.exit_code == 0, done.output
    assert read_origin(tmp_path / "x.png").request.controls[0].scale == 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control", "sketch:x.png"], "must be FILE, or KIND:FILE with one of canny"),
        (["--control", "canny:"], "with one of canny, gray, scribble, tile, lines, pose, depth, got 'canny:'"),
        (["--control-scale", "1"], "need --control FILE"),
        (["--control-model", "x.safetensors"], "--control-model needs a control image"),
        (["--control", "LINE"], "--yes downloads alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union-2.1:"),
        (["--control", "LINE", "--control-scale", "1", "--control-scale", "2"], "must be given once, or once for each"),
        (
            ["--control", "LINE", "--control-model", "CONTROL", "--control-kind", "soft"],
            "must be plain, or one or more of",
        ),
        (["--control", "LINE", "--control-model", "LORA"], "is a LoRA; expected a ControlNet"),
        (["--control", "LINE", "--control-model", "nothing"], "no ControlNet at nothing; give a file, a folder"),
        (["--control", "LINE", "--control-model", "CONTROL", "--size", "96x32"], "leave out the size to use its own"),
        (
            ["--control", "LINE", "--control-model", "CONTROL", "--image", "LINE", "--outpaint", "left=32"],
            "would be cropped by 27 pixels to fit 128x80; crop it to that aspect ratio\n",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_weight_is_read(
    tiny_folder, here, bytes_read, options, message, tmp_path
):
    lora = tmp_path / "lora.safetensors"
    mx.save_safetensors(str(lora), {"diffusion_model.layers.0.attention.to_q.lora_A.weight": mx.zeros((4, 48))})
    files = {"LINE": here / "line.png", "CONTROL": here / "control_v21", "LORA": lora}
    done = generate("a fox", "--model", tiny_folder, *(files.get(option, option) for option in options))
    assert done.exit_code != 0 and message in done.output
    assert not any(bytes_read[name] for name in ("transformer", "text_encoder", "vae"))


def test_a_controlnet_that_does_not_suit_the_model_or_the_steps_gives_a_warning(tiny_folder, here, tmp_path):
    model = "--model", tiny_folder, "--control-model", here / "control_v21"
    run = "a fox", *model, "--control", here / "line.png", "--size", "32x32"
    for kind, steps, message in (
        ("plain", 2, "was not trained for as few as 2 steps"),
        ("base", 2, "was trained for base Z-Image, but this model is turbo"),
        ("8-steps", 17, "was trained for 8 steps, so 17 may not give a better image"),
    ):
        done = generate(*run, "--control-kind", kind, "--steps", steps, "-o", tmp_path / "x.png", "--seed", 0)
        assert message in done.stderr, done.output
    assert "trained" not in generate(*run, "--control-kind", "8-steps", "--steps", 8, "-o", tmp_path / "x.png").stderr


def test_plan_includes_the_controlnet(tiny_folder, here):
    shown = CliRunner().invoke(main, ["plan", str(tiny_folder), "--control-model", str(here / "control_v21")])
    assert shown.exit_code == 0 and "controlnet   4 blocks in memory, 0 streamed from disk" in shown.output
    assert "image " in shown.output
    alone = CliRunner().invoke(main, ["plan", "--control-model", str(here / "control_v21")])
    assert "--control-model needs MODEL" in alone.output
