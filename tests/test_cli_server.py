"""`generate --server`: the same files as without it, from a model that is loaded once."""

import base64
import json
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from click.testing import CliRunner, Result
from lanes import slow
from PIL import Image
from serving import KEY, PROMPT, answering

from mlx_zimage.cli import main, remote
from mlx_zimage.cli.remote import SENT_OTHERWISE, form
from mlx_zimage.images.codec import to_png
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.request import GenerateRequest
from mlx_zimage.server.openai import EXTENSIONS

# Fields of a request that the server has under other names, or for each image.
OTHERWISE = SENT_OTHERWISE | {"prompt", "seed"}
WORDS = ("generate", PROMPT, "--seed", "3", "--steps", "2")


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    """run("generate", ...) with the server, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_ZIMAGE_API_KEY", KEY)
    monkeypatch.setenv("MLX_ZIMAGE_SERVER", server.url)
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words])


def alone(small_pocket, *words: object) -> Result:
    options = ("--model", small_pocket, "-o", "alone.png", "--overwrite", "-q")
    return CliRunner(env={"MLX_ZIMAGE_SERVER": None}).invoke(main, [str(word) for word in (*words, *options)])


def same(a: str, b: str) -> bool:
    return np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


def test_every_field_of_a_request_is_known_to_the_server():
    assert {field.name for field in fields(GenerateRequest)} == {*EXTENSIONS, *OTHERWISE}


@pytest.mark.parametrize("options", [(), ("--size", "3:2", "--shift", "5"), slow(("--size", "48x32", "--rng", "mlx"))])
def test_the_image_is_the_one_that_is_generated_without_the_server(run, small_pocket, options):
    result = run(*WORDS, *options, "-o", "{seed}-{width}.png")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "Seed: 3\n"
    alone(small_pocket, *WORDS, *options)
    (name,) = result.stdout.split()
    assert same(name, "alone.png")
    assert name == f"3-{Image.open(name).width}.png"
    assert read_origin(Path(name)).request == read_origin(Path("alone.png")).request


def test_image_to_image_outpainting_and_masks_are_sent(run, small_pocket):
    Image.new("RGB", (64, 48), "white").save("photo.png")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 32, 48))
    mask.save("mask.png")
    for options in (("--strength", "0.5"), ("--mask", "mask.png", "--mask-feather", "4"), ("--outpaint", "left=16")):
        words = (*WORDS, "--image", "photo.png", *options)
        result = run(*words, "-o", "server.png", "--overwrite")
        assert result.exit_code == 0, result.stderr
        alone(small_pocket, *words)
        assert same("server.png", "alone.png")


def test_several_seeds_and_json_and_other_formats(run):
    result = run("generate", PROMPT, "--seed", "1", "2", "--steps", "1", "--json", "-q", "-o", "{seed}.webp")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["path"], row["request"]["seed"], row["model"]) for row in rows] == [
        ("1.webp", 1, "pocket"),
        ("2.webp", 2, "pocket"),
    ]
    assert Image.open("1.webp").format == "WEBP"
    run(*WORDS, "--no-metadata", "-o", "bare.png")
    assert "XML:com.adobe.xmp" not in Image.open("bare.png").info


def test_a_lora_is_named_by_its_file(run):
    plain, styled = (run(*WORDS, *lora, "-o", "a.png").stdout.strip() for lora in ((), ("--lora", "style", "0.5")))
    assert plain and styled and not same(plain, styled)
    assert [(use.name, use.strength) for use in read_origin(Path(styled)).request.loras] == [("style", 0.5)]


def test_what_the_server_changes_is_a_warning(run):
    result = run("generate", PROMPT, "--seed", "3", "--steps", "12", "--size", "32x32")
    assert result.exit_code == 0 and "generated with steps 8 instead of 12" in result.stderr


def test_control_images_are_sent(run, small_pocket):
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save("photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save("mask.png")
    for options in (
        ("--control", "canny:photo.png", "--control", "photo.png", "--control-scale", "0.5", "--control-end", "1"),
        ("--control", "inpaint", "--image", "photo.png", "--mask", "mask.png", "--mask-resample", "0"),
    ):
        result = run(*WORDS, *options, "-o", "server.png", "--overwrite")
        assert result.exit_code == 0, result.stderr
        alone(small_pocket, *WORDS, *options, "--control-model", "pocket")
        assert same("server.png", "alone.png")
        assert read_origin(Path("server.png")).request == read_origin(Path("alone.png")).request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "flux"), "does not serve the model 'flux'; it has pocket"),
        (("--lora", "other"), "no LoRA 'other' is served; expected style"),
        (("--size", "8192x8192"), "the largest size that fits is"),
        (("--dtype", "float32"), "--dtype cannot be used with --server"),
        (("--control-model", "pocket"), "--control-model cannot be used with --server"),
        (("--preview",), "--preview cannot be used with --server"),
        (("--server", "http://127.0.0.1:1"), "no server answers at http://127.0.0.1:1"),
        (("--server", "127.0.0.1"), "--server takes a URL such as http://127.0.0.1:8796"),
    ],
)
def test_what_cannot_be_done_there_is_an_error(run, options, message):
    result = run(*WORDS, *options)
    assert result.exit_code and message in result.stderr
    assert not list(Path().glob("*.png"))


ORIGIN = {"request": {"prompt": PROMPT}, "model": "a", "fingerprint": "0" * 10, "dtype": "float32"}
COMPLETE = ORIGIN | {"request": GenerateRequest(PROMPT, seed=3, steps=2).to_dict()}
PNG = to_png(np.zeros((64, 64, 3), np.uint8))
ENDLESS = PNG[:33] + (bytes(4) + b"teSt" + crc32(b"teSt").to_bytes(4)) * 60_000 + PNG[33:]  # chunks after its header
LISTED = b'{"data": [{"id": "a", "size": 64}]}'


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps({"type": "image_generation.completed", **fields}).encode() + b"\n\n"


def progress(**fields: object) -> bytes:
    return event(**{"type": "image_generation.progress", "position": 0, "step": 1, "steps": 2, **fields})


@pytest.mark.parametrize(
    ("models", "answer"),
    [
        *((listed, b"") for listed in (b"", b"[" * 10**6, b"{}", b'{"data": 7}', b'{"data": [7]}', b'{"data": [{}]}')),
        (b'{"data": [{"id": {}, "size": 64}]}', b""),
        *(
            (b'{"data": [{"id": "a", "size": %s}]}' % size, b"")
            for size in (b'"64"', b"0", b"-64", b"1e999", b"9" * 99)
        ),
        (b" " * (8 * 2**20 + 1), b""),
        *((LISTED, content) for content in (b"", b"<html>", b"data: ", b"data: 7\n", b"data: {}\n", b"data: \xff\n")),
        (LISTED, event(b64_json="", origin=ORIGIN)),
        (LISTED, event(b64_json="a", origin=ORIGIN)),
        (LISTED, event(b64_json=base64.b64encode(b"#!/bin/sh\nrm -rf ~").decode(), origin=ORIGIN)),
        (LISTED, event(b64_json=base64.b64encode(ENDLESS).decode(), origin=COMPLETE)),
        (LISTED, event(b64_json=7, origin=ORIGIN)),
        (LISTED, event(b64_json="", origin={})),
        (LISTED, event(type=7)),
        *((LISTED, progress(**{name: "\x1b[2J"})) for name in ("position", "step", "steps")),
        (LISTED, progress(step=-1)),
        (LISTED, event(error={"message": "\x1b[2J" + "a" * 10**6})),
        (LISTED, event(error="a")),
    ],
)
def test_whatever_another_server_answers_is_an_error_and_leaves_no_file(tmp_path, monkeypatch, models, answer):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(models)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *words):
            pass

    monkeypatch.chdir(tmp_path)
    with answering(HTTPServer(("127.0.0.1", 0), Handler)) as url:
        result = CliRunner().invoke(main, [*WORDS, "--server", url])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert f"Error: {url}" in result.stderr and "\x1b" not in result.stderr and len(result.stderr) < 5000
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("full", "waits"), [(2, [7, 600]), (99, [7] + [600] * 8)])
def test_a_full_queue_is_waited_for_as_long_as_the_server_says(monkeypatch, tmp_path, full, waits):
    """And the request is sent ten times at most."""
    asked, waited = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, LISTED)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            if len(asked) <= full:
                content = json.dumps({"error": {"message": "the queue is full"}}).encode()
                self.answer(429, content, "7" if len(asked) == 1 else "99999")
            else:
                self.answer(200, event(error={"message": "a place was free"}))

        def answer(self, status, content, after=None):
            self.send_response(status)
            if after:
                self.send_header("Retry-After", after)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words):
            pass

    monkeypatch.chdir(tmp_path)
    # not for the whole process, in which other tests have left watchdogs
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waited.append))
    with answering(HTTPServer(("127.0.0.1", 0), Handler)) as url:
        result = CliRunner().invoke(main, [*WORDS, "--server", url])
    assert waited == waits and len(asked) == len(waits) + 1 <= 10
    assert result.exit_code == 1 and "queue is full; trying again in 7 s" in result.stderr
    assert ("a place was free" if full == 2 else "Error: http://") in result.stderr.splitlines()[-1]


def test_an_invalid_address_or_key_is_an_error(run, monkeypatch):
    assert "--server takes a URL" in run(*WORDS, "--server", "http://[::1").stderr
    monkeypatch.setenv("MLX_ZIMAGE_API_KEY", "a\nb")
    result = run(*WORDS)
    assert result.exit_code == 1 and "no server answers" in result.stderr


def test_a_missing_key_is_asked_for(run, monkeypatch):
    monkeypatch.delenv("MLX_ZIMAGE_API_KEY")
    result = run(*WORDS)
    assert result.exit_code and "set MLX_ZIMAGE_API_KEY to the server's key" in result.stderr


def test_a_form_has_strings_as_they_are_and_other_values_as_json():
    body, kind = form({"prompt": "12", "steps": 3, "stream": True}, {"image": b"\0\r\n--"})
    assert kind.partition("=")[2].encode() in body
    for part in (
        b'name="prompt"\r\n\r\n12\r\n',
        b'name="steps"\r\n\r\n3\r\n',
        b"\r\n\r\ntrue\r\n",
        b"\r\n\r\n\0\r\n--\r\n",
    ):
        assert part in body
