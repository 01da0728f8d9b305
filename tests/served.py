"""Tests that take too long to run on every change: a server under load, abandoned by its clients, killed, and attacked.

    python tests/served.py [load] [latency] [disconnects] [kills] [hostile]

Each part prints its figures and fails if one of them is not what it should be. .ci/long runs all of them.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from queue import Empty, Queue

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import KEY, PROMPT, Answer, Server, form, opened, png, serving
from test_cli_lora import write as write_lora

from mlx_zimage import GenerateRequest
from mlx_zimage.generate import Finished, events, open_model
from mlx_zimage.images.codec import encode
from mlx_zimage.weights.hub import POCKET

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
SMALL = {"prompt": PROMPT, "size": "32x32", "steps": 1}


def report(name: str, **figures: object) -> None:
    print(f"{name}: " + ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in figures.items()), flush=True)


def resident(*pids: int) -> int:
    """Kilobytes of memory of some processes."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", ",".join(map(str, pids))], capture_output=True, text=True)
    return sum(map(int, shown.stdout.split()))


def check_serves(server: Server) -> None:
    """The same request still gives the same image."""
    answer = server.post(GENERATE, {**SMALL, "seed": 1})
    assert answer.status == 200, answer.body
    pixels = np.asarray(opened(answer.json["data"][0]["b64_json"]))
    if server.log not in EXPECTED:
        EXPECTED[server.log] = pixels
    assert np.array_equal(pixels, EXPECTED[server.log])


EXPECTED: dict[Path, np.ndarray] = {}


# ---- load


def load(server: Server, clients: int = 32, requests: int = 500) -> None:
    """Every request is answered with its own image, in order of arrival; memory stays as it is."""
    todo: Queue[int] = Queue()
    for seed in range(requests):
        todo.put(seed)
    spans: dict[int, tuple[float, float, float]] = {}  # by seed: sent, accepted, finished
    full, memory, lock = 0, {}, threading.Lock()

    def client() -> None:
        nonlocal full
        while True:
            try:
                seed = todo.get_nowait()
            except Empty:
                return
            while True:
                sent = time.monotonic()
                connection = server.begin(GENERATE, {**SMALL, "seed": seed, "stream": True})
                response = connection.getresponse()
                accepted = time.monotonic()
                answer = Answer(response)
                finished = time.monotonic()
                connection.close()
                if answer.status == 200:
                    break
                assert answer.status == 429 and int(answer.headers["Retry-After"]) >= 1, answer.body
                full += 1
                time.sleep(random.random() / 10)
            event = json.loads(answer.body.decode().split("data: ")[1])
            assert event["type"] == "image_generation.completed" and event["seed"] == seed, event
            assert opened(event["b64_json"]).size == (32, 32)
            with lock:
                spans[seed] = sent, accepted, finished
                if len(spans) in (50, requests):
                    memory[len(spans)] = resident(server.process.pid), resident(server.worker)

    begin = time.monotonic()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - begin
    rows = list(spans.values())
    # A client's clock is read by a thread that may have to wait for its turn.
    slack = max(0.25, 2 * seconds / requests)  # two images' time
    late = sum(a[1] < b[0] and a[2] > b[2] + slack for a in rows for b in rows)
    growth = [after / before - 1 for before, after in zip(memory[50], memory[requests], strict=True)]
    both = sum(memory[requests]) / sum(memory[50]) - 1
    report(
        "load", clients=clients, requests=requests, answered=len(rows), refused_with_429=full, out_of_order=late,
        seconds=f"{seconds:.1f}", memory_of_the_server=f"{growth[0]:+.1%}", of_the_worker=f"{growth[1]:+.1%}",
        of_both=f"{both:+.1%}",
    )  # fmt: skip
    assert len(rows) == requests and full and not late
    assert both < 0.05


def latency(server: Server, rounds: int = 5, pairs: int = 100) -> None:
    """The time that the server adds to the library's own in one process, both measured alternately.

    Only the round in which the library is fastest counts: while other programs use the processor, both are slower.
    """
    model = open_model(str(server.model))

    def library(seed: int) -> bytes:
        found = events(model, GenerateRequest(PROMPT, 32, 32, seed=seed, steps=1))
        (image,) = [event for event in found if isinstance(event, Finished)]
        return encode(image.pixels, ".png", image.origin)

    def served(seed: int) -> bytes:
        return base64.b64decode(server.post(GENERATE, {**SMALL, "seed": seed}).json["data"][0]["b64_json"])

    medians = []
    for _ in range(rounds):
        times: dict[str, list[float]] = {"library": [], "served": []}
        for seed in range(pairs):
            images = []
            for way in (library, served) if seed % 2 else (served, library):
                begin = time.perf_counter()
                images.append(way(seed))
                times[way.__name__].append(time.perf_counter() - begin)
            assert np.array_equal(*(np.asarray(opened(image)) for image in images))
        medians.append((1000 * statistics.median(times["library"]), 1000 * statistics.median(times["served"])))
    shown = "; ".join(f"{alone:.1f} and {with_server:.1f}" for alone, with_server in medians)
    alone, with_server = min(medians)
    report(
        "latency", pairs=pairs, library_and_served_ms=shown, quietest_round=f"{alone:.1f}",
        added_ms=f"{with_server - alone:.1f}",
    )  # fmt: skip
    assert with_server - alone < 15


# ---- clients that go away, and a worker that does


def disconnects(server: Server, count: int = 200) -> None:
    """Whenever and however clients disconnect, the queue is empty afterwards and the next image is right."""
    check_serves(server)
    left = Counter[str]()
    for _ in range(count):
        values = {**SMALL, "steps": random.randint(1, 8), "n": random.randint(1, 4)}
        values |= {"stream": True, "progress": True} if random.random() < 0.5 else {}
        connection = server.begin(GENERATE, values)
        time.sleep(random.random() ** 2 / 2)
        left["running" if server.health()["running"] else "over"] += 1
        if random.random() < 0.5:  # with a reset
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    begin = time.monotonic()
    health = server.until(lambda health: not health["running"] and not health["waiting"], 10)
    report("disconnects", count=count, while_running=left["running"], empty_after=f"{time.monotonic() - begin:.2f} s")
    assert health["waiting"] == 0
    check_serves(server)


def kills(server: Server, count: int = 20) -> None:
    """When the worker is killed, every waiting client gets an answer, and the server serves again."""
    statuses, seconds = Counter[str](), []
    for _ in range(count):
        values = {**SMALL, "size": "64x64", "steps": 8, "n": 10}
        waiting = [server.begin(GENERATE, {**values, "stream": i == 1}) for i in range(4)]
        server.until(lambda health: health["running"])
        time.sleep(random.random())
        os.kill(server.worker, signal.SIGKILL)
        for connection in waiting:
            answer = Answer(connection.getresponse())
            ended = "event: error" in answer.body.decode() or answer.status == 503
            statuses["said why" if ended and b"SIGKILL" in answer.body else f"status {answer.status}"] += 1
            connection.close()
        begin = time.monotonic()
        check_serves(server)
        seconds.append(time.monotonic() - begin)
    report("kills", count=count, **statuses, longest_until_it_serves_again=f"{max(seconds):.1f} s")
    assert statuses["said why"] + statuses["status 200"] == 4 * count


# ---- hostile requests

TEXT = st.text(max_size=40) | st.sampled_from(
    ["", "\0", "\ud800", "/etc/passwd", "file:///etc/passwd", "<lora:../x:1>"]
)
NUMBER = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, -1, 1e308, 2**64])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    *("prompt", "negative_prompt", "model", "size", "n", "seed", "steps", "guidance", "strength", "loras", "control"),
    *("stream", "partial_images", "response_format", "output_format", "output_compression", "shift", "sigmas", "rng"),
    *("outpaint", "upscale", "mask_feather", "width", "height", "cfg_scale", "batch_size", "n_iter", "init_images"),
    *("mask", "override_settings", "denoising_strength", "enable_hr", "hr_scale", "sd_model_checkpoint", "image"),
    "alwayson_scripts",
)
IMAGE = base64.b64encode(png(Image.new("RGB", (32, 32)))).decode()
IMAGES = JSON | st.sampled_from([IMAGE, f"data:image/png;base64,{IMAGE}", IMAGE[:90], {"image": IMAGE, "mask": 1}])
NESTED = {  # what is only refused deep inside
    "control": st.fixed_dictionaries(
        {"image": IMAGES},
        optional={
            "kind": st.sampled_from(["canny", "gray", "scribble", "tile"]) | JSON,
            **{name: st.floats(0, 1) | JSON for name in ("scale", "start", "end")},
        },
    ),
    "unit": st.fixed_dictionaries(
        {"image": IMAGES, "module": st.sampled_from(["none", "canny", "tile_resample"]) | JSON},
        optional={name: st.floats(0, 1) | JSON for name in ("weight", "guidance_start", "guidance_end", "enabled")},
    ),
    "lora": st.fixed_dictionaries(
        {"name": st.just("style") | JSON}, optional={"strength": st.floats(-2, 2) | JSON, "sha256": JSON}
    ),
}
DEEP = st.one_of(
    st.fixed_dictionaries({"control": NESTED["control"] | st.lists(NESTED["control"], max_size=5)}),
    st.lists(NESTED["unit"], max_size=5).map(lambda units: {"alwayson_scripts": {"ControlNet": {"args": units}}}),
    st.fixed_dictionaries({"loras": st.lists(NESTED["lora"], max_size=3)}),
)
# Values that would be valid and take a long time are left out: the test is that nothing invalid takes long.
CHANGES = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4).filter(
    lambda changes: (
        not any(
            isinstance(changes.get(name), (int, float)) and 1 < changes[name] < 9000
            for name in ("n", "batch_size", "n_iter", "upscale", "hr_scale", "width", "height")
        )
    )
)
PATHS = (
    *(
        GENERATE,
        EDIT,
        "/v1/models",
        "/v1/models/x",
        "/v1/images/results/x.png",
        "/health",
        "/",
        "//",
        "/v1/../etc/passwd",
    ),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options", "/sdapi/v1/progress", "/sdapi/v1/interrupt"),
    *("/sdapi/v1/png-info", "/controlnet/model_list"),
    *("/sdapi/v1/loras", "/%00", "/%2e%2e/%2e%2e/etc/passwd", "/sdapi", "/v1/images/results/../../../etc/passwd"),
)
POSTED = (GENERATE, EDIT, "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options", "/sdapi/v1/png-info")
HEADERS = st.dictionaries(
    st.sampled_from(["Host", "Origin", "Sec-Fetch-Site", "Authorization", "Content-Type", "Transfer-Encoding", "Range"])
    | st.sampled_from(["Content-Length", "Expect", "Upgrade", "Connection", "Cookie", "X-Forwarded-Host", "Accept"]),
    st.sampled_from(
        [
            *(
                "evil.example",
                "null",
                "cross-site",
                "Bearer x",
                "Basic ////",
                "Basic dXNlcjo=",
                "chunked",
                "-1",
                "99999999999",
            ),
            *("text/plain", "multipart/form-data", "multipart/form-data; boundary=", "application/json; charset=utf-7"),
            *(
                "100-continue",
                "websocket",
                "close",
                "localhost:1:2",
                "[::1",
                "a" * 9000,
                "127.0.0.1@evil.example",
                "*/*",
            ),
        ]
    )
    | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
    max_size=3,
)
BASE = {**SMALL, "width": 32, "height": 32, "image": IMAGE, "init_images": [IMAGE]}
FORM, FORM_TYPE = form({"prompt": PROMPT, "size": "32x32", "steps": "1"}, [("image", png(Image.new("RGB", (32, 32))))])


@st.composite
def requests(draw) -> tuple[str, str, bytes, dict[str, str]]:
    """A method, path, body and headers: of a valid request, with some of it changed."""
    path = draw(st.sampled_from(PATHS) | st.sampled_from(POSTED))
    method = draw(st.sampled_from([*["POST"] * 12, "GET", "GET", "PUT", "OPTIONS", "HEAD", "X"]))
    headers = {"Content-Type": "application/json"}
    if path == EDIT and draw(st.booleans()):
        headers["Content-Type"] = FORM_TYPE
        body = bytearray(FORM)
        for _ in range(draw(st.integers(0, 3))):
            start = draw(st.integers(0, len(body)))
            body[start : start + draw(st.integers(0, 60))] = draw(st.binary(max_size=20))
    else:
        values = {**BASE, **draw(CHANGES), **(draw(DEEP) if draw(st.integers(0, 2)) == 0 else {})}
        for name in draw(st.sets(st.sampled_from(FIELDS), max_size=2)):
            values.pop(name, None)
        body = bytearray(json.dumps(values).encode())
        if draw(st.integers(0, 3)) == 0:
            start = draw(st.integers(0, len(body)))
            body[start : start + draw(st.integers(0, 20))] = draw(st.binary(max_size=20))
    return method, path, bytes(body), headers | (draw(HEADERS) if draw(st.booleans()) else {})


def raw(server: Server, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, float]:
    """Send a request that no library would send; returns the status, 0 if there was none, and the seconds it took."""
    lines = {"Host": server.host, "Authorization": f"Bearer {KEY}", "Content-Length": str(len(body)), **headers}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    host, port = server.host.split(":")
    begin = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=20) as client:
        answer = b""
        try:
            client.sendall(head.encode("latin-1") + b"\r\n" + body)
            if {"Content-Length", "Transfer-Encoding"} & headers.keys():
                client.shutdown(socket.SHUT_WR)  # otherwise the server waits for the rest
            while chunk := client.recv(2**16):
                answer += chunk
                if b"\r\n0\r\n\r\n" in answer or (method == "HEAD" and b"\r\n\r\n" in answer):
                    break
                length = answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                if length.isdigit() and len(answer.partition(b"\r\n\r\n")[2]) >= int(length):
                    break
        except (BrokenPipeError, ConnectionResetError):
            pass
    words = answer.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP") else 0, time.monotonic() - begin


def hostile(server: Server, count: int = 10_000) -> None:
    """No request is answered with 500, none waits for more than 5 s, and the server is as it was."""
    check_serves(server)
    statuses, longest = Counter[int](), [0.0]
    host, port = server.host.split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(100)]  # slow loris
    for client in slow:
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nX: ")

    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(requests())
    def send(request) -> None:
        status, seconds = raw(server, *request)
        statuses[status] += 1
        longest[0] = max(longest[0], seconds)
        assert status != 500, request
        assert seconds < 5, (seconds, request)
        if sum(statuses.values()) % 500 == 0:
            large = raw(server, "POST", GENERATE, bytes(33 * 2**20), {"Content-Type": "application/json"})
            assert large[0] in (0, 413) and large[1] < 5, large

    send()
    held = sum(not closed(client) for client in slow)
    counts = {f"status_{status}": number for status, number in sorted(statuses.items())}
    report("hostile", count=sum(statuses.values()), **counts, longest=f"{longest[0]:.2f} s", slow_clients_held=held)
    log = server.log.read_text()
    assert not held and "Traceback" not in log, log[log.find("Traceback") :][:5000]
    check_serves(server)


def closed(client: socket.socket) -> bool:
    client.settimeout(1)
    try:
        return client.recv(1000) == b""
    except OSError as error:
        return not isinstance(error, TimeoutError)


PARTS = {part.__name__: part for part in (load, latency, disconnects, kills, hostile)}


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = shutil.copytree(POCKET, Path(folder) / "pocket")
        config = model / "vae/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 64}))
        (Path(folder) / "loras").mkdir()
        write_lora(Path(folder) / "loras/style.safetensors")
        options = ("--model", model, "--lora-dir", Path(folder) / "loras", "--control-model", "pocket")
        for name in names or PARTS:
            log = Path(folder) / f"{name}.log"
            with serving(*options, log=log) as server:
                server.model = model
                try:
                    PARTS[name](server)
                except BaseException:
                    print(*log.read_text().splitlines()[-20:], sep="\n")
                    raise


if __name__ == "__main__":
    main(sys.argv[1:])
