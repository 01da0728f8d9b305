"""The server itself: who may use it, its queue, and its worker. tests/test_server_clients.py has the clients."""

import asyncio
import json
import os
import plistlib
import shutil
import signal
import socket
import subprocess
import time
from bisect import bisect_left
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import controls
import mlx.core as mx
import pytest
import uvicorn
from click.testing import CliRunner
from huggingface_hub import constants
from PIL import Image
from serving import KEY, PROMPT, Answer, form, png, serving
from starlette.responses import Response
from starlette.types import ASGIApp, Message
from test_cli_lora import write as write_lora

from mlx_zimage import GenerateRequest, ZImagePipeline, detectors
from mlx_zimage.cli import main
from mlx_zimage.errors import CheckpointError, MemoryBudgetError
from mlx_zimage.generate import open_model
from mlx_zimage.models.text_encoder import TextEncoder
from mlx_zimage.request import CONTROLS
from mlx_zimage.server import guard, queue, results, worker
from mlx_zimage.server.app import is_answered, listen
from mlx_zimage.server.controls import units_of
from mlx_zimage.server.errors import ADJUSTED, Refusal
from mlx_zimage.server.guard import HEAD_S, MAX_BODY, Access, Body, Guard, host_name
from mlx_zimage.server.loras import lora_files
from mlx_zimage.server.messages import Accepted, Done, Job, Loaded, Model, Options, Started
from mlx_zimage.server.messages import Image as Finished
from mlx_zimage.server.queue import Queue
from mlx_zimage.server.service import Service
from mlx_zimage.weights.hub import POCKET

GENERATE = "/v1/images/generations"
QUICK = {"prompt": PROMPT, "size": "32x32", "steps": 1}
SLOW = {"prompt": PROMPT, "size": "64x64", "steps": 8, "n": 10}


# ---- who may use it


def test_without_the_key_nothing_is_answered_but_health_and_the_pages_own_files(server):
    for path in ("/v1/models", "/sdapi/v1/options", "/page", "/v1/images/result"):
        answer = server.request("GET", path, headers={"Authorization": "Bearer wrong"})
        assert answer.status == 401 and KEY.encode() not in answer.body
    for path in ("/health", "/"):
        assert server.request("GET", path, headers={"Authorization": ""}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "192.168.1.7"},
        {"Host": "localhost@evil.example"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=lambda headers: "-".join(headers) + "-" + "-".join(headers.values()),
)
def test_another_name_for_this_machine_or_another_web_page_is_refused(server, headers):
    """Even with the key, and in a form, which a page may send without asking."""
    body, content_type = form({"prompt": PROMPT}, [("image", png(Image.new("RGB", (32, 32))))])
    for path in ("/v1/images/edits", "/sdapi/v1/interrupt", "/health"):
        answer = server.request("POST", path, body, {"Content-Type": content_type, **headers})
        assert answer.status == 403, answer.body
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_page_that_was_allowed_is_answered(server):
    """With the headers of OpenAI's SDK, and with those that say what was changed."""
    page = {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
    asked = {"Access-Control-Request-Method": "POST", **page, "Authorization": ""}
    preflight = server.request("OPTIONS", GENERATE, headers=asked)
    assert preflight.status == 204 and "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    preflight = server.request("OPTIONS", GENERATE, headers=asked)
    assert preflight.headers["Access-Control-Allow-Headers"] == asked["Access-Control-Request-Headers"]
    answer = server.request("GET", "/v1/models", headers=page)
    assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert ADJUSTED in answer.headers["Access-Control-Expose-Headers"]
    assert server.request("GET", "/v1/models", headers={**page, "Authorization": ""}).status == 401


@pytest.mark.parametrize(
    ("listening", "host", "known"),
    [
        ("127.0.0.1", "localhost:8796", True),
        ("127.0.0.1", "LOCALHOST.", True),
        ("127.0.0.1", "[::1]:8796", True),
        ("127.0.0.1", "127.9.9.9", True),
        ("127.0.0.1", "host.docker.internal:8796", True),
        ("127.0.0.1", "192.168.1.7", False),
        ("127.0.0.1", "evil.example", False),
        ("0.0.0.0", "192.168.1.7:8796", True),
        ("0.0.0.0", f"{socket.gethostname()}:8796", True),
        ("0.0.0.0", "evil.example", False),
        ("mac.local", "mac.local:8796", True),
        ("Mac.local", "mac.local:8796", True),
    ],
)
def test_the_names_of_this_machine_depend_on_where_it_listens(listening, host, known):
    assert Access(listening).knows(host) is known


@pytest.mark.parametrize("host", ["a b", "a:b", "a:1:2", "[::1", "[::1]x", "a/b", "a?b", "", "a" * 300, "ü"])
def test_a_malformed_host_has_no_name(host):
    assert host_name(host) == ""


def test_another_host_needs_a_key_or_a_flag(monkeypatch, tmp_path):
    monkeypatch.delenv("MLX_ZIMAGE_API_KEY", raising=False)
    result = CliRunner().invoke(main, ["serve", "--model", "pocket", "--host", "0.0.0.0"])
    assert result.exit_code == 2 and "--no-api-key" in result.stderr
    (tmp_path / "key").write_text("short\n")
    result = CliRunner().invoke(main, ["serve", "--model", "pocket", "--api-key-file", str(tmp_path / "key")])
    assert result.exit_code == 2 and "8 or more printable ASCII characters" in result.stderr
    assert "short" not in result.stderr
    (tmp_path / "key").unlink()
    os.mkfifo(tmp_path / "key")
    for file in (tmp_path / "key", "/dev/zero"):
        result = CliRunner().invoke(main, ["serve", "--model", "pocket", "--api-key-file", str(file)])
        assert result.exit_code == 2 and f"the API key in {file} cannot be read" in result.stderr
    result = CliRunner().invoke(main, ["serve", "--model", "pocket", "--control-kind", "tile"])
    assert result.exit_code == 2 and "--control-kind needs --control-model" in result.stderr
    result = CliRunner().invoke(main, ["serve", "--model", "pocket", "--cors", "*"])
    assert result.exit_code == 2 and "--cors takes an origin" in result.stderr


def test_a_taken_port_is_an_error_that_says_so(server):
    port = server.host.partition(":")[2]
    result = CliRunner().invoke(main, ["serve", "--model", "pocket", "--port", port])
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in result.stderr
    assert is_answered("0.0.0.0", int(port)), "also where the system would let both listen"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "nowhere.invalid", "--no-api-key"), "--host must be an address or a name of this machine"),
        (("--host", "a..b", "--no-api-key"), "--host must be an address or a name of this machine"),
        (("--host", "192.0.2.1", "--no-api-key"), "--host must be an address or a name of this machine"),
    ],
)
def test_an_address_that_is_not_this_machines_is_an_error_that_says_so(options, message):
    result = CliRunner().invoke(main, ["serve", "--model", "pocket", "--port", "0", *options])
    assert result.exit_code == 1 and f"cannot listen on {options[1]}" in result.stderr and message in result.stderr


def test_a_budget_in_which_no_image_can_be_generated_ends_the_server():
    """Before it prints an address."""
    result = CliRunner().invoke(main, ["serve", "--model", "pocket", "--port", "0", "--memory", "1MB"])
    assert result.exit_code == MemoryBudgetError.exit_code and not result.stdout
    assert "cannot be generated within 1 MB" in result.stderr


def test_a_model_that_cannot_be_opened_ends_the_server(tmp_path):
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(main, ["serve", "--model", str(tmp_path / "empty"), "--port", "0"])
    assert result.exit_code == CheckpointError.exit_code and "empty" in result.stderr


def test_a_controlnet_that_fits_no_model_ends_the_server(small_pocket, tmp_path):
    """One that fits only a model other than the first is not offered for the first."""
    other = controls.write(tmp_path, 0, "control_lite")
    result = CliRunner().invoke(
        main, ["serve", "--model", str(small_pocket), "--control-model", str(other), "--port", "0"]
    )
    assert result.exit_code == CheckpointError.exit_code and "control_lite is for another model" in result.stderr


def test_a_controlnet_is_offered_for_the_models_that_it_fits(small_pocket, tiny_folder):
    async def test(queue: Queue) -> None:
        assert {model.name: model.controlnet for model in queue.models} == {"pocket": "pocket", "tiny": None}

    run(test, options=Options({"tiny": str(tiny_folder), "pocket": str(small_pocket)}, controlnet="pocket"))


# ---- bodies


def test_a_body_is_refused_by_its_size_before_it_is_read(server):
    answer = server.request("POST", GENERATE, b"{}", {"Content-Length": str(MAX_BODY + 1)})
    assert answer.status == 413
    for length in ("-1", "1e3", "9" * 30):
        with suppress(ConnectionResetError):  # the server closes without reading the body
            assert server.request("POST", GENERATE, b"{}", {"Content-Length": length}).status in (400, 413)


def test_a_body_in_chunks_is_counted(server):
    connection = server.connect()
    connection.putrequest("POST", GENERATE)
    for name, value in {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}.items():
        connection.putheader(name, value)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(MAX_BODY // 2**20 + 64):
            connection.send(chunk)
        raise ConnectionResetError if Answer(connection.getresponse()).status == 413 else AssertionError
    connection.close()


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b"{", "application/json", "is not valid JSON"),
        (b"[1]", "application/json", "must be a JSON object, got list"),
        (b'{"a": 1, "a": 2}', "application/json", "the same key twice"),
        (b"[" * 100_000, "application/json", "is not valid JSON"),
        (b"\xff", "application/json", "is not valid JSON"),
        (b"{}", "text/plain", "with Content-Type: application/json"),
        (b"{}", "application/json", "prompt is missing"),
        (b'{"prompt": "\\ud800"}', "application/json", "not valid Unicode"),
        (b'{"prompt": "x", "strength": NaN}', "application/json", "strength must be"),
        (b'{"prompt": "x", "model": {}}', "application/json", "no model {}"),
        (b'{"prompt": "x", "loras": ["style"]}', "application/json", "a LoRA must be an object with name"),
        (b'{"prompt": "x", "loras": [{"name": []}]}', "application/json", "a LoRA's name must be"),
        (b'{"prompt": "x", "loras": {"a": 1}}', "application/json", "loras must be a list"),
        (b'{"prompt": "x", "loras": [{"name": "style", "strength": []}]}', "application/json", "must be a number"),
        (b'{"prompt": "x", "output_format": []}', "application/json", "output_format must be"),
    ],
)
def test_a_damaged_body_is_refused(server, body, content_type, message):
    answer = server.request("POST", GENERATE, body, {"Content-Type": content_type})
    assert answer.status in (400, 404) and message in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary=a"),
        (
            b'--a\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n',
            "multipart/form-data; boundary=a",
        ),
        (b"--a\r\n\r\n--a--\r\n", "multipart/form-data; boundary=a"),
        (b"image=x&prompt=y", "application/x-www-form-urlencoded"),
        (form({f"f{i}": "x" for i in range(200)}, [])[0], form({}, [])[1]),
        (form({"prompt": "x"}, [("image", b"x")] * 30)[0], form({}, [])[1]),
        (form({"prompt": "x"}, [("image", b"not an image")])[0], form({}, [])[1]),
    ],
)
def test_a_damaged_form_is_refused(server, body, content_type):
    answer = server.request("POST", "/v1/images/edits", body, {"Content-Type": content_type})
    assert answer.status == 400 and answer.json["error"]["message"]


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(server):
    body, content_type = form({"prompt": PROMPT}, [("image", png(Image.new("1", (9000, 9000))))])
    answer = server.request("POST", "/v1/images/edits", body, {"Content-Type": content_type})
    assert answer.status == 400 and "81.0 megapixels" in answer.json["error"]["message"]


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to an application that is served in this process, as the server serves its own."""
    with listen("127.0.0.1", 0) as listener:
        served = uvicorn.Server(uvicorn.Config(app, http=guard.Protocol, lifespan="off", log_config=None))
        task = asyncio.create_task(served.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        yield reader, writer
        writer.close()
        served.should_exit = True
        await task


def test_a_head_that_does_not_end_times_out(monkeypatch):
    """Slow loris: the connection is closed although bytes keep arriving."""

    async def test() -> None:
        async with listening(Response("")) as (reader, writer), asyncio.timeout(20):
            writer.write(b"GET / HTTP/1.1\r\n")
            while not (reader.at_eof() or writer.is_closing()):
                writer.write(b"X-A: b\r\n")
                await asyncio.sleep(0.02)
            with suppress(ConnectionResetError):
                assert await reader.read() == b""

    monkeypatch.setattr(guard, "HEAD_S", 0.2)
    asyncio.run(test())


@pytest.mark.slow
def test_a_head_that_does_not_end_within_seconds_times_out(server):
    """On the server itself, with its own limit."""
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        end = time.monotonic() + 3 * HEAD_S
        with pytest.raises(OSError):
            while time.monotonic() < end:
                client.sendall(b"X-A: b\r\n")
                time.sleep(0.2)


def test_a_request_right_after_another_does_not_time_out(monkeypatch):
    """HTTP pipelining: it is already running when the wait for the next head would begin."""
    ran = []

    async def app(scope, receive, send) -> None:
        await asyncio.sleep(0.3 if scope["path"] == "/slow" else 0)
        ran.append(scope["path"])
        await Response("")(scope, receive, send)

    async def test() -> bytes:
        async with listening(app) as (reader, writer):
            writer.writelines(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for path in ("/", "/slow"))
            return await reader.read()  # up to the end of the connection, which comes when no third head does

    monkeypatch.setattr(guard, "HEAD_S", 0.1)
    assert asyncio.run(test()).count(b"HTTP/1.1 200") == 2 and ran == ["/", "/slow"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("path", ["/health", "/nothing", GENERATE])
@pytest.mark.parametrize("body", [b"zz\r\n{}", b"2\r\n{}GARBAGE\r\n"])
def test_what_is_not_http_is_refused_once_and_leaves_no_traceback(server, method, path, body):
    """Whether the application has answered the request's head by then or not."""
    host, port = server.host.split(":")
    head = f"{method} {path} HTTP/1.1\r\nHost: {server.host}\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: client.recv(2**16), b""))
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    assert server.health()["status"] == "ok" and "Traceback" not in server.log.read_text()


# ---- the queue


def test_a_request_to_a_full_queue_is_answered_with_429_and_those_waiting_in_order(server):
    running = server.begin(GENERATE, {**SLOW, "n": 4})
    server.until(lambda health: health["running"])
    waiting = []
    for i in range(3):
        waiting.append(server.begin(GENERATE, {**QUICK, "seed": i}))
        server.until(lambda health, i=i: health["waiting"] == i + 1)
    refused = server.post(GENERATE, QUICK)
    assert refused.status == 429 and int(refused.headers["Retry-After"]) >= 1
    assert refused.json["error"]["message"] == "the queue is full (3 waiting); try again later"
    progress = server.get("/sdapi/v1/progress")
    assert progress["state"]["job_count"] == 4 and progress["state"]["sampling_steps"] == 8
    assert Answer(running.getresponse()).status == 200
    seeds = [Answer(connection.getresponse()).json["data"][0]["seed"] for connection in waiting]
    assert seeds == [0, 1, 2]
    assert server.until(lambda health: not health["running"])["waiting"] == 0


def test_what_cannot_fit_is_refused_at_once_while_another_request_runs(server):
    running = server.begin(GENERATE, SLOW)
    server.until(lambda health: health["running"])
    refused = server.post(GENERATE, {**QUICK, "size": "8192x8192"})
    assert refused.status == 422 and "the largest size that fits" in refused.json["error"]["message"]
    assert server.health()["running"], "it did not wait for its turn"
    running.close()


def test_nothing_is_generated_for_a_client_that_disconnects(server):
    """Neither the one that runs, which stops within a step, nor the one that waits."""
    logged = server.log.read_text().count("10 images")
    running = server.begin(GENERATE, SLOW)
    server.until(lambda health: health["running"])
    waiting = server.begin(GENERATE, {**SLOW, "stream": True})
    server.until(lambda health: health["waiting"] == 1)
    waiting.close()
    server.until(lambda health: health["waiting"] == 0)
    running.close()
    server.until(lambda health: not health["running"])
    assert server.post(GENERATE, QUICK).status == 200
    assert server.log.read_text().count("10 images") == logged


def test_interrupt_stops_a_job_of_a1111_and_of_no_other_api(server):
    running = server.begin(GENERATE, {**SLOW, "n": 2})
    server.until(lambda health: health["running"])
    assert server.post("/sdapi/v1/interrupt", {}).status == 200
    assert len(Answer(running.getresponse()).json["data"]) == 2
    interrupted = server.begin("/sdapi/v1/txt2img", {"prompt": PROMPT, "batch_size": 10})
    server.until(lambda health: health["running"])
    assert server.request("POST", "/sdapi/v1/interrupt").status == 200
    answer = Answer(interrupted.getresponse())
    assert answer.status == 409 or len(answer.json["images"]) < 10


def test_progress_is_streamed_with_the_position_and_the_time_that_is_left(server):
    assert server.post(GENERATE, QUICK).status == 200, "now the pace is known"
    running = server.begin(GENERATE, {**SLOW, "n": 2})
    server.until(lambda health: health["running"])
    waiting = server.begin(GENERATE, {**QUICK, "steps": 2, "stream": True, "progress": True})
    answer = Answer(waiting.getresponse())
    events = [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    running.close()
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    kinds = [event["type"].rpartition(".")[2] for event in events]
    assert kinds[-1] == "completed" and set(kinds[:-1]) == {"progress"}
    assert [(event["step"], event["steps"]) for event in events[-3:-1]] == [(1, 2), (2, 2)]
    assert [event["position"] for event in events[:-1]] == [1] + [0] * (len(events) - 2)
    assert all(event["estimated_seconds"] >= 0 for event in events[:-1])


def test_when_the_worker_is_killed_everyone_is_answered_and_it_is_replaced(server):
    before = server.worker
    waiting = [server.begin(GENERATE, {**SLOW, "stream": i == 1}) for i in range(3)]
    server.until(lambda health: health["running"] and health["waiting"] == 2)
    os.kill(before, signal.SIGKILL)
    plain, streamed, last = (Answer(connection.getresponse()) for connection in waiting)
    for answer in (plain, last):
        assert answer.status == 503 and "killed by SIGKILL" in answer.json["error"]["message"]
    assert streamed.status == 503 or "killed by SIGKILL" in streamed.body.decode()
    assert server.post(GENERATE, QUICK).status == 200
    assert server.worker != before


def test_no_path_of_this_machine_and_no_prompt_leaves_the_server(server, small_pocket):
    answers = [server.get(f"/sdapi/v1/{name}") for name in ("sd-models", "loras", "options")]
    answers.append(server.get("/v1/models"))
    broken = server.log.parent / "loras/broken.safetensors"
    broken.write_bytes(b"broken")
    refused = server.post(GENERATE, {**QUICK, "loras": [{"name": "broken"}]})
    broken.unlink()
    assert refused.status == 422 and "broken.safetensors" in refused.json["error"]["message"]
    for text in (json.dumps(answers), refused.body.decode()):
        assert str(small_pocket.parent) not in text and str(server.log.parent) not in text
    assert PROMPT not in server.log.read_text()


def test_the_answer_about_models_that_cannot_be_opened_again_omits_their_path(small_pocket, tmp_path):
    moved = shutil.copytree(small_pocket, tmp_path / "model")

    async def test(queue: Queue) -> None:
        shutil.rmtree(moved / "transformer")
        queue.process.kill()
        said = set()
        while "the models cannot be opened again; the server's log says why" not in said:
            with pytest.raises(Refusal) as caught:
                await finished(queue, job())
            assert caught.value.status == 503 and str(tmp_path) not in caught.value.message
            said.add(caught.value.message)
            await asyncio.sleep(0.05)

    async def within_a_minute(queue: Queue) -> None:
        async with asyncio.timeout(60):
            await test(queue)

    run(within_a_minute, options=Options({"pocket": str(moved)}))


def test_a_signal_to_the_whole_group_leaves_the_worker_to_the_server(server):
    before = server.worker
    os.kill(before, signal.SIGTERM)
    assert server.post(GENERATE, QUICK).status == 200 and server.worker == before


def test_the_key_is_not_in_the_arguments_of_any_process(server):
    for process in (server.process.pid, server.worker):
        shown = subprocess.run(["ps", "-o", "args=", "-p", str(process)], capture_output=True, text=True, check=True)
        assert "mlx_zimage" in shown.stdout and KEY not in shown.stdout


def test_ctrl_c_ends_the_server_and_its_worker(small_pocket, tmp_path):
    with serving("--model", small_pocket, log=tmp_path / "log", key=None) as server:
        worker = server.worker
        assert server.request("GET", "/v1/models", headers={"Authorization": "Bearer any"}).status == 200
        assert server.stop() == 130
        assert ended(worker)


def test_a_killed_server_leaves_no_worker_behind(small_pocket, tmp_path):
    with serving("--model", small_pocket, log=tmp_path / "log") as server:
        worker = server.worker
        running = server.begin(GENERATE, SLOW)
        server.until(lambda health: health["running"])
        server.process.kill()
        assert ended(worker)
        running.close()


def ended(pid: int) -> bool:
    """Whether a process ends within 20 seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not shown or shown.startswith("Z"):  # containers do not reap orphans
            return True
        time.sleep(0.05)
    return False


# ---- the queue without HTTP


def run(test, **options):
    """Run an asynchronous test with a queue of its own."""

    async def main():
        queue = Queue(**options)
        try:
            await queue.start()
            await test(queue)
        finally:
            await queue.stop()

    asyncio.run(main())


def job(**fields) -> Job:
    return Job(0, "pocket", {"prompt": PROMPT, "width": 32, "height": 32, "steps": 1, **fields}, (1,))


async def finished(queue: Queue, job: Job) -> list:
    messages = []
    with queue.submit(job) as ticket:
        while not messages or not isinstance(messages[-1], Done):
            messages.append(await ticket.next())
    return messages


def test_an_idle_model_is_unloaded_and_comes_back(small_pocket):
    async def test(queue: Queue) -> None:
        first = await finished(queue, job())
        assert queue.loaded == "pocket"
        async with asyncio.timeout(30):
            while queue.loaded:
                await asyncio.sleep(0.05)
        second = await finished(queue, job())
        images = [[m.content for m in messages if isinstance(m, Finished)] for messages in (first, second)]
        assert images[0] == images[1]

    run(test, options=Options({"pocket": str(small_pocket)}, idle_s=0.2))


def test_two_models_take_turns_in_memory_and_a_late_job_is_stopped(small_pocket):
    async def test(queue: Queue) -> None:
        for name in ("pocket", "other", "pocket"):
            await finished(queue, Job(0, name, dict(job().fields), (1,)))
            assert queue.loaded == name
        queue.deadline_s = 0.2
        with pytest.raises(Refusal) as caught:
            await finished(queue, Job(0, "pocket", {"prompt": PROMPT}, tuple(range(10))))
        assert (caught.value.status, caught.value.headers) == (503, {"x-should-retry": "false"})
        assert not queue.tickets

    run(test, options=Options({"pocket": str(small_pocket), "other": "pocket"}))


def test_a_cancelled_job_that_does_not_stop_is_ended_with_its_worker(small_pocket, monkeypatch):
    monkeypatch.setattr(queue, "GRACE_S", 0.2)

    async def test(queue: Queue) -> None:
        with queue.submit(Job(0, "pocket", {"prompt": PROMPT}, tuple(range(10)))) as ticket:
            while not isinstance(await ticket.next(), Started):
                pass
            queue.process.send_signal(signal.SIGSTOP)
        with pytest.raises(Refusal, match="killed by SIGKILL"):
            await finished(queue, job())
        while queue.process is None:
            await asyncio.sleep(0.05)
        assert await finished(queue, job())

    run(test, options=Options({"pocket": str(small_pocket)}))


# ---- parts


def test_a_body_that_stops_arriving_times_out(monkeypatch):
    async def never() -> None:
        await asyncio.sleep(60)

    async def receive() -> Message:
        return await Body(never, Guard(None, Access())).receive()

    monkeypatch.setattr(guard, "BODY_S", 0.05)
    with pytest.raises(Refusal, match="did not arrive within"):
        asyncio.run(receive())


def test_bodies_are_limited_together(monkeypatch):
    """As they are held in memory until their requests are answered."""
    answered = []

    async def arriving() -> Message:
        return {"type": "http.request", "body": bytes(40), "more_body": False}

    async def app(scope, receive, send) -> None:
        try:
            answered.append(len((await receive())["body"]))
        except Refusal as refusal:
            answered.append(refusal.status)
        if len(answered) < 4:
            await outer(scope, arriving, send)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}
    outer = Guard(app, Access())
    monkeypatch.setattr(guard, "MAX_BODIES", 100)
    asyncio.run(outer(scope, arriving, None))
    assert answered == [40, 40, 503, 503] and outer.held == 0


def test_an_unloaded_model_keeps_its_prompts(small_pocket, watch):
    made, sent = opened_worker(small_pocket, small_pocket)
    encoded = watch(TextEncoder, "steps")
    for _ in range(2):
        made.running = 0
        assert made.images(job())
        made.unload()
    assert len(encoded) == 1 and sent[-1] == Loaded(None)


def opened_worker(pocket: Path, lora_dir: Path) -> tuple[worker.Worker, list]:
    """A worker that runs nothing by itself, and what it sends."""
    sent: list = []
    made = worker.Worker(SimpleNamespace(send=sent.append), Options({"pocket": str(pocket)}, lora_dir))
    made.models["pocket"], made.loras["pocket"] = open_model(str(pocket)), {}
    return made, sent


def test_a_request_that_does_not_fit_is_refused_before_it_is_queued(tmp_path):
    """All that it asks for counts: what fits alone no longer fits with a LoRA, a control image, a larger size or more
    steps."""
    write_lora(tmp_path / "style.safetensors")
    made, sent = opened_worker(POCKET, tmp_path)
    pipeline = made.models["pocket"].pipeline
    pipeline.load_controlnet("pocket")
    controlled = replace(job(controls=[{}]), controls=(png(Image.new("RGB", (32, 32))),))
    fits = range(10**6, pipeline.plan(GenerateRequest(PROMPT, 32, 32, seed=1)).peak)
    pipeline.budget = fits[bisect_left(fits, True, key=lambda budget: is_enough(pipeline, budget))]
    made.check(job())
    assert isinstance(sent[0], Accepted), sent
    too_large = (
        job(loras=[{"name": "style", "strength": 0.5}]),
        job(loras=[{"name": "style", "strength": 0.0}]),  # it is read all the same
        controlled,
        job(width=512, height=512),
        job(steps=1000),
        job(upscale=2.0),
    )
    for refused in too_large:
        made.check(refused)
    assert [getattr(message, "kind", message) for message in sent[1:]] == len(too_large) * ["MemoryBudgetError"]
    assert len(made.waiting) == 1 and not made.loras["pocket"], "nothing was loaded"


def is_enough(pipeline: ZImagePipeline, budget: int) -> bool:
    pipeline.budget = budget
    try:
        pipeline.plan(GenerateRequest(PROMPT, 32, 32, seed=1, steps=1))
    except MemoryBudgetError:
        return False
    return True


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ([{"name": "style"}, {"name": "style"}], "uses LoRA 'style' twice"),
        ([{"name": "style"}, {"name": "copy"}], "the LoRAs 'style' and 'copy' are the same; use only one of them"),
        ([{"name": "gone"}], "'gone' is no longer in the server's folder"),
        ([{"name": "style", "sha256": "0" * 64}], "does not have SHA-256 0000"),
        ([{"name": "flux"}], "flux.safetensors: 2 of 2 keys match no layer of Z-Image"),
    ],
)
def test_loras_that_cannot_be_used_are_refused_before_the_request_is_queued(small_pocket, tmp_path, loras, message):
    write_lora(tmp_path / "style.safetensors")
    shutil.copy(tmp_path / "style.safetensors", tmp_path / "copy.safetensors")
    names = [f"single_blocks.0.lora_{part}.weight" for part in "AB"]
    mx.save_safetensors(str(tmp_path / "flux.safetensors"), {name: mx.zeros((4, 4)) for name in names})
    made, sent = opened_worker(small_pocket, tmp_path)
    made.check(job(loras=loras))
    assert message in sent[-1].message and str(tmp_path) not in sent[-1].message and not made.waiting


def test_a_request_downloads_nothing(small_pocket, tmp_path, monkeypatch):
    """Networks for poses and depth are used if they are here."""
    monkeypatch.setattr(detectors, "find_spec", lambda module: True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    made, sent = opened_worker(small_pocket, tmp_path)
    made.models["pocket"].pipeline.load_controlnet("pocket")
    for kind in ("pose", "depth"):
        controlled = replace(job(controls=[{"prepare": kind}]), controls=(png(Image.new("RGB", (32, 32))),))
        made.check(controlled)
        assert sent[-1].kind == "ModelNotFoundError"
        assert f"not downloaded what it needs to make control images of kind {kind}" in sent[-1].message
        for file in detectors.MODELS[kind]:
            folder = tmp_path / f"models--{file.repository.replace('/', '--')}/snapshots/{file.revision}"
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.name).touch()
        made.check(controlled)
        assert isinstance(sent[-1], Accepted)


def test_kinds_of_control_images_whose_library_is_not_installed_are_not_listed(small_pocket, tmp_path, monkeypatch):
    made, _ = opened_worker(small_pocket, tmp_path)
    model = made.models["pocket"]
    assert worker.described("pocket", model).control_kinds == ()
    model.pipeline.load_controlnet("pocket")
    for missing, kinds in (("none", CONTROLS), ("cv2", set(CONTROLS) - {"lines"}), ("onnxruntime", CONTROLS[:5])):
        monkeypatch.setattr(detectors, "find_spec", lambda name, missing=missing: name != missing or None)
        assert set(worker.described("pocket", model).control_kinds) == set(kinds)


def test_unloading_a_model_unloads_its_loras(small_pocket, tmp_path):
    write_lora(tmp_path / "style.safetensors")
    made, _ = opened_worker(small_pocket, tmp_path)
    made.running = 0
    assert made.images(job(loras=[{"name": "style"}]))
    assert made.models["pocket"].pipeline.get_active_adapters() == ["style"]
    made.unload()
    assert made.models["pocket"].pipeline.get_active_adapters() == [] and not made.loras["pocket"]


def test_results_are_kept_for_an_hour_and_within_limits(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(results, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    kept = results.Results()
    first, second = kept.put(b"first", ".png"), kept.put(b"second", ".jpg")
    assert first != second and second.endswith(".jpg") and kept.get(first) == b"first"
    clock[0] = results.KEPT_S
    assert kept.get(first) is None
    monkeypatch.setattr(results, "MAX_BYTES", 10)
    names = [kept.put(bytes(4), ".png") for _ in range(4)]
    assert [kept.get(name) is not None for name in names] == [False, False, True, True]


@pytest.mark.parametrize(
    ("steps", "previews", "expected"),
    [(8, 3, [1, 3, 5]), (8, 1, [3]), (8, 0, []), (2, 3, [0]), (1, 3, []), (9, 2, [2, 5])],
)
def test_previews_are_spread_over_the_steps(steps, previews, expected):
    assert worker.preview_steps(steps, previews) == expected


@pytest.mark.parametrize(
    ("takes_guidance", "honor", "given", "kept", "said"),
    [
        (False, False, {"steps": 50, "guidance": 4}, {"steps": 8, "guidance": 0}, "steps 50 -> 8, guidance 4 -> 0"),
        (False, False, {"steps": 9}, {"steps": 9}, None),
        (False, True, {"steps": 50, "guidance": 4}, {"steps": 50, "guidance": 4}, None),
        (True, False, {"steps": 50, "guidance": 4}, {"steps": 50, "guidance": 4}, None),
        (False, False, {"steps": "many", "guidance": None}, {"steps": "many", "guidance": None}, None),
    ],
)
def test_steps_and_guidance_are_adjusted_for_turbo_only(takes_guidance, honor, given, kept, said):
    model = Model("m", "turbo", 8, 1024, takes_guidance, 0.0, "")
    headers = Service(None, honor_client_steps=honor).adjust(given, model, "guidance", 0.0)
    assert given == kept and headers == ({} if said is None else {ADJUSTED: said})


@pytest.mark.parametrize("served", ["z-image-turbo", "Tongyi-MAI/Z-Image-Turbo"])
def test_a_model_goes_by_its_alias_and_its_id(served):
    models = [Model(name, "turbo", 8, 1024, False, 0.0, "") for name in ("other", served)]
    service = Service(SimpleNamespace(models=models))
    for name in ("z-image-turbo", "turbo", "Tongyi-MAI/Z-Image-Turbo"):
        assert service.model(name).name == served
    assert service.model("other").name == service.model(None).name == service.model("").name == "other"
    for name in ("z-image", "Z-Image-Turbo", "../other", ["other"], 1):
        with pytest.raises(Refusal, match="is served; expected other, "):
            service.model(name)


@pytest.mark.parametrize(
    ("module", "kind"),
    [("None", None), ("canny", "canny"), ("tile_resample", "tile"), ("scribble_hed", "scribble"), ("mlsd", "lines"),
     ("depth_anything_v2", "depth"), ("openpose_full", "pose"), ("dw_openpose_full", "pose")],
)  # fmt: skip
def test_a_module_of_a1111s_extension_is_a_kind_of_control_image(module, kind):
    scripts = {"ControlNet": {"args": [{"module": module, "image": "AAAA", "weight": 1}]}}
    assert units_of(scripts, None) == ([{"scale": 1, "prepare": kind}], (b"\0\0\0",))


def test_loras_are_the_visible_files_of_the_folder_alone(tmp_path):
    for name in ("a.safetensors", ".b.safetensors", "._a.safetensors", "c.bin", "d.safetensors/e.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert lora_files(tmp_path) == {"a": tmp_path / "a.safetensors"} and lora_files(None) == {}


def test_a_controlnet_that_needs_more_steps_gets_them():
    model = Model("m", "turbo", 8, 1024, False, 0.0, "", "union", 20)
    for steps, kept in ((50, 20), (20, 20), (12, 12)):
        values = {"steps": steps}
        Service(None).adjust(values, model, "guidance", 0.0, controlled=True)
        assert values == {"steps": kept}


def test_an_error_names_files_without_their_folders(tmp_path):
    made = worker.Worker(None, Options({"m": "/models/z image"}, tmp_path / "my loras"))
    said = made.without_paths(
        f"{tmp_path}/my loras/a.safetensors is damaged; see /models/z image/vae and /etc/x/y.json"
    )
    assert said == "a.safetensors is damaged; see vae and y.json"
    assert made.without_paths("the image has 1/2 of it") == "the image has 1/2 of it"


def test_the_service_for_launchd_runs_a_command_that_exists():
    words = plistlib.loads((Path(__file__).parents[1] / "examples/server.plist").read_bytes())["ProgramArguments"]
    assert words[0].endswith("/.venv/bin/mlx-zimage") and words[1] == "serve"
    command = main.resolve_command(click.Context(main), words[1:])[1]
    command.make_parser(click.Context(command)).parse_args(words[2:])
