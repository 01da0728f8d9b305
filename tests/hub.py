"""A local server that implements enough of the Hugging Face protocol for downloads and uploads, and a user of it."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_zimage import cli

COMMIT = "c" * 40
HEADER_BYTES = 100_001  # what is asked for to see the header of a safetensors file
HEADER_RANGE = f"bytes=0-{HEADER_BYTES - 1}"
GENERATE = ["generate", "a red circle", "--steps", "1", "--width", "32", "--height", "32", "--seed", "1"]
PROGRAM = "from mlx_zimage.cli import main; main()"


@cache
def digest(file: Path, algorithm: str, changed: int) -> str:
    """Computed once for each version of a file: a listing has the digests of all files, and each answer has that of its
    file."""
    return hashlib.new(algorithm, file.read_bytes()).hexdigest()


class Hub:
    """Serves a folder as the repository `name`; `serve` adds others.

    token: required from clients, if set. cut: path -> number of bytes after which the connection is dropped, once, when
    more are requested. held: paths of which only half is sent until the server exits, except for the header. listed:
    SHA-256 by file name, to list instead of the true one. seen: (method, path, Range) of every request. sent: number of
    bytes sent, by path. received: uploaded contents, by path.
    """

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.repositories: dict[str, dict[str, Path]] = {}
        self.listed: dict[str, str] = {}
        self.serve(folder)
        self.token: str | None = None
        self.cut: dict[str, int] = {}
        self.held: set[str] = set()
        self.closing = threading.Event()
        self.seen: list[tuple[str, str, str | None]] = []
        self.sent: dict[str, int] = {}
        self.received: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for the client to acknowledge its head

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        # by default it checks only every half second whether to stop
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, folder: Path, name: str | None = None) -> None:
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.repositories[name or self.name] = files

    @property
    def files(self) -> dict[str, Path]:
        return self.repositories[self.name]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.seen.append((request.command, path, request.headers.get("Range")))
        asked = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(/.*)?", path)
        files = self.repositories.get(asked[1], {}) if asked else {}
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            self.send(request, 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif request.command == "POST":
            self.receive(request, path)
        elif path == "/api/whoami-v2":
            self.send_json(request, {"type": "user", "name": "me"})
        elif files and path.startswith("/api/") and re.fullmatch(r"(/revision/[\w.]+)?", asked[2] or ""):
            listed = [self.entry(name, file) for name, file in files.items()]
            self.send_json(request, {"id": asked[1], "sha": COMMIT, "siblings": listed})
        elif files and path.startswith("/api/") and asked[2] == f"/tree/{COMMIT}":
            sizes = {name: file.stat().st_size for name, file in files.items()}
            listed = [{"type": "file", "path": name, "oid": "0" * 40, "size": size} for name, size in sizes.items()]
            self.send_json(request, listed)
        elif (found := re.fullmatch(r"/resolve/[\w.]+/(.+)", (asked and asked[2]) or "")) and found[1] in files:
            self.send_file(request, found[1], files[found[1]])
        else:
            self.send(request, 404, {"X-Error-Code": "RepoNotFound"})

    def receive(self, request, path: str) -> None:
        """One request of an upload: create the repository, announce the files, send them all in one commit."""
        body = request.rfile.read(int(request.headers["Content-Length"]))
        if path == "/api/repos/create":
            self.send_json(request, {"url": f"{self.endpoint}/{self.name}"})
        elif path == "/api/validate-yaml":
            self.send_json(request, {"errors": [], "warnings": []})
        elif path == f"/api/models/{self.name}/preupload/main":
            announced = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in announced]
            self.send_json(request, {"files": modes})
        elif path == f"/api/models/{self.name}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.send_json(request, {"commitUrl": f"{self.endpoint}/{self.name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.send(request, 404, {})

    def entry(self, name: str, file: Path) -> dict:
        """A file in a listing; weights as the hub's large files, with their SHA-256."""
        size = file.stat().st_size
        large = {"lfs": {"sha256": self.sha256(file), "size": size, "pointerSize": 100}}
        return {"rfilename": name, "size": size, **(large if self.is_large(name) else {})}

    def is_large(self, name: str) -> bool:
        return name.endswith(".safetensors")

    def sha(self, file: Path) -> str:
        return digest(file, "sha1", file.stat().st_mtime_ns)

    def sha256(self, file: Path) -> str:
        return self.listed.get(file.name) or digest(file, "sha256", file.stat().st_mtime_ns)

    def send_file(self, request, name: str, file: Path) -> None:
        content = file.read_bytes()
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "bytes=0-")).groups()
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        tag = self.sha256(file) if self.is_large(name) else self.sha(file)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        partial = stop - start < len(content)
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if request.command == "GET":
            self.sent[name] = self.sent.get(name, 0) + stop - start
        self.send(
            request,
            206 if partial else 200,
            headers,
            content[start:stop],
            self.cut.pop(name) if request.command == "GET" and stop - start > self.cut.get(name, stop) else None,
            name in self.held and request.headers.get("Range") != HEADER_RANGE,
        )

    def send_json(self, request, value) -> None:
        self.send(request, 200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, request, status: int, headers: dict, content: bytes = b"", cut: int | None = None, held=False):
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            if held:
                request.close_connection = True  # the client may be gone; read nothing more from it
                with suppress(OSError):
                    request.wfile.write(content[: len(content) // 2])
                self.closing.wait()
                return
            request.wfile.write(content[:cut])
            if cut is not None:
                request.wfile.flush()
                request.connection.close()
                request.close_connection = True


class User:
    """Runs mlx-zimage with a home, a working folder and caches of its own, and downloads from a Hub."""

    def __init__(self, folder: Path, hub: Hub):
        self.hub = hub
        self.work = folder / "work"
        self.work.mkdir()
        self.home = folder / "home/.cache/mlx-zimage"
        self.cache = folder / "home/.cache/huggingface"
        self.environment = {"HOME": str(folder / "home"), "HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1"}
        self.environment["HF_HUB_DISABLE_TELEMETRY"] = "1"

    def __call__(self, *args, **variables: str) -> subprocess.CompletedProcess:
        """Run a command in this process, with standard input closed."""
        from huggingface_hub import constants

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.work)
            for name in set(os.environ) - set(self.inherited()):
                patch.delenv(name)
            for name, value in (self.environment | variables).items():
                patch.setenv(name, value)
            # the client read its variables when it was imported
            patch.setattr(constants, "ENDPOINT", self.hub.endpoint)
            template = f"{self.hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_HUB_CACHE", str(self.cache / "hub"))
            patch.setattr(constants, "HF_TOKEN_PATH", str(self.cache / "token"))
            patch.setattr(constants, "HF_HUB_OFFLINE", "HF_HUB_OFFLINE" in variables)
            words = [str(arg) for arg in args]
            result = CliRunner().invoke(cli.main, words, catch_exceptions=False)
        return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)

    def process(
        self, *args, program=PROGRAM, stdin=subprocess.DEVNULL, start=subprocess.run, **variables: str
    ) -> subprocess.CompletedProcess:
        """Run a command in a process of its own: for variables that are read on import, signals, and all of stderr."""
        return start(
            [sys.executable, "-c", program, *map(str, args)],
            cwd=self.work, env=self.inherited() | self.environment | variables, stdin=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def inherited(self) -> dict[str, str]:
        own = ("HF_", "HUGGING", "XDG_", "MLX_ZIMAGE_HOME")
        return {name: value for name, value in os.environ.items() if not name.startswith(own)}
