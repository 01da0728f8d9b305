"""Generating on a server, `mlx-zimage serve`, instead of loading a model: `generate --server URL`."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ..drafts import Draft
from ..errors import ModelNotFoundError, RequestError, ZImageError
from ..images.codec import to_png
from ..images.metadata import FORMATS, Origin
from ..images.source import digest, read_image
from ..images.stream import ImageStream
from ..inputs import Inputs
from ..request import ARRAYS, MAX_SIZE, ControlUse, GenerateRequest
from ..sizes import counted
from ..untrusted import MAX_BYTES, brief, parse_json
from ..variants import repository_of
from .output import progress_bar, say
from .values import API_KEY

MAX_LINE = 257 * 2**20  # bytes of an event: MAX_SIZE x MAX_SIZE pixels, not compressed, take 256 MiB in base64
TIMEOUT_S = 3600  # between two events: a large image's step, or others' images
TRIES = 10  # while the server's queue is full
RETRY_S, MOST_S = 5, 600  # between them if the server does not say, and at most
LOCAL = (  # options of `generate` that only a model in this process takes
    *("variant", "transformer", "text_encoder", "vae", "dtype", "memory", "keep", "wired", "yes"),
    *("latents_file", "lora_partial", "control_model", "control_kind", "preview", "preview_dir"),
)
DEFAULTS = {field.name: field.default for field in fields(GenerateRequest)}
# Fields that are not sent under their own names.
SENT_OTHERWISE = {*ARRAYS, "loras", "num_images", "controls", "controlnet"}


class Remote:
    """A server at a URL, and the model there that generates: the named one, or its first."""

    def __init__(self, url: str, model: str | None, given: Mapping[str, str]):
        """given has the options of the command line by the names of their values."""
        try:
            parts = urlsplit(url)
            host = parts.hostname if parts.scheme in ("http", "https") else None
        except ValueError:  # half an IPv6 address, for example
            host = None
        if not host:
            raise RequestError(f"--server takes a URL such as http://127.0.0.1:8796, got {brief(url)}")
        for name in LOCAL:
            if name in given:
                raise RequestError(f"{given[name]} cannot be used with --server, which has its own model; leave it out")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.url = url
        self._connect = lambda: kind(parts.netloc, timeout=TIMEOUT_S)
        with closing(self._send("GET", "/v1/models")) as answer, self._understood():
            models = [_model(entry) for entry in parse_json(_whole(answer))["data"]]
        named = [entry for entry in models if model is None or repository_of(model) == repository_of(entry["id"])]
        if not named:
            known = ", ".join(entry["id"] for entry in models)
            raise ModelNotFoundError(f"{url} does not serve the model {brief(model)}; it has {known}")
        self.model: dict[str, Any] = named[0]

    def request(self, draft: Draft) -> GenerateRequest:
        """A draft's request; a ratio becomes a size for the server's model."""
        request = draft.request(self.model["size"])
        if request.num_images > 1:
            raise RequestError(f"num_images must be 1 with --server, got {request.num_images}; use count")
        return request

    def generate(
        self, request: GenerateRequest, ending: str, inputs: Inputs, metadata: bool, quiet: bool
    ) -> tuple[bytes, Origin]:
        """One image as a file with a suffix such as ".png", and its origin; shows the progress."""
        own = {name: value for name, value in request.to_dict().items() if value != DEFAULTS[name]}
        own = {name: value for name, value in own.items() if name not in SENT_OTHERWISE}
        values = own | {"model": self.model["id"], "output_format": FORMATS[ending.lower()].lower()}
        values |= {"metadata": metadata, "stream": True, "progress": True}
        if request.loras is not None:
            values["loras"] = [{"name": use.name, "strength": use.strength} for use in request.loras]
        if request.controls:
            values["control"] = control_of(request.controls, inputs)
        if inputs.source is None:
            body, kind = json.dumps(values).encode(), "application/json"
            path = "/v1/images/generations"
        else:
            body, kind = form(values, {name: to_png(np.asarray(image)) for name, image in images_of(inputs).items()})
            path = "/v1/images/edits"
        with closing(self._send("POST", path, body, {"Content-Type": kind}, quiet)) as answer, self._understood():
            content, origin = self._received(answer, quiet)
            stream = ImageStream(content, "the image", len(content))
            with Image.open(stream, formats=[FORMATS[ending.lower()]]) as image:
                stream.opened(image)
                image.verify()
        made = origin.request.to_dict()
        for name, value in own.items():
            if made[name] != value:
                other = brief(made[name])
                warnings.warn(f"{self.url} generated with {name} {other} instead of {brief(value)}", stacklevel=2)
        return content, origin

    def _received(self, answer: http.client.HTTPResponse, quiet: bool) -> tuple[bytes, Origin]:
        with progress_bar(quiet, desc="Waiting", total=1, unit="step", leave=True) as bar:
            while line := answer.readline(MAX_LINE):
                event: dict[str, Any] = parse_json(line[6:]) if line.startswith(b"data: ") else {"type": ""}
                if "error" in event:
                    raise ZImageError(f"{self.url}: {event['error']['message']}")
                if event["type"].endswith(".progress"):
                    before, step, steps = (_count(event[name] or 0) for name in ("position", "step", "steps"))
                    bar.set_description(f"Waiting for {counted(before, 'other request')}" if before else "Denoising")
                    bar.total = steps or bar.total
                    bar.update(step - bar.n)
                elif event["type"].endswith(".completed"):
                    return base64.b64decode(event["b64_json"]), Origin.from_json(json.dumps(event["origin"]))
        raise ZImageError(f"{self.url} closed the connection before the image was finished; its log says why")

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Turn whatever reading an answer raises into a ZImageError: the server may be another program."""
        try:
            yield
        except (ZImageError, MemoryError) as error:
            if isinstance(error, RequestError):  # about an origin; the request itself was checked before
                raise ZImageError(f"{self.url} did not answer as `mlx-zimage serve` does ({error})") from error
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise ZImageError(
                f"{self.url} did not answer as `mlx-zimage serve` does, or its answer was cut off ({why})"
            ) from error

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        quiet: bool = True,
    ) -> http.client.HTTPResponse:
        """The server's answer to a request; what it refuses is an error here, too. The caller must close it.

        While its queue is full, the request is sent again when the server says to, up to TRIES times in all.
        """
        for left in reversed(range(TRIES)):
            answer = self._answer(method, path, body, headers or {})
            if answer.status != 429 or not left:
                break
            answer.close()
            after = answer.headers.get("Retry-After", "")
            wait = min(int(after), MOST_S) if re.fullmatch(r"[0-9]{1,9}", after) else RETRY_S
            say(f"The server's queue is full; trying again in {wait} s", quiet)
            time.sleep(wait)
        if answer.status == 200:
            return answer
        with closing(answer):
            try:
                message = str(parse_json(_whole(answer))["error"]["message"])
            except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException):
                message = f"expected an answer from `mlx-zimage serve` but got {answer.status} {answer.reason}"
        if answer.status == 401:
            message += f"; set {API_KEY} to the server's key"
        kind = RequestError if answer.status in (400, 404, 413, 422) else ZImageError
        raise kind(f"{self.url}: {message}")

    def _answer(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        """The server's answer to a request sent once, whatever it is."""
        key = os.environ.get(API_KEY)
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            connection = self._connect()
            connection.request(method, path, body, {"Connection": "close", **authorization, **headers})
            return connection.getresponse()
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
        ) as error:  # ValueError: a key that no header may contain
            raise ZImageError(f"no server answers at {self.url} ({error}); `mlx-zimage serve` starts one") from error


def _whole(answer: http.client.HTTPResponse) -> bytes:
    content = answer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    return content


def _model(entry: Any) -> dict[str, Any]:
    """A model in a server's list, checked."""
    if not isinstance(entry["id"], str) or not 0 < _count(entry["size"]) <= MAX_SIZE:
        raise ValueError(f"expected a model's id and size but got {brief(entry)}")
    return entry


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a count but got {brief(value)}")
    return value


def images_of(inputs: Inputs) -> dict[str, Image.Image]:
    """The image, and the mask as OpenAI's API has it: transparent where the image changes."""
    assert inputs.source is not None
    if inputs.mask is None:
        return {"image": inputs.source}
    mask = Image.new("RGBA", inputs.mask.size)
    mask.putalpha(inputs.mask.point(lambda value: 255 - value))
    return {"image": inputs.source, "mask": mask}


def control_of(controls: Sequence[ControlUse], inputs: Inputs) -> list[dict[str, Any]]:
    """The field `control` of a request to the server."""
    read = [read_image(image) for image in inputs.control_images]
    shown = {digest(image): base64.b64encode(to_png(np.asarray(image))).decode() for image in read}
    return [
        {
            "image": use.image and shown[use.image],
            "kind": use.prepare,
            "scale": use.scale,
            "start": use.start,
            "end": use.end,
        }
        for use in controls
    ]


def form(values: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """A multipart body and its content type. Strings are sent as they are, everything else as JSON."""
    boundary = secrets.token_hex(16)
    parts = [
        (f'name="{name}"', value.encode() if isinstance(value, str) else json.dumps(value).encode())
        for name, value in values.items()
    ]
    parts += [(f'name="{name}"; filename="{name}.png"', content) for name, content in files.items()]
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
        for head, content in parts
    )
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
