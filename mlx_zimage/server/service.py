"""What the APIs share: models by name, the policy for Turbo, LoRAs by name, and waiting for a job."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from ..request import MAX_SEED
from ..sizes import counted
from ..untrusted import brief, parse_json
from ..variants import MOST_TURBO_STEPS, repository_of
from .errors import ADJUSTED, Refusal
from .loras import lora_files
from .messages import Accepted, Done, Image, Model
from .queue import Queue, Ticket
from .results import Results

log = logging.getLogger(__name__)
MAX_IMAGES = 10  # per request, as in OpenAI's API
SHORT = 2**16  # bytes of JSON that take less time to parse than another thread takes to start


@dataclass
class Service:
    """The queue and results, and what the user decided when starting the server."""

    queue: Queue
    lora_dir: Path | None = None
    honor_client_steps: bool = False
    results: Results = field(default_factory=Results)

    def model(self, name: object) -> Model:
        """The model with this name, alias or id; the first one if no name is given."""
        if name is None or name == "":
            return self.queue.models[0]
        if isinstance(name, str):
            for model in self.queue.models:
                if repository_of(name) == repository_of(model.name):
                    return model
        known = ", ".join(model.name for model in self.queue.models)
        raise Refusal(404, f"no model {brief(name)} is served; expected {known}", param="model", code="model_not_found")

    def adjust(self, values: dict, model: Model, guidance: str, off: float, controlled: bool = False) -> dict[str, str]:
        """Replace a number of steps above what Turbo is made for, and guidance, which it is made to run without; `off`
        is the value that turns guidance off.

        A ControlNet may need more steps. Returns the headers that report what was changed.
        """
        if self.honor_client_steps or model.takes_guidance:
            return {}
        changes = []
        steps = (model.control_steps if controlled else None) or model.steps
        for name, most, own in (("steps", max(MOST_TURBO_STEPS, steps), steps), (guidance, off, off)):
            given = values.get(name)
            if isinstance(given, (int, float)) and not isinstance(given, bool) and given > most:
                values[name] = own
                changes.append(f"{name} {brief(given)} -> {own:g}")
        if not changes:
            return {}
        log.info("adjusted for %s: %s (--honor-client-steps turns this off)", model.name, ", ".join(changes))
        return {ADJUSTED: ", ".join(changes)}

    def check_loras(self, uses: object) -> None:
        """Refuse LoRAs that are not in the server's folder. The rest is checked with the request."""
        known = lora_files(self.lora_dir)
        for use in uses if isinstance(uses, (list, tuple)) else ():
            name = use.get("name") if isinstance(use, dict) else None
            if isinstance(name, str) and name not in known:
                listed = f"expected {', '.join(known)}" if known else "--lora-dir names a folder of LoRAs"
                raise Refusal(404, f"no LoRA {brief(name)} is served; {listed}", param="loras")


def seeds_of(seed: object, count: object) -> tuple[int, ...]:
    """The seeds of `count` images: the given one and those that follow it, or a random one."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_IMAGES:
        raise Refusal(400, f"the number of images must be from 1 to {MAX_IMAGES}, got {brief(count)}", param="n")
    if seed is None:
        seed = secrets.randbits(32)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED - count + 1:
        raise Refusal(400, f"seed must be a whole number from 0 to 2**64 - {count}, got {brief(seed)}", param="seed")
    return tuple(range(seed, seed + count))


def flag(values: dict[str, Any], name: str, default: bool = False) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"{name} must be true or false, got {brief(value)}", param=name)
    return value


def decoded(text: object, name: str) -> bytes:
    """The bytes of an image in base64, which may be a data: URL."""
    if not isinstance(text, str):
        raise Refusal(400, f"{name} must be an image in base64, got {brief(text)}", param=name)
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{name} must be an image in base64; got {brief(text)}", param=name) from None


async def json_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(400, "expected a JSON object, with Content-Type: application/json")
    body = await request.body()
    try:
        values = parse_json(body) if len(body) < SHORT else await run_in_threadpool(parse_json, body)
    except ValueError as error:
        raise Refusal(400, f"the body is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise Refusal(400, f"the body must be a JSON object, got {type(values).__name__}")
    return {name: value for name, value in values.items() if value is not None}


async def accepted(ticket: Ticket, request: Request) -> Accepted:
    """Wait until a job has been accepted, for as long as its client is connected."""
    return await _while_connected(ticket.fits(), request)


async def images_of(ticket: Ticket, request: Request) -> list[Image]:
    """Wait for all images of a job while its client is connected; fewer than asked for if it was interrupted."""

    async def collected() -> list[Image]:
        images = []
        while not isinstance(message := await ticket.next(), Done):
            if isinstance(message, Image):
                images.append(message)
        return images

    return await _while_connected(collected(), request)


async def _while_connected(work: Any, request: Request) -> Any:
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # one may have failed while it was cancelled


def log_images(api: str, ticket: Ticket) -> None:
    """Log what was generated, without the prompt."""
    now, fits, count = ticket.queue.loop.time(), ticket.accepted, len(ticket.job.seeds)
    waited = (ticket.started or now) - ticket.arrived
    size = f"{fits.width}x{fits.height}, {counted(fits.steps, 'step')}" if fits else ""
    images = counted(count, "image")
    took = f"{now - ticket.arrived:.1f} s, including {waited:.1f} s in the queue"
    log.info("%s: %s, %s, %s in %s", api, ticket.job.model, images, size, took)
