"""The part of AUTOMATIC1111's API that its clients use: Open WebUI, SillyTavern and LibreChat.

Fields that do not apply, such as sampler_name and restore_faces, are accepted and ignored. `cfg_scale` 1 is off, as in
A1111. LoRAs are named in the prompt, as in <lora:name:0.8>, and come from the server's folder only. Control images are
those of its ControlNet extension.
"""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from math import prod
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import RequestError
from ..images.metadata import origin_in, parameters
from ..request import LORA_TAG
from ..untrusted import brief, parse_json
from ..version import __version__
from .controls import check_controls, units_of
from .errors import Refusal
from .loras import lora_files
from .messages import Image, Job
from .service import Service, accepted, decoded, flag, images_of, json_object, log_images, seeds_of

SAMPLER, SCHEDULER = "Euler", "Simple"
MASK_BLUR = 4  # pixels, as in A1111
NUMBERS = (
    *("width", "height", "steps", "seed", "batch_size", "n_iter", "mask_blur", "inpainting_mask_invert"),
    *("cfg_scale", "denoising_strength", "hr_scale"),
)


class A1111:
    """The routes under /sdapi/v1 and /controlnet."""

    def __init__(self, service: Service):
        self.service = service
        self.chosen = ""  # the model that POST options chose
        self.jobs: set[int] = set()  # those of this API, which `interrupt` may stop
        lists = {
            "sd-models": self.models,
            "samplers": lambda: [{"name": SAMPLER, "aliases": ["euler"], "options": {}}],
            "schedulers": lambda: [{"name": SCHEDULER.lower(), "label": SCHEDULER, "aliases": None}],
            "upscalers": lambda: [{"name": name, "scale": 4} for name in ("None", "Lanczos")],
            "latent-upscale-modes": lambda: [],
            "sd-vae": lambda: [],
            "sd-modules": lambda: [],
            "loras": self.loras,
            "options": self.options,
            "progress": self.progress,
        }
        self.routes = [Route(f"/sdapi/v1/{name}", self.answering(list)) for name, list in lists.items()]
        self.routes += [
            Route("/controlnet/model_list", self.answering(lambda: {"model_list": self.controlnets()})),
            Route("/controlnet/module_list", self.answering(lambda: {"module_list": ["none", *self.modules()]})),
        ]
        for name, endpoint in (
            ("options", self.set_options),
            ("txt2img", self.txt2img),
            ("img2img", self.img2img),
            ("interrupt", self.interrupt),
            ("png-info", self.png_info),
        ):
            self.routes.append(Route(f"/sdapi/v1/{name}", endpoint, methods=["POST"]))

    @staticmethod
    def answering(values: Any) -> Any:
        async def endpoint(request: Request) -> Response:
            return JSONResponse(values())

        return endpoint

    # ---- lists

    def models(self) -> list[dict[str, Any]]:
        return [
            {
                "title": model.name,
                "model_name": model.name,
                "hash": model.fingerprint[:10],
                "sha256": None,
                "filename": model.name,
                "config": None,
            }
            for model in self.service.queue.models
        ]

    def loras(self) -> list[dict[str, Any]]:
        files = lora_files(self.service.lora_dir)
        return [{"name": name, "alias": name, "path": file.name, "metadata": {}} for name, file in files.items()]

    def controlnets(self) -> list[str]:
        return sorted({model.controlnet for model in self.service.queue.models if model.controlnet})

    def modules(self) -> list[str]:
        return list(dict.fromkeys(kind for model in self.service.queue.models for kind in model.control_kinds))

    def options(self) -> dict[str, Any]:
        return {
            "sd_model_checkpoint": self.service.model(self.chosen).name,
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "samples_format": "png",
        }

    def progress(self) -> dict[str, Any]:
        queue = self.service.queue
        ticket = queue.tickets.get(queue.running or 0)
        steps = ticket.accepted.steps if ticket and ticket.accepted else 0
        part = ticket.progress if ticket else 0.0
        state = {
            "skipped": False,
            "interrupted": False,
            "job": "txt2img" if ticket else "",
            "job_count": len(queue.tickets),
            "job_no": 0,
            "job_timestamp": "0",
            "sampling_step": round(part * steps),
            "sampling_steps": steps,
        }
        eta = queue.estimate() or 0.0
        return {"progress": part, "eta_relative": eta, "state": state, "current_image": None, "textinfo": None}

    async def set_options(self, request: Request) -> Response:
        """Choose the model for the requests that follow; other options are ignored."""
        values = await json_object(request)
        if "sd_model_checkpoint" in values:
            self.chosen = self.service.model(values["sd_model_checkpoint"]).name
        return JSONResponse(None)

    # ---- images

    async def txt2img(self, request: Request) -> Response:
        values = with_numbers(await json_object(request))
        if flag(values, "enable_hr"):
            values["upscale"] = values.get("hr_scale", 2.0)
        else:
            values.pop("denoising_strength", None)
        return await self.respond(request, values)

    async def img2img(self, request: Request) -> Response:
        values = with_numbers(await json_object(request))
        given = values.get("init_images")
        if not isinstance(given, list) or len(given) != 1:
            raise Refusal(400, "init_images must be a list of one image in base64")
        image = await run_in_threadpool(decoded, given[0], "init_images")
        mask = values.get("mask")
        mask = None if mask is None else await run_in_threadpool(decoded, mask, "mask")
        values.setdefault("denoising_strength", 0.75)
        if mask is not None:
            values.setdefault("mask_blur", MASK_BLUR)
        return await self.respond(request, values, image, mask)

    async def png_info(self, request: Request) -> Response:
        """How an image was generated by this program: A1111's text for it and, as `origin`, all that it stores."""
        values = await json_object(request)
        content = await run_in_threadpool(decoded, values.get("image"), "image")
        try:
            origin = await run_in_threadpool(origin_in, content, "the image")
        except RequestError as error:
            raise Refusal(400, str(error), param="image") from None
        text = parameters(origin)
        stored = json.loads(origin.to_json())
        return JSONResponse({"info": text, "items": {"parameters": text}, "origin": stored})

    async def interrupt(self, request: Request) -> Response:
        """Stop the running job if it came through this API: other clients would not know why theirs ended."""
        queue = self.service.queue
        if queue.running in self.jobs:
            queue.interrupt()
        return JSONResponse({})

    async def respond(
        self, request: Request, values: dict[str, Any], image: bytes | None = None, mask: bytes | None = None
    ) -> Response:
        overrides = values.get("override_settings")
        overrides = overrides if isinstance(overrides, dict) else {}
        model = self.service.model(overrides.get("sd_model_checkpoint") or self.chosen)
        scripts = values.get("alwayson_scripts")
        controls = await run_in_threadpool(units_of, scripts, image) if scripts else ([], ())
        check_controls(controls, model)
        headers = self.service.adjust(values, model, "cfg_scale", 1.0, bool(controls[0]))
        fields = fields_of(values, image is not None, mask is not None) | {"controls": controls[0]}
        self.service.check_loras(fields["loras"])
        seed = values.get("seed")
        count = count_of(values)
        inverted = values.get("inpainting_mask_invert", 0)
        if inverted not in (0, 1):
            raise Refusal(400, f"inpainting_mask_invert must be 0 or 1, got {brief(inverted)}")
        marks = "black" if inverted else "white"
        shown = flag(values, "send_images", True)
        job = Job(0, model.name, fields, seeds_of(None if seed == -1 else seed, count), image, mask, controls[1], marks)
        with self.service.queue.submit(job) as ticket:
            self.jobs.add(ticket.job.id)
            try:
                await accepted(ticket, request)
                images = await images_of(ticket, request)
            finally:
                self.jobs.discard(ticket.job.id)
        log_images("img2img" if image else "txt2img", ticket)
        if not images:
            raise Refusal(409, "the request was interrupted")
        sent = images if shown else []
        body = {
            "images": [base64.b64encode(made.content).decode() for made in sent],
            "parameters": fields,
            "info": json.dumps(info(images)),
        }
        return JSONResponse(body, headers=headers)


def fields_of(values: dict[str, Any], from_image: bool, masked: bool) -> dict[str, Any]:
    """The fields of a GenerateRequest; it checks them itself."""
    prompt, loras = without_tags(values.get("prompt", ""))
    fields: dict[str, Any] = {"prompt": prompt, "loras": loras}
    negative = values.get("negative_prompt", "")
    fields["negative_prompt"] = LORA_TAG.sub("", negative) if isinstance(negative, str) else negative
    fields |= {name: values[name] for name in ("width", "height", "steps", "upscale") if name in values}
    if "denoising_strength" in values and (from_image or "upscale" in values):
        fields["strength"] = values["denoising_strength"]
    if masked:
        fields["mask_feather"] = values["mask_blur"]
    if "cfg_scale" in values:
        scale = values["cfg_scale"]
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise Refusal(400, f"cfg_scale must be a number, got {brief(scale)}", param="cfg_scale")
        fields["guidance_scale"] = max(scale - 1, 0)
    return fields


def without_tags(prompt: object) -> tuple[Any, list[dict[str, Any]]]:
    """A prompt without its <lora:name:strength>, and the LoRAs that these name."""
    if not isinstance(prompt, str):
        return prompt, []
    strengths: dict[str, float] = {}
    for name, strength in LORA_TAG.findall(prompt):
        try:
            strengths[name] = float(strength or 1)
        except ValueError:
            raise Refusal(400, f"the strength of LoRA {brief(name)} must be a number, got {brief(strength)}") from None
    return LORA_TAG.sub("", prompt).strip(), [{"name": name, "strength": value} for name, value in strengths.items()]


def with_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """A request with strings such as "512", and 512.0, as whole numbers: A1111 accepts these, too."""
    for name in values.keys() & {*NUMBERS}:
        if isinstance(values[name], str):
            with suppress(ValueError):
                values[name] = parse_json(values[name])
        if isinstance(values[name], float) and values[name].is_integer():
            values[name] = int(values[name])
    return values


def count_of(values: dict[str, Any]) -> object:
    """The number of images, or what is wrong with it."""
    counts = [values.get(name, 1) for name in ("batch_size", "n_iter")]
    wrong = [count for count in counts if type(count) is not int or count < 1]
    return wrong[0] if wrong else prod(counts)


def info(images: list[Image]) -> dict[str, Any]:
    """How images were generated, in the words of A1111; its clients parse it from a string."""
    request = images[0].origin["request"]
    seeds = [image.origin["request"]["seed"] for image in images]
    texts = [image.parameters for image in images]
    return {
        "prompt": request["prompt"],
        "all_prompts": [request["prompt"]] * len(images),
        "negative_prompt": request["negative_prompt"],
        "all_negative_prompts": [request["negative_prompt"]] * len(images),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": request["width"],
        "height": request["height"],
        "sampler_name": SAMPLER,
        "cfg_scale": request["guidance_scale"] + 1,
        "steps": request["steps"],
        "batch_size": len(images),
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": images[0].origin["model"],
        "sd_model_hash": images[0].origin["fingerprint"][:10],
        "denoising_strength": request["strength"],
        "extra_generation_params": {"Schedule type": SCHEDULER},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "clip_skip": 1,
        "is_using_inpainting_conditioning": request["mask_image"] is not None,
        "version": f"mlx-zimage {__version__}",
    }
