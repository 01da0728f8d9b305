"""A server in a process of its own, for tests, and requests to it as clients without an SDK send them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

KEY = "only-for-tests"
PROMPT = "a red circle on a blue background"


class Answer:
    """What the server answered: status, headers, body."""

    def __init__(self, response: http.client.HTTPResponse):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """`mlx-zimage serve`, until stop."""

    def __init__(self, *options: object, log: Path, key: str | None = KEY, **environment: str):
        self.log, self.key = log, key
        environment = {**os.environ, **({"MLX_ZIMAGE_API_KEY": key} if key else {}), **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_zimage", "serve", "--port", "0", *map(str, options)],
            stdout=subprocess.PIPE, stderr=log.open("w"), stdin=subprocess.DEVNULL, env=environment, text=True,
        )  # fmt: skip
        self.url = self.process.stdout.readline().strip()
        assert self.url, log.read_text()
        self.host = self.url.removeprefix("http://")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, timeout=60)

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None):
        """A connection on which a request was sent, with the key unless an Authorization is given."""
        connection = self.connect()
        authorization = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        connection.request(method, path, body, authorization | (headers or {}))
        return connection

    def request(self, *args: Any, **options: Any) -> Answer:
        connection = self.send(*args, **options)
        try:
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        answer = self.request("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    def post(self, path: str, values: object, **headers: str) -> Answer:
        given = {"Content-Type": "application/json", **headers}
        return self.request("POST", path, json.dumps(values).encode(), given)

    def begin(self, path: str, values: object) -> http.client.HTTPConnection:
        """Send a JSON request without waiting for its answer."""
        return self.send("POST", path, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def health(self) -> dict:
        return self.get("/health")

    def until(self, holds: Callable[[dict], bool], seconds: float = 60) -> dict:
        """Wait until /health is as expected."""
        end = time.monotonic() + seconds
        while not holds(health := self.health()):
            assert time.monotonic() < end, health
            time.sleep(0.02)
        return health

    @property
    def worker(self) -> int:
        """The process id of its worker."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        assert len(found) == 1, found
        return int(found[0])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


@contextmanager
def serving(*options: object, log: Path, key: str | None = KEY, **environment: str) -> Iterator[Server]:
    server = Server(*options, log=log, key=key, **environment)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(20)


@contextmanager
def answering(server: HTTPServer) -> Iterator[str]:
    """Let a server of this process answer in a thread of its own, until the end; yields its URL."""
    # by default it checks only every half second whether to stop
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def opened(content: str | bytes) -> Image.Image:
    """An image from the content of its file, or from base64."""
    return Image.open(io.BytesIO(base64.b64decode(content) if isinstance(content, str) else content))


def form(fields: dict[str, str], files: list[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart body as aiohttp and axios write it, and its content type."""
    boundary = "c0ffee"
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    for name, content in files:
        head = f'Content-Disposition: form-data; name="{name}"; filename="photo.png"\r\nContent-Type: image/png\r\n\r\n'
        parts.append(head.encode() + content)
    body = b"".join(f"--{boundary}\r\n".encode() + part + b"\r\n" for part in parts) + f"--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"
