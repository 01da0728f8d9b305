"""OpenAI's images API, as its SDKs, Open WebUI and LibreChat use it.

Fields that do not apply, such as quality and moderation, are accepted and ignored. Beyond OpenAI's, a request may have
those of a GenerateRequest under their own names (EXTENSIONS), `guidance` for guidance_scale, `control` for control
images, and `metadata`.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..images.metadata import FORMATS
from ..request import LORA_TAG
from ..untrusted import brief, parse_json
from .controls import check_controls, controls_of
from .errors import Refusal, openai_error
from .guard import MAX_BODY
from .messages import Accepted, Done, Image, Job, Model, Preview, Progress, Started
from .queue import Moved, Ticket
from .service import Service, accepted, flag, images_of, json_object, log_images, seeds_of

log = logging.getLogger(__name__)
ENDINGS = {kind.lower(): ending for ending, kind in FORMATS.items() if ending != ".jpeg"}  # by output_format
OPENAI_MODELS = re.compile(r"(gpt-image|chatgpt-image|dall-e)-[a-z0-9.-]{1,40}")  # LibreChat sends one by default
EXTENSIONS = (
    *("width", "height", "steps", "guidance_scale", "negative_prompt", "strength", "loras", "shift", "sigmas", "rng"),
    *("cfg_normalization", "cfg_truncation", "max_sequence_length", "sample_posterior"),
    *("mask_feather", "mask_grow", "mask_soft", "mask_resample", "outpaint", "upscale", "tile"),
)
# In a form, values are JSON except these, the last three of which are inside others.
TEXTS = ("prompt", "negative_prompt", "model", "size", "rng", "name", "image", "kind")
PART = re.compile(r"(loras|control|sigmas|outpaint)(\[\]|(?:\[\])?\[(\w{1,20})\])")  # see `joined`
MAX_PREVIEWS = 3
MAX_FIELDS, MAX_FILES = 100, 17  # of a form; a field may be as large as the body, since control images are in one


class OpenAI:
    """The routes under /v1."""

    def __init__(self, service: Service):
        self.service = service
        self.routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
            Route("/v1/images/results/{name}", self.result),
        ]

    async def models(self, request: Request) -> Response:
        models = [described(model) for model in self.service.queue.models]
        return JSONResponse({"object": "list", "data": models})

    async def model(self, request: Request) -> Response:
        return JSONResponse(described(self.service.model(request.path_params["name"])))

    async def generations(self, request: Request) -> Response:
        return await self.respond(request, await json_object(request), "image_generation")

    async def edits(self, request: Request) -> Response:
        values, files = await form_of(request)
        images = [file for name in ("image", "image[]") for file in files.get(name, [])]
        masks = files.get("mask", [])
        if len(images) != 1 or len(masks) > 1:
            raise Refusal(
                400, f"expected one image and at most one mask, but got {len(images)} and {len(masks)}", param="image"
            )
        return await self.respond(request, values, "image_edit", images[0], masks[0] if masks else None)

    async def result(self, request: Request) -> Response:
        name = request.path_params["name"]
        content = self.service.results.get(name)
        if content is None:
            raise Refusal(404, "there is no such image, or it is older than an hour")
        kind = FORMATS[name[name.rindex(".") :]].lower()
        return Response(content, media_type=f"image/{kind}", headers={"Cache-Control": "private"})

    async def respond(
        self, request: Request, values: dict[str, Any], kind: str, image: bytes | None = None, mask: bytes | None = None
    ) -> Response:
        """Generate what a request describes, and answer as it asks: with JSON, or with a stream of events."""
        named = values.get("model")
        known = isinstance(named, str) and OPENAI_MODELS.fullmatch(named)
        model = self.service.model(None if known else named)
        controls = await run_in_threadpool(controls_of, values["control"]) if "control" in values else ([], ())
        check_controls(controls, model)
        if "guidance" in values:
            values["guidance_scale"] = values["guidance"]
        headers = self.service.adjust(values, model, "guidance_scale", 0.0, bool(controls[0]))
        self.service.check_loras(values.get("loras"))
        wanted = Wanted(values, kind)
        job = Job(
            0, model.name, fields_of(values) | {"controls": controls[0]},
            seeds_of(values.get("seed"), values.get("n", 1)), image, mask, controls[1],
            "transparent", wanted.ending, wanted.quality, wanted.previews, wanted.metadata,
        )  # fmt: skip
        ticket = self.service.queue.submit(job)
        try:
            fits = await accepted(ticket, request)
            if wanted.stream:
                return Events(self.events(ticket, fits, wanted), ticket, headers)
            images = await images_of(ticket, request)
        except BaseException:
            ticket.close()
            raise
        log_images(kind, ticket)
        if len(images) < len(job.seeds):
            raise Refusal(409, "the request was interrupted")
        rows = [self.row(request, wanted, made) for made in images]
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": rows,
                "background": "opaque",
                "output_format": wanted.format,
                "size": f"{fits.width}x{fits.height}",
                "usage": usage(fits, image is not None, len(images)),
            },
            headers=headers,
        )

    def row(self, request: Request, wanted: Wanted, image: Image) -> dict[str, Any]:
        """One image of an answer: its content or its address, and its seed."""
        seed = {"seed": image.origin["request"]["seed"]}
        if not wanted.url:
            return {"b64_json": base64.b64encode(image.content).decode(), **seed}
        name = self.service.results.put(image.content, wanted.ending)
        return {"url": f"{request.base_url}v1/images/results/{name}", **seed}

    async def events(self, ticket: Ticket, fits: Accepted, wanted: Wanted) -> AsyncIterator[dict[str, Any]]:
        """The events of a streamed answer: previews, and each image with the usage; progress if it was asked for."""
        common = {
            "background": "opaque",
            "output_format": wanted.format,
            "quality": "auto",
            "size": f"{fits.width}x{fits.height}",
        }
        if wanted.progress:
            yield {"type": f"{wanted.kind}.progress", **progress(ticket, fits)}
        while not isinstance(message := await ticket.next(), Done):
            if isinstance(message, (Moved, Started, Progress)) and wanted.progress:
                yield {"type": f"{wanted.kind}.progress", **progress(ticket, message)}
            elif isinstance(message, (Preview, Image)):
                content = base64.b64encode(message.content).decode()
                event = {"b64_json": content, "created_at": int(time.time()), **common}
                if isinstance(message, Preview):
                    yield {"type": f"{wanted.kind}.partial_image", "partial_image_index": message.index, **event}
                else:
                    used = usage(fits, ticket.job.image is not None, 1)
                    made = {"seed": message.origin["request"]["seed"], "origin": message.origin}
                    yield {"type": f"{wanted.kind}.completed", "usage": used, **made, **event}
        log_images(wanted.kind, ticket)
        if message.cancelled:
            raise Refusal(409, "the request was interrupted")


class Wanted:
    """How a request wants its answer."""

    def __init__(self, values: dict[str, Any], kind: str):
        self.kind = kind
        self.format = values.get("output_format", "png")
        if not isinstance(self.format, str) or self.format not in ENDINGS:
            raise Refusal(
                400, f"output_format must be {' or '.join(ENDINGS)}, got {brief(self.format)}", param="output_format"
            )
        self.ending = ENDINGS[self.format]
        self.quality = whole(values, "output_compression", 95, 0, 100)
        self.stream = flag(values, "stream")
        self.progress = flag(values, "progress")
        self.metadata = flag(values, "metadata", True)
        self.previews = whole(values, "partial_images", 0, 0, MAX_PREVIEWS) if self.stream else 0
        self.url = values.get("response_format", "b64_json") == "url"
        if values.get("response_format", "b64_json") not in ("url", "b64_json"):
            given = brief(values["response_format"])
            raise Refusal(400, f"response_format must be b64_json or url, got {given}", param="response_format")


class Events(StreamingResponse):
    """Server-sent events. Leaves the queue when it ends, however it does; a Refusal becomes the last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], ticket: Ticket, headers: dict[str, str]):
        self.ticket = ticket
        super().__init__(self.encoded(events), headers={"Cache-Control": "no-store", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.close()

    async def encoded(self, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        try:
            async for event in events:
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        except Refusal as refusal:
            log.info("%s: %s", self.ticket.job.model, refusal.message)
            yield f"event: error\ndata: {json.dumps(openai_error(refusal))}\n\n"


def described(model: Model) -> dict[str, Any]:
    """A model in a list, with the defaults of a request, and whether it takes guidance and control images."""
    control = {"kinds": model.control_kinds, "scale": model.control_scale} if model.controlnet else None
    own: dict[str, Any] = {"size": model.size, "steps": model.steps, "guidance": model.guidance}
    own |= {"takes_guidance": model.takes_guidance, "control": control}
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "mlx-zimage", **own}


def progress(ticket: Ticket, message: object) -> dict[str, Any]:
    """Where a job is: jobs before it, steps done, and seconds until it has ended if they can be estimated."""
    done, steps = (message.done, message.steps) if isinstance(message, Progress) else (0, None)
    seconds = ticket.queue.estimate(ticket.position + 1)
    left = None if seconds is None else round(seconds, 1)
    return {"position": ticket.position, "step": done, "steps": steps, "estimated_seconds": left}


def usage(fits: Accepted, from_image: bool, images: int) -> dict[str, Any]:
    """OpenAI's count of tokens: of the prompt and the image read, and of the images generated (16x16 pixels each)."""
    each = fits.width * fits.height // 256
    read = each if from_image else 0
    details = {"image_tokens": read, "text_tokens": fits.tokens}
    total = fits.tokens + read + images * each
    return {
        "input_tokens": fits.tokens + read,
        "input_tokens_details": details,
        "output_tokens": images * each,
        "total_tokens": total,
    }


def fields_of(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a GenerateRequest in an OpenAI request; it checks them itself."""
    if "prompt" not in values:
        raise Refusal(400, "prompt is missing", param="prompt")
    fields = {name: values[name] for name in ("prompt", *EXTENSIONS) if name in values}
    for name in ("prompt", "negative_prompt"):
        if isinstance(fields.get(name), str) and (tag := LORA_TAG.search(fields[name])):
            use = {"name": tag[1], "strength": 0.8}
            message = f"{name} contains {brief(tag[0])}; leave it out, and use the loras field, as in {[use]}"
            raise Refusal(400, message, param=name)
    size = values.get("size", "auto")
    if size != "auto":
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size, re.ASCII) if isinstance(size, str) else None
        if not match:
            raise Refusal(400, f"size must be auto or pixels such as 1024x1024, got {brief(size)}", param="size")
        fields |= {"width": int(match[1]), "height": int(match[2])}
    return fields


def whole(values: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refusal(400, f"{name} must be a whole number from {low} to {high}, got {brief(value)}", param=name)
    return value


async def form_of(request: Request) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """The values and files of a form. Values that are not strings are read as JSON."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(400, "expected a form with the image, with Content-Type: multipart/form-data")
    fields: list[tuple[str, str]] = []
    files: dict[str, list[bytes]] = {}
    try:
        async with request.form(max_fields=MAX_FIELDS, max_files=MAX_FILES, max_part_size=MAX_BODY) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files.setdefault(name, []).append(await value.read())
                else:
                    fields.append((name, value))
    except HTTPException as error:
        raise Refusal(400, f"the form is damaged ({error.detail})") from None
    except (Refusal, ClientDisconnect):  # a Refusal of the body's size
        raise
    except Exception as error:  # whatever the parser raises on a damaged form
        raise Refusal(400, f"the form is damaged ({type(error).__name__})") from None
    return await run_in_threadpool(values_of, fields), files


def values_of(fields: list[tuple[str, str]]) -> dict[str, Any]:
    """The values in the fields of a form, by name."""
    values: dict[str, Any] = {}
    parts: dict[str, dict[str, list[Any]]] = {}
    for name, text in fields:
        part = PART.fullmatch(name)
        value: Any = text
        if (part[3] if part else name) not in TEXTS:
            with suppress(ValueError):  # what is not JSON is refused with the other values that are not numbers
                value = parse_json(text)
        if part:
            parts.setdefault(part[1], {}).setdefault(part[2], []).append(value)
        elif name in values:
            raise Refusal(400, f"{brief(name)} was given twice", param=name)
        else:
            values[name] = value
    for name, given in parts.items():
        if name in values:
            raise Refusal(400, f"{brief(name)} was given twice", param=name)
        values[name] = joined(name, given)
    return {name: value for name, value in values.items() if value is not None}


def joined(name: str, parts: dict[str, list[Any]]) -> Any:
    """A list or an object that OpenAI's SDK sends in parts: sigmas[], outpaint[left], loras[][name].

    parts has the values of each by the rest of its name.
    """
    if parts.keys() == {"[]"}:
        return parts["[]"]
    listed = {rest.startswith("[]") for rest in parts}
    if len(listed) == 1 and len({len(column) for column in parts.values()}) == 1:
        keys = [rest.removeprefix("[]")[1:-1] for rest in parts]
        rows = [dict(zip(keys, row, strict=True)) for row in zip(*parts.values(), strict=True)]
        if listed == {True}:
            return rows
        if len(rows) == 1:
            return rows[0]
    raise Refusal(400, f"the parts of {name} do not fit together; send {name} as one field, in JSON", param=name)
