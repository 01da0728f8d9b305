"""The server as its clients use it: the openai SDK itself, and the requests of Open WebUI, SillyTavern and LibreChat.

The requests are those that each client's source builds, with its field names, headers and encodings; read in November
2026: Open WebUI's routers/images.py, SillyTavern's endpoints/stable-diffusion.js and its extension, and LibreChat's
OpenAIImageTools.js and StableDiffusion.js in api/app/clients/tools/structured.
"""

import base64
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lanes import slow
from PIL import Image, ImageDraw
from serving import KEY, PROMPT, form, opened, png

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.images.codec import enlarge
from mlx_zimage.images.metadata import origin_in, read_origin
from mlx_zimage.images.preview import colours_of, sketch
from mlx_zimage.request import CONTROLS
from mlx_zimage.sampling import Step
from mlx_zimage.server.errors import Refusal
from mlx_zimage.server.openai import values_of


@pytest.fixture(scope="module")
def openai():
    """The SDK. Importing it takes over a second, which processes without these tests need not spend on collection."""
    import openai

    return openai


@pytest.fixture(scope="module")
def sdk(server, openai):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def alone(small_pocket) -> ZImagePipeline:
    """The same model, without a server."""
    return ZImagePipeline.from_pretrained(small_pocket)


def same(image: Image.Image, expected: Image.Image) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(expected))


# ---- the openai SDK


def test_the_sdk_lists_the_models(sdk):
    assert [model.id for model in sdk.models.list()] == ["pocket"]
    model = sdk.models.retrieve("pocket")
    assert model.object == "model" and model.control == {"kinds": [*CONTROLS], "scale": 1}


def test_an_image_is_the_one_that_the_library_generates(sdk, alone, tmp_path):
    answer = sdk.images.generate(model="pocket", prompt=PROMPT, size="64x48", extra_body={"seed": 7, "steps": 3})
    image = opened(answer.data[0].b64_json)
    assert same(image, alone(PROMPT, width=64, height=48, num_inference_steps=3, seed=7).images[0])
    assert (answer.size, answer.output_format, answer.data[0].seed) == ("64x48", "png", 7)
    assert answer.usage.output_tokens == 4 * 3
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12
    (tmp_path / "image.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
    assert read_origin(tmp_path / "image.png").request.prompt == PROMPT, "it can be generated again"


def test_several_images_have_consecutive_seeds(sdk):
    answer = sdk.images.generate(prompt=PROMPT, n=3, extra_body={"seed": 5, "steps": 1})
    assert [row.seed for row in answer.data] == [5, 6, 7]
    assert len({row.b64_json for row in answer.data}) == 3
    alone = sdk.images.generate(prompt=PROMPT, extra_body={"seed": 6, "steps": 1})
    assert alone.data[0].b64_json == answer.data[1].b64_json


def test_an_image_is_fetched_by_url_without_a_key_under_a_name_that_cannot_be_guessed(sdk, server):
    answer = sdk.images.generate(prompt=PROMPT, response_format="url", size="auto", extra_body={"steps": 1})
    url = answer.data[0].url
    assert url.startswith(f"{server.url}/v1/images/results/") and len(url.rpartition("/")[2]) > 40
    with urllib.request.urlopen(url) as response:
        assert response.headers["Content-Type"] == "image/png"
        assert opened(response.read()).size == (64, 64), "the model's own size"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url[:-5]}.png")


@pytest.mark.parametrize(("name", "format"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_compression_makes_files_smaller(sdk, name, format):
    sizes = []
    for quality in (90, 10):
        options = {"output_format": name, "output_compression": quality, "extra_body": {"seed": 1, "steps": 1}}
        answer = sdk.images.generate(prompt=PROMPT, **options)
        assert opened(answer.data[0].b64_json).format == format
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[1] < sizes[0]


def test_a_stream_has_previews_then_the_same_image_with_its_usage(sdk, alone):
    options = {"prompt": PROMPT, "extra_body": {"seed": 3, "steps": 6}}
    events = list(sdk.images.generate(stream=True, partial_images=2, **options))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    clean = [step.clean for step in alone.stream(GenerateRequest(PROMPT, seed=3, steps=6)) if isinstance(step, Step)]
    colours = colours_of(alone.encode_image)
    for event, step in zip(events[:2], (1, 3), strict=True):
        assert same(opened(event.b64_json), enlarge(sketch(clean[step], colours), 8))
    assert events[2].usage.total_tokens > events[2].usage.output_tokens == 16
    assert events[2].b64_json == sdk.images.generate(**options).data[0].b64_json


def test_an_edit_starts_from_the_image_and_keeps_its_size(sdk, alone):
    photo = Image.new("RGB", (64, 48), "white")
    answer = sdk.images.edit(image=("photo.png", png(photo)), prompt=PROMPT, extra_body={"seed": 1, "strength": 0.5})
    expected = alone(PROMPT, image=photo, strength=0.5, seed=1).images[0]
    assert same(opened(answer.data[0].b64_json), expected) and expected.size == (64, 48)
    assert answer.usage.input_tokens_details.image_tokens == 12


def test_an_edit_with_a_mask_changes_only_what_is_transparent(sdk):
    photo, mask = Image.new("RGB", (64, 64), "white"), Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (16, 16, 48, 48))
    files = {"image": ("photo.png", png(photo)), "mask": ("mask.png", png(mask))}
    events = list(sdk.images.edit(**files, prompt=PROMPT, stream=True, extra_body={"seed": 1}))
    assert [event.type for event in events] == ["image_edit.completed"]
    pixels = np.asarray(opened(events[0].b64_json)).copy()
    assert (pixels[16:48, 16:48] < 200).any()
    pixels[16:48, 16:48] = 255
    assert (pixels == 255).all()


def test_an_edit_takes_lists_and_objects_from_the_sdk_too(sdk, alone):
    """It sends them as several fields of the form."""
    photo = Image.new("RGB", (64, 64), "white")
    given = {"seed": 1, "outpaint": {"left": 16, "top": 16}, "sigmas": [1.0, 0.5], "loras": [{"name": "style"}]}
    made = []
    for loras in ({}, {"loras": []}, {"loras": [{"name": "style", "strength": 0.5}]}):
        answer = sdk.images.edit(image=("photo.png", png(photo)), prompt=PROMPT, extra_body={**given, **loras})
        made.append(opened(answer.data[0].b64_json))
    assert {image.size for image in made} == {(80, 80)}
    assert not any(same(a, b) for a, b in pairwise([*made, made[0]]))
    request = origin_in(base64.b64decode(answer.data[0].b64_json), "the image").request
    assert [(use.name, use.strength) for use in request.loras] == [("style", 0.5)]
    assert request.sigmas == (1.0, 0.5) and (request.outpaint.left, request.outpaint.top) == (16, 16)


def test_a_mask_without_transparent_parts_is_refused(sdk, openai):
    white = png(Image.new("RGB", (64, 64), "white"))
    with pytest.raises(openai.BadRequestError, match="no transparent pixels"):
        sdk.images.edit(image=("photo.png", white), mask=("mask.png", white), prompt=PROMPT)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": "100x100"}, "BadRequestError", "nearest are 96 and 112"),
        ({"prompt": "a cat <lora:style:1>"}, "BadRequestError", "use the loras field, as in [{'name': 'style'"),
        ({"size": "large"}, "BadRequestError", "size must be auto or pixels such as 1024x1024, got 'large'"),
        ({"n": 11}, "BadRequestError", "from 1 to 10, got 11"),
        ({"prompt": " "}, "BadRequestError", "the prompt is empty"),
        ({"model": "flux"}, "NotFoundError", "no model 'flux' is served; expected pocket"),
        ({"size": "8192x8192"}, "UnprocessableEntityError", "the largest size that fits"),
        ({"output_format": "gif"}, "BadRequestError", "output_format must be png or jpeg or webp"),
        ({"extra_body": {"seed": -1}}, "BadRequestError", "seed must be a whole number from 0"),
        ({"extra_body": {"strength": 0.5}}, "BadRequestError", "there is no image to start from"),
        ({"extra_body": {"control": "edges"}}, "BadRequestError", "control must be an object with keys from kind"),
        ({"extra_body": {"control": {"image": "/etc/passwd"}}}, "BadRequestError", "must be an image in base64"),
        ({"extra_body": {"control": {"image": 1}}}, "BadRequestError", "must be an image in base64, got 1"),
        ({"extra_body": {"control": {"image": "AAAA"}}}, "BadRequestError", "control: the image is not an image"),
        (
            {"extra_body": {"control": {"kind": "sketch"}}},
            "BadRequestError",
            "the kind must be one of canny, gray, scrib",
        ),
        ({"extra_body": {"control": {"path": "a.png"}}}, "BadRequestError", "got {'path': 'a.png'}"),
        ({"extra_body": {"control": {"scale": -1}}}, "BadRequestError", "control scale must be"),
        ({"extra_body": {"control": {}}}, "BadRequestError", "a control without an image needs a mask"),
        ({"extra_body": {"control": [{}] * 5}}, "BadRequestError", "at most 4 images, got 5"),
        (
            {"extra_body": {"loras": [{"name": "../style"}]}},
            "NotFoundError",
            "no LoRA '../style' is served; expected style",
        ),
    ],
)
def test_what_is_wrong_raises_an_error_of_the_sdk_that_says_so(sdk, openai, options, error, message):
    with pytest.raises(getattr(openai, error)) as caught:
        sdk.images.generate(**{"prompt": PROMPT, **options})
    assert message in caught.value.body["message"]
    assert caught.value.body.keys() == {"message", "type", "param", "code"}


def test_a_wrong_key_is_an_authentication_error(server, openai):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_lora_is_chosen_by_name(sdk, alone):
    seeded = {"seed": 1, "steps": 2}
    plain, strong, off = (
        sdk.images.generate(prompt=PROMPT, extra_body={**seeded, "loras": loras}).data[0].b64_json
        for loras in ([], [{"name": "style", "strength": 0.8}], [{"name": "style", "strength": 0}])
    )
    assert same(opened(plain), opened(off)) and not same(opened(plain), opened(strong))


# ---- control images


OUTLINE = Image.new("RGB", (64, 64), "black")
ImageDraw.Draw(OUTLINE).ellipse((12, 12, 44, 44), outline="white", width=2)
PHOTO = Image.new("RGB", (64, 64), "blue")
ImageDraw.Draw(PHOTO).ellipse((12, 12, 44, 44), fill="yellow")
CONTROLLED = {"seed": 1, "steps": 4}


@pytest.fixture(scope="module")
def followed(alone):
    """followed(image, ...): the library's image that follows a control image."""
    alone.load_controlnet("pocket")

    def generate(image: Image.Image, prepare: str | None = None, **options) -> Image.Image:
        shown = image if prepare is None else (prepare, image)
        return alone(PROMPT, control_image=shown, seed=1, num_inference_steps=4, **options).images[0]

    return generate


def base64_of(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


@pytest.mark.parametrize(
    ("image", "control", "options"),
    [
        (OUTLINE, {}, {}),
        (PHOTO, {"kind": "canny", "scale": 0.5}, {"prepare": "canny", "controlnet_conditioning_scale": 0.5}),
        (PHOTO, {"kind": "scribble", "end": 0.5}, {"prepare": "scribble", "control_guidance_end": 0.5}),
        slow(PHOTO, {"kind": "gray", "start": 0.5}, {"prepare": "gray", "control_guidance_start": 0.5}),
    ],
    ids=["ready", "canny", "scribble", "gray"],
)
def test_a_control_image_is_followed_as_in_the_library(sdk, followed, image, control, options):
    control["image"] = f"data:image/png;base64,{base64_of(image)}"
    answer = sdk.images.generate(prompt=PROMPT, extra_body={"control": control, **CONTROLLED})
    assert same(opened(answer.data[0].b64_json), followed(image, **options))


def test_an_edit_takes_control_images_in_its_form(sdk, server, alone):
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (16, 16, 48, 48))
    fields = {"prompt": PROMPT, "seed": "1", "steps": "2", "mask_resample": "0"}
    files = [("image", png(PHOTO)), ("mask", png(mask))]
    made = []
    for control in ([{}], [{"image": base64_of(OUTLINE)}], []):
        body, content_type = form({**fields, "control": json.dumps(control)}, files)
        answer = server.request("POST", "/v1/images/edits", body, {"Content-Type": content_type})
        assert answer.status == 200, answer.body
        made.append(answer.json["data"][0]["b64_json"])
    assert len({*made}) == 3, "what is kept, an outline, nothing"


def test_a1111s_controlnet_extension_is_followed_too(server, followed):
    unit = {"enabled": True, "image": base64_of(PHOTO), "module": "canny", "weight": 0.5, "model": "union [abc]"}
    unit |= {"guidance_start": 0, "guidance_end": 1, "control_mode": "Balanced", "pixel_perfect": True}
    off = {"enabled": False, "module": "depth_midas"}
    values = {"prompt": PROMPT, "seed": 1, "steps": 4, "alwayson_scripts": {"ControlNet": {"args": [off, unit]}}}
    answer = server.post("/sdapi/v1/txt2img", values)
    assert answer.status == 200, answer.body
    expected = followed(PHOTO, "canny", controlnet_conditioning_scale=0.5)
    assert same(opened(answer.json["images"][0]), expected)
    assert server.get("/controlnet/module_list") == {"module_list": ["none", *CONTROLS]}
    assert server.get("/controlnet/model_list") == {"model_list": ["pocket"]}
    for wrong, message in (
        (off | {"enabled": True}, "has no image"),
        (unit | {"module": "softedge_hed"}, "'softedge'"),
    ):
        refused = server.post("/sdapi/v1/txt2img", values | {"alwayson_scripts": {"controlnet": {"args": [wrong]}}})
        assert refused.status == 422 and message in refused.json["detail"]


def test_a_controlnet_unit_without_an_image_uses_the_one_that_its_request_starts_from(server):
    made = []
    for shown in ({}, {"image": {"image": base64_of(PHOTO), "mask": None}}, {"enabled": False}):
        scripts = {"controlnet": {"args": [{"module": "canny", **shown}]}}
        values = {"prompt": PROMPT, "seed": 1, "init_images": [base64_of(PHOTO)], "alwayson_scripts": scripts}
        made.append(server.post("/sdapi/v1/img2img", values).json["images"][0])
    assert made[0] == made[1] != made[2]


def test_an_image_says_how_it_was_generated(server, sdk):
    for ending in ("png", "jpeg", "webp"):
        answer = sdk.images.generate(prompt=PROMPT, output_format=ending, extra_body={"seed": 9, "steps": 1})
        found = server.post("/sdapi/v1/png-info", {"image": answer.data[0].b64_json}).json
        assert found["origin"]["request"]["seed"] == 9 and found["origin"]["request"]["prompt"] == PROMPT
        assert "Seed: 9" in found["info"] == found["items"]["parameters"]
    for image, message in (
        (base64_of(PHOTO), "no mlx-zimage or mflux metadata"),
        ("AAAA", "not a PNG"),
        (None, "base64"),
    ):
        refused = server.post("/sdapi/v1/png-info", {"image": image})
        assert refused.status == 422 and message in refused.json["detail"]


# ---- Open WebUI

BEARER = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}


def test_open_webui_generates_through_openais_api(server):
    values = {"model": "dall-e-2", "prompt": PROMPT, "n": 1, "size": "64x64", "response_format": "b64_json"}
    answer = server.post("/v1/images/generations", values, **BEARER)
    assert answer.status == 200
    assert opened(answer.json["data"][0]["b64_json"]).size == (64, 64)
    assert not answer.json["data"][0].get("url"), "it would prefer that"


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_open_webui_edits_through_openais_api(server, name):
    """It sends one image as a file named `image`, and a list, even of one, as `image[]`."""
    body, content_type = form(
        {"model": "gpt-image-1", "prompt": PROMPT, "n": "1", "size": "64x64", "response_format": "b64_json"},
        [(name, png(Image.new("RGB", (80, 80), "white")))],
    )
    answer = server.request("POST", "/v1/images/edits", body, {"Content-Type": content_type})
    assert answer.status == 200, answer.body
    assert opened(answer.json["data"][0]["b64_json"]).size == (64, 64)


@pytest.mark.parametrize(
    "value", ["[" * 20_000, "9" * 5000, '{"a":' * 100, "NaN"], ids=["deep", "digits", "objects", "NaN"]
)
def test_a_hostile_value_in_a_form_is_refused(server, value):
    image = png(Image.new("RGB", (64, 64), "white"))
    body, content_type = form({"model": "pocket", "prompt": PROMPT, "steps": value}, [("image", image)])
    answer = server.request("POST", "/v1/images/edits", body, {"Content-Type": content_type})
    assert answer.status == 400 and "steps" in answer.json["error"]["message"], answer.body


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ([("sigmas[]", "1.0"), ("sigmas[]", "0.5")], {"sigmas": [1.0, 0.5]}),
        ([("outpaint[left]", "16"), ("outpaint[top]", "32")], {"outpaint": {"left": 16, "top": 32}}),
        ([("control[kind]", "canny"), ("control[scale]", "1")], {"control": {"kind": "canny", "scale": 1}}),
        (
            [("loras[][name]", "12"), ("loras[][name]", "b"), ("loras[][strength]", "1"), ("loras[][strength]", "2")],
            {"loras": [{"name": "12", "strength": 1}, {"name": "b", "strength": 2}]},
        ),
        ([("prompt", "12"), ("n", "2"), ("user", "u"), ("seed", "null")], {"prompt": "12", "n": 2, "user": "u"}),
    ],
)
def test_the_fields_of_a_form_are_values(fields, values):
    assert values_of(fields) == values


@pytest.mark.parametrize(
    "fields",
    [
        [("loras[][name]", "a"), ("loras[][name]", "b"), ("loras[][strength]", "1")],
        [("loras[][name]", "a"), ("loras[name]", "b")],
        [("loras[]", "a"), ("loras[name]", "b")],
        [("outpaint[left]", "16"), ("outpaint[left]", "32")],
        [("outpaint[left]", "16"), ("outpaint", "left=16")],
        [("n", "1"), ("n", "2")],
    ],
)
def test_fields_of_a_form_that_do_not_fit_together_are_refused(fields):
    with pytest.raises(Refusal, match=r"do not fit together; send .* in JSON|given twice"):
        values_of(fields)


def basic(user: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def test_open_webui_generates_through_a1111s_api(server):
    """Its setting for the key is `user:password`. It verifies, lists and sets the model, then generates."""
    options = server.request("GET", "/sdapi/v1/options", headers=basic(f"any:{KEY}"))
    assert options.status == 200 and options.json["sd_model_checkpoint"] == "pocket"
    models = server.get("/sdapi/v1/sd-models")
    assert [(model["title"], model["model_name"]) for model in models] == [("pocket", "pocket")]
    back = {**options.json, "sd_model_checkpoint": models[0]["title"]}
    assert server.post("/sdapi/v1/options", back, **basic(f"any:{KEY}")).status == 200
    values = {"prompt": PROMPT, "batch_size": 2, "width": 64, "height": 64, "steps": 50, "negative_prompt": "blur"}
    answer = server.post("/sdapi/v1/txt2img", values, **basic(f"any:{KEY}"))
    assert answer.status == 200 and len(answer.json["images"]) == 2
    assert isinstance(answer.json["info"], str)
    assert answer.headers["X-MLX-ZImage-Adjusted"] == "steps 50 -> 8"


# ---- SillyTavern


def test_sillytavern_finds_the_lists_that_its_menus_show(server):
    assert server.request("GET", "/sdapi/v1/options", headers=basic(KEY)).status == 200, "its auth is one word"
    names = ("samplers", "schedulers", "upscalers", "latent-upscale-modes")
    samplers, schedulers, upscalers, latent = ([row["name"] for row in server.get(f"/sdapi/v1/{x}")] for x in names)
    assert (samplers, schedulers, upscalers, latent) == (["Euler"], ["simple"], ["None", "Lanczos"], [])
    assert [row["title"] for row in server.get("/sdapi/v1/sd-models")] == ["pocket"]
    assert server.get("/sdapi/v1/sd-vae") == server.get("/sdapi/v1/sd-modules") == []
    assert [(row["name"], row["path"]) for row in server.get("/sdapi/v1/loras")] == [("style", "style.safetensors")]


def test_sillytavern_sets_a_model_and_waits_until_it_is_loaded(server):
    assert server.post("/sdapi/v1/options", {"sd_model_checkpoint": "pocket"}).status == 200
    progress = server.get("/sdapi/v1/progress")
    assert progress["progress"] == 0.0 and progress["state"]["job_count"] == 0
    refused = server.post("/sdapi/v1/options", {"sd_model_checkpoint": "sdxl"})
    assert refused.status == 404 and "no model 'sdxl'" in refused.json["detail"]


def silly(**changes) -> dict:
    return {
        "url": "http://127.0.0.1:8796",
        "auth": KEY,
        "prompt": PROMPT,
        "negative_prompt": "lowres",
        "sampler_name": "Euler",
        "scheduler": "simple",
        "steps": 20,
        "cfg_scale": 7,
        "width": 64,
        "height": 64,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "None",
        "hr_scale": 1.5,
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
        **changes,
    }


def test_sillytavern_generates(server, alone):
    answer = server.post("/sdapi/v1/txt2img", silly(seed=4))
    assert answer.status == 200, answer.body
    assert same(opened(answer.json["images"][0]), alone(PROMPT, seed=4).images[0])
    assert answer.headers["X-MLX-ZImage-Adjusted"] == "steps 20 -> 8, cfg_scale 7 -> 1"
    random = [json.loads(server.post("/sdapi/v1/txt2img", silly(steps=1)).json["info"])["seed"] for _ in "ab"]
    assert random[0] != random[1], "without a seed"


def test_its_second_pass_enlarges_the_image(server):
    answer = server.post("/sdapi/v1/txt2img", silly(enable_hr=True, steps=4))
    assert opened(answer.json["images"][0]).size == (96, 96)


def test_a_lora_is_named_in_the_prompt_of_a1111(server, sdk):
    tagged = server.post("/sdapi/v1/txt2img", silly(seed=1, steps=2, prompt=f"{PROMPT} <lora:style:0.8>"))
    loras = [{"name": "style", "strength": 0.8}]
    named = sdk.images.generate(prompt=PROMPT, extra_body={"seed": 1, "steps": 2, "loras": loras})
    assert same(opened(tagged.json["images"][0]), opened(named.data[0].b64_json))
    assert "<lora" not in json.loads(tagged.json["info"])["prompt"]
    for strength in ("much", "nan", "1e9"):
        refused = server.post("/sdapi/v1/txt2img", silly(prompt=f"x <lora:style:{strength}>"))
        assert refused.status == 422 and "strength of LoRA" in refused.json["detail"]
    for name in ("../style", "/etc/passwd", "other"):
        refused = server.post("/sdapi/v1/txt2img", silly(prompt=f"x <lora:{name}:1>"))
        assert refused.status == 404 and "is served; expected style" in refused.json["detail"]


# ---- LibreChat


def test_librechat_parses_the_info_of_an_image(server):
    values = {"prompt": PROMPT, "negative_prompt": "blur", "cfg_scale": 4.5, "steps": 22, "width": 64, "height": 64}
    answer = server.post("/sdapi/v1/txt2img", values)
    info = json.loads(answer.json["info"])
    assert (info["width"], info["height"], info["steps"], info["cfg_scale"]) == (64, 64, 8, 1)
    assert isinstance(info["seed"], int) and info["all_seeds"] == [info["seed"]]
    assert info["infotexts"][0].splitlines()[-1].startswith("Steps: 8, Sampler: Euler")
    assert answer.headers["X-MLX-ZImage-Adjusted"] == "steps 22 -> 8, cfg_scale 4.5 -> 1"


def test_librechat_generates_with_openais_tool(sdk):
    """It names gpt-image-1, unless IMAGE_GEN_OAI_MODEL is set, and sends no response_format."""
    answer = sdk.images.generate(
        model="gpt-image-1", prompt=PROMPT, n=1, background="auto", output_format="webp", output_compression=100,
        quality="auto", size="auto",
    )  # fmt: skip
    assert opened(answer.data[0].b64_json).format == "WEBP"


def test_librechat_edits_with_openais_tool(server):
    fields = {"model": "gpt-image-1", "prompt": PROMPT, "quality": "auto", "size": "auto"}
    body, content_type = form(fields, [("image[]", png(Image.new("RGB", (48, 64), "white")))])
    answer = server.request("POST", "/v1/images/edits", body, {"Content-Type": content_type})
    assert opened(answer.json["data"][0]["b64_json"]).size == (48, 64)
    body, content_type = form(fields, 2 * [("image[]", png(Image.new("RGB", (48, 64), "white")))])
    refused = server.request("POST", "/v1/images/edits", body, {"Content-Type": content_type})
    assert refused.status == 400 and "expected one image" in refused.json["error"]["message"]


# ---- curl


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="curl or jq is not installed")
def test_the_pages_commands_for_curl_make_images(server, tmp_path):
    page = (Path(__file__).parents[1] / "examples/server.md").read_text()
    (commands,) = re.findall(r"```sh\n(curl \S+/v1/images/generations .*?)```", page, re.DOTALL)
    commands = commands.replace("http://127.0.0.1:8796", server.url).replace("1024x1024", "64x48")
    with_key = f'curl() {{ command curl -sS -H "Authorization: Bearer {KEY}" "$@"; }}\n'
    subprocess.run(["sh", "-eu", "-c", with_key + commands], cwd=tmp_path, check=True)
    assert [Image.open(tmp_path / name).size for name in ("lighthouse.png", "night.png")] == 2 * [(64, 48)]
    assert [read_origin(tmp_path / name).request.strength for name in ("lighthouse.png", "night.png")] == [None, 0.7]


# ---- image to image in A1111's API


def test_a1111s_mask_is_white_where_the_image_changes_unless_inverted(server):
    photo, mask = Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64), "black")
    mask.paste(255, (0, 0, 32, 64))
    images = {"init_images": [f"data:image/png;base64,{base64.b64encode(png(photo)).decode()}"]}
    images["mask"] = base64.b64encode(png(mask)).decode()
    for inverted, kept in ((0, slice(32, 64)), (1, slice(0, 32))):
        values = {**images, "prompt": PROMPT, "denoising_strength": 1, "inpainting_mask_invert": inverted, "seed": 2}
        answer = server.post("/sdapi/v1/img2img", values)
        assert answer.status == 200, answer.body
        pixels = np.asarray(opened(answer.json["images"][0]))
        assert (pixels[:, kept] == 255).all() and (pixels < 200).any()


def test_a1111_takes_strings_and_whole_floats_as_numbers(server):
    plain = {"width": 32, "height": 32, "steps": 2, "cfg_scale": 1, "seed": 3, "batch_size": 2, "n_iter": 1}
    others = ({name: str(value) for name, value in plain.items()}, {name: float(x) for name, x in plain.items()})
    made = [server.post("/sdapi/v1/txt2img", {"prompt": PROMPT, **values}) for values in (plain, *others)]
    assert [answer.status for answer in made] == [200] * 3
    assert made[0].json == made[1].json == made[2].json and len(made[0].json["images"]) == 2


def test_what_is_refused_is_logged_without_the_prompt(server):
    assert server.post("/sdapi/v1/txt2img", {"prompt": PROMPT, "width": 112.5}).status == 422
    log = server.log.read_text()
    assert "/sdapi/v1/txt2img: 400, width must be a whole number, got 112.5" in log and PROMPT not in log


@pytest.mark.parametrize(
    ("path", "values", "status", "message"),
    [
        ("txt2img", {"prompt": PROMPT, "steps": "many"}, 422, "steps must be a whole number, got 'many'"),
        ("txt2img", {"prompt": PROMPT, "width": 100}, 422, "nearest are 96 and 112"),
        ("txt2img", {"prompt": PROMPT, "batch_size": 4, "n_iter": 4}, 422, "from 1 to 10, got 16"),
        ("txt2img", {"prompt": PROMPT, "width": 8192, "height": 8192}, 422, "the largest size that fits"),
        ("img2img", {"prompt": PROMPT}, 422, "init_images must be a list of one image"),
        ("img2img", {"prompt": PROMPT, "init_images": ["/etc/passwd"]}, 422, "init_images must be an image in base64"),
        ("img2img", {"prompt": PROMPT, "init_images": ["AAAA"]}, 422, "the image is not an image that can be read"),
        ("txt2img", {"prompt": PROMPT, "width": "wide"}, 422, "width must be a whole number, got 'wide'"),
        ("txt2img", {"prompt": PROMPT, "width": 64.5}, 422, "width must be a whole number, got 64.5"),
        ("txt2img", {"prompt": PROMPT, "negative_prompt": 3}, 422, "the negative prompt must be text"),
        ("txt2img", {"prompt": PROMPT, "enable_hr": "yes"}, 422, "enable_hr must be true or false, got 'yes'"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_errors_have_a1111s_format(server, path, values, status, message):
    answer = server.post(f"/sdapi/v1/{path}", values)
    assert answer.status == status and message in answer.json["detail"]
    assert answer.json.keys() == {"error", "detail", "body", "errors"}
