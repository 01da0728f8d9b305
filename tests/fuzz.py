"""Feed every parser of untrusted input with mutations of valid ones, for a time, and report what it could not take.

    python tests/fuzz.py [PARSER ...] [--seconds 60] [--seed 0] [--keep FOLDER]

A parser may only raise a ZImageError: anything else, a crash, more than 1 s or more than 200 MB is a finding, and its
input is kept. Prints, for each parser: executions, findings, the slowest input and the most memory.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import tiny
from PIL import Image

from mlx_zimage.convert import gguf
from mlx_zimage.convert.sources import open_source
from mlx_zimage.errors import UNSAFE, ZImageError
from mlx_zimage.images.codec import encode
from mlx_zimage.images.metadata import Origin, parameters, read_origin
from mlx_zimage.inputs import read_latents
from mlx_zimage.jobs import lines_of, multiply, parse_seeds, parse_size, read_prompts, read_requests
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.request import GenerateRequest
from mlx_zimage.sizes import parse_memory
from mlx_zimage.tokenizer import Tokenizer
from mlx_zimage.weights.checkpoint import open_headers, read_conversion
from mlx_zimage.weights.component import read_header, read_weight_map
from mlx_zimage.weights.lora import describe, read_lora
from mlx_zimage.weights.manifest import read_manifest

MAX_SECONDS, MAX_BYTES = 1.0, 200 * 10**6
CONFIGS = {
    "transformer": TransformerConfig.from_dict(tiny.TRANSFORMER),
    "text_encoder": TextEncoderConfig.from_dict(tiny.TEXT_ENCODER),
}
VALUES = (
    *(0, 1, -1, 2, 3, 4, 7, 63, 64, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400),
    *(0.0, -0.5, 0.1, 1e-320, 1e308, float("nan"), float("inf"), True, False, None),
    *("", "a", "\0", "\x1b[2J", "\ud800", "../../etc/passwd", "/etc/passwd", "a" * 300, "1", "F32", "BF16", "U32"),
    *([], {}, [[]], [1], [0, 0], [1, 2, 3, 4], [-1], ["a"], {"a": 1}, [[[[[[[[]]]]]]]]),
)
PIECES = (b"\0", b"\xff", b"\n", b'"', b"{", b"[", b"]", b",", b"1e999", b"\xed\xa0\x80", b"\\u0000")


# ---- mutations


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few changes of bytes: flips, runs, numbers of every width, and parts cut out, repeated or moved."""
    out = bytearray(content)
    for _ in range(1 + min(rng.getrandbits(3), rng.getrandbits(3))):
        at, n = rng.randrange(len(out) + 1), rng.choice((1, 2, 4, 8, 30, 300))
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + n] = rng.randbytes(n)
        elif kind == 2:
            value = rng.choice([value for value in VALUES if type(value) is int]) & (2**64 - 1)
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = value.to_bytes(8, "little")[:width]
        elif kind == 3:
            del out[at : at + n]
        elif kind == 4:
            out[at:at] = out[at : at + n] * rng.choice((1, 2, 100))
        elif kind == 5:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + n]
        elif kind == 6:
            del out[at:]
        else:
            out[at:at] = rng.choice(PIECES)
    return bytes(out)


def mutate_json(value, rng: random.Random):
    """A copy of a value with a few parts replaced, removed, added or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(1 + min(rng.getrandbits(2), rng.getrandbits(2))):
        places: list[tuple] = []
        collect(value, places)
        if not places:
            return rng.choice(VALUES)
        inside, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind < 3:
            inside[key] = deepcopy(rng.choice(VALUES))
        elif kind == 3:
            del inside[key]
        elif kind == 4:
            other, place = rng.choice(places)
            try:
                inside[key] = json.loads(json.dumps(other[place]))
            except (LookupError, TypeError):
                continue
        elif isinstance(inside, dict):
            inside[str(rng.choice((*VALUES[20:], *inside)))] = deepcopy(inside[key])
        else:
            inside.insert(key, deepcopy(rng.choice(VALUES)))
    return value


def collect(value, places: list[tuple]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        places.append((value, key))
        collect(inner, places)


def mutate_text(content: bytes, rng: random.Random) -> bytes:
    """JSON, mutated as a value or as bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    try:
        value = json.loads(content)
    except ValueError:
        return mutate_bytes(content, rng)
    text = json.dumps(mutate_json(value, rng)).encode()
    return mutate_bytes(text, rng) if rng.random() < 0.1 else text


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    return b"\n".join([*lines[:i], mutate_text(lines[i], rng), *lines[i + 1 :]])


def mutate_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header mutated, as a value or as bytes."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.1:
        return mutate_bytes(content, rng)
    if rng.random() < 0.1:
        return mutate_bytes(content[: 8 + length], rng) + content[8 + length :]
    text = mutate_text(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


# ---- parsers: the valid inputs they start from, how these are mutated, and what reads them


@dataclass(frozen=True)
class Parser:
    seeds: Callable[[Path], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]  # from the file with the input
    name: str = "input"


def model(folder: Path) -> Path:
    """A tiny model's folder, made once."""
    if not (folder / "model").exists():
        tiny.write_checkpoint(folder / "model", seed=0)
    return folder / "model"


def of_model(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(model(folder) / name).read_bytes()]


def in_model(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Reads the model's folder with the input in place of one of its files."""

    def run(file: Path):
        shutil.copyfile(file, model(file.parent) / name)
        return read(model(file.parent))

    return run


def safetensors_seeds(folder: Path) -> list[bytes]:
    tensors = {"x_pad_token": mx.ones((1, 48)), "cap_pad_token": mx.ones((1, 48)), "a.weight": mx.ones((8, 8))}
    packed = {"a.weight": mx.ones((4, 8), mx.uint32), "a.scales": mx.ones((4, 1)), "a.biases": mx.ones((4, 1))}
    qkv = "layers.0.attention.qkv"
    fp8 = {f"{qkv}.weight": mx.ones((6, 8), mx.uint8), f"{qkv}.scale_weight": mx.ones(1)}
    found = []
    for arrays in (tensors, packed, fp8, {**tensors, **packed}):
        mx.save_safetensors(str(folder / "seed.safetensors"), arrays, {"format": "mlx"})
        found.append((folder / "seed.safetensors").read_bytes())
    return [*found, found[2].replace(b'"U8"', b'"F8_E4M3"')]


def single_seeds(folder: Path) -> list[bytes]:
    return [next((model(folder) / name).glob("*.safetensors")).read_bytes() for name in ("transformer", "vae")]


def gguf_seeds(folder: Path) -> list[bytes]:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    pairs = [
        text(b"general.architecture") + struct.pack("<I", 8) + text(b"lumina2"),
        text(b"general.alignment") + struct.pack("<II", 4, 32),
        text(b"tokens") + struct.pack("<IIQ", 9, 8, 3) + text(b"a") * 3,
        text(b"lists") + struct.pack("<IIQ", 9, 9, 2) + (struct.pack("<IQ", 4, 1) + bytes(4)) * 2,
        text(b"split.count") + struct.pack("<IH", 2, 1),
        text(b"split.no") + struct.pack("<IH", 2, 0),
        text(b"scale") + struct.pack("<Id", 12, 0.5),
    ]
    shapes = {b"x_pad_token": (48, 1), b"layers.0.attention.qkv.weight": (48, 144), b"blk.0.attn_q.weight": (256, 4)}
    tensors = [
        text(name) + struct.pack("<IQQIQ", 2, *shape, kind, 0)
        for kind, (name, shape) in zip((0, 1, 12), shapes.items(), strict=True)
    ]
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    return [start + b"".join(pairs + tensors) + bytes(40_000)]


def lora_seeds(folder: Path) -> list[bytes]:
    d = tiny.TRANSFORMER["dim"]
    a, b, square = mx.ones((2, d)), mx.ones((d, 2)), mx.ones((d, d))
    q, flat = "layers.0.attention.to_q", "lora_unet_layers_0_attention_to_q"
    kohya = {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
    peft = json.dumps({"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"to_q": 3}})
    small, alpha = mx.ones((6, 8)), mx.array(2.0)
    files = [
        ({f"transformer.{q}.lora_A.weight": a, f"transformer.{q}.lora_B.weight": b}, {"lora_adapter_metadata": peft}),
        ({**kohya, f"{flat}.alpha": alpha}, {"ss_tag_frequency": '{"a": {"b": 1}}'}),
        ({**kohya, f"{flat}.dora_scale": mx.ones((d, 1))}, {}),
        ({f"{q}.lokr_w1": small, f"{q}.lokr_w2": mx.ones((8, 6)), f"{q}.alpha": alpha}, {}),
        ({f"{q}.lokr_w1": small, f"{q}.lokr_w2_a": mx.ones((8, 2)), f"{q}.lokr_w2_b": mx.ones((2, 6))}, {}),
        ({f"{q}.hada_w{i}_{x}": y for i in (1, 2) for x, y in (("a", b), ("b", a))}, {}),
        ({f"diffusion_model.{q}.diff": square, "diffusion_model.layers.0.attention.to_out.0.diff_b": mx.ones(d)}, {}),
        ({f"{q}.set_weight": square}, {}),
        ({"layers.0.attention.qkv.lora_A.weight": a, "layers.0.attention.qkv.lora_B.weight": mx.ones((3 * d, 2))}, {}),
    ]
    found = []
    for tensors, metadata in files:
        mx.save_safetensors(str(folder / "seed.safetensors"), tensors, metadata)
        found.append((folder / "seed.safetensors").read_bytes())
    return found


def image_seeds(folder: Path) -> list[bytes]:
    origin = Origin(GenerateRequest("a cat, 猫", 16, 16, seed=1, steps=8), "pocket", "0" * 10, "float32")
    pixels = np.zeros((16, 16, 3), np.uint8)
    files = [encode(pixels, ending, origin) for ending in (".png", ".jpg", ".webp")]
    comment = b"ASCII\0\0\0" + json.dumps({"mflux_version": "0.1", "prompt": "a", "seed": 1, "steps": 4}).encode()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.fromarray(pixels).save(folder / "seed.png", exif=exif)
    return [*files, (folder / "seed.png").read_bytes()]


def mutate_image(content: bytes, rng: random.Random) -> bytes:
    """An image whose JSON is mutated where it stands, or any of its bytes. PNG's checksums are made right again."""
    found = content.find(b"{&quot;")
    end = content.find(b"}&quot;", found)
    if found >= 0 and rng.random() < 0.7:
        end = content.index(b'"/>', found)
        text = mutate_text(content[found:end].replace(b"&quot;", b'"'), rng).replace(b'"', b"&quot;")
        content = content[:found] + text + content[end:]
    else:
        content = mutate_bytes(content, rng)
    return with_checksums(content) if content.startswith(b"\x89PNG") else content


def with_checksums(content: bytes) -> bytes:
    out, at = content[:8], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + size]
        known = body[:4] == b"iTXt"
        # the length of a text chunk follows from where the next chunk starts
        end = content.find(b"IDAT", at + 8) - 4 if known and content.find(b"IDAT", at + 8) > 0 else at + 8 + size
        body = content[at + 4 : end - 4] if known else body
        out += len(body[4:]).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        at = end if known else at + 12 + size
    return out


LORA = {"name": "a", "strength": 1.0, "sha256": "0" * 64}
ORIGIN = {
    "request": GenerateRequest("a cat", 16, 16, seed=1, steps=8).to_dict() | {"loras": [LORA]},
    "model": "pocket",
    "fingerprint": "0" * 10,
    "dtype": "float32",
    "index": 0,
    "software": "mlx-zimage 0.1.0",
    "latents": None,
}
MFLUX = {
    "mflux_version": "0.9",
    "prompt": "a cat",
    "seed": 1,
    "steps": 4,
    "guidance": 3.5,
    "width": 64,
    "height": 64,
    "model": "z",
    "lora_paths": ["a"],
    "lora_scales": [1.0],
}
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
CONVERSION = {"source": "a", "converter": "b", "dtype": "bfloat16", "quantization": {"target_bytes": 7}}
MANIFEST = b"0" * 64 + b"  model_index.json\n" + b"1" * 64 + b"  vae/config.json\n"
WORDS = [b"6GB", b"1,2,5", b"3:2", b"1280x720", b"a cat\na dog\n# no", b"<lora:a:1>"]
REQUESTS = [
    {"prompt": "a cat", "seed": 1, "output": "cat.png", "size": "3:2", "guidance": 0, "count": 2},
    {"prompt": "a dog", "width": 64, "height": 64, "steps": 3, "sigmas": [1.0, 0.5, 0.1], "loras": [{"name": "a"}]},
    {"prompt": "猫", "negative_prompt": "b", "rng": "mlx", "num_images": 2, "shift": 3.0, "guidance_scale": 2.0},
]


def npy_seeds(folder: Path) -> list[bytes]:
    np.save(folder / "seed.npy", np.ones((1, 16, 2, 2), np.float32))
    return [(folder / "seed.npy").read_bytes()]


def read_image(file: Path) -> None:
    parameters(read_origin(file))


def read_lines(file: Path) -> None:
    with file.open("rb") as stream:
        requests = read_requests(lines_of(stream, "requests"), "requests")
    for series in multiply({"prompt": "a"}, requests, [1], Path("image.png")):
        job = next(iter(series))
        job.path(job.request(1024))


def read_words(file: Path) -> None:
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    for parse in (parse_memory, parse_seeds, parse_size, lambda text: read_prompts(text.split(), "prompts")):
        with suppress(ZImageError):
            parse(text)
    GenerateRequest(text, seed=0)


def read_single(file: Path) -> None:
    open_source(file, base=model(file.parent))


def read_sums(folder: Path) -> None:
    for name in read_manifest(folder):
        assert (folder / name).is_relative_to(folder)


def read_a_lora(file: Path) -> None:
    for partial in (False, True):
        lora = read_lora(file, CONFIGS, partial)
        describe(lora)
        assert all(delta.shape for deltas in lora.deltas.values() for delta in deltas.values())


def read_tokenizer(file: Path) -> None:
    Tokenizer(file, file.read_bytes()).encode("a cat, 猫")


def text_of(*values: object) -> Callable[[Path], list[bytes]]:
    return lambda folder: [json.dumps(value).encode() for value in values]


def config(name: str, read: Callable[[Path], object] = open_headers) -> Parser:
    return Parser(of_model(name), mutate_text, in_model(name, read))


PARSERS = {
    "headers": Parser(safetensors_seeds, mutate_header, read_header, "model.safetensors"),
    "single": Parser(single_seeds, mutate_header, read_single, "single.safetensors"),
    "gguf": Parser(gguf_seeds, mutate_bytes, gguf.read_tensors, "dit.gguf"),
    "gguf-file": Parser(gguf_seeds, mutate_bytes, read_single, "dit.gguf"),
    "transformer-config": config("transformer/config.json"),
    "text-encoder-config": config("text_encoder/config.json"),
    "vae-config": config("vae/config.json"),
    "scheduler-config": config("scheduler/scheduler_config.json"),
    "model-index": config("model_index.json"),
    "weight-map": Parser(text_of(INDEX), mutate_text, read_weight_map),
    "conversion": Parser(
        text_of({**CONVERSION, "before": CONVERSION}), mutate_text, in_model("conversion.json", read_conversion)
    ),
    "manifest": Parser(lambda folder: [MANIFEST], mutate_bytes, in_model("SHA256SUMS", read_sums)),
    "tokenizer": Parser(of_model("tokenizer/tokenizer.json"), mutate_text, read_tokenizer),
    "lora": Parser(lora_seeds, mutate_header, read_a_lora, "lora.safetensors"),
    "images": Parser(image_seeds, mutate_image, read_image, "image.png"),
    "sidecars": Parser(text_of(ORIGIN, MFLUX), mutate_text, read_image, "image.json"),
    "json-lines": Parser(lambda folder: ["\n".join(map(json.dumps, REQUESTS)).encode()], mutate_lines, read_lines),
    "words": Parser(lambda folder: WORDS, mutate_bytes, read_words),
    "latents": Parser(npy_seeds, mutate_bytes, read_latents, "latents.npy"),
}


def fuzz(name: str, seconds: float, seed: int, keep: Path, most_inputs: float = math.inf) -> Iterator[dict]:
    """Run one parser in this process, yielding totals now and then; its last input is in the folder keep/name."""
    parser, rng = PARSERS[name], random.Random(seed)
    folder = keep / name
    folder.mkdir(parents=True, exist_ok=True)
    seeds = parser.seeds(folder)
    file = folder / parser.name
    found: dict[str, str] = {}
    slowest, count = 0.0, 0
    before = most = peak()
    end = time.monotonic() + seconds
    while time.monotonic() < end and count < most_inputs:
        content = rng.choice(seeds)
        if count >= len(seeds):
            content = parser.mutate(content, rng)
        file.write_bytes(content)
        began, fault, where = time.process_time(), None, None
        try:
            parser.read(file)
        except ZImageError as error:
            fault = where = "an error that is not plain" if UNSAFE.search(str(error)) else None
        except BaseException as error:  # a panic of a Rust library is not an Exception
            line = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__} in {Path(line.filename).name}:{line.lineno}: {error!s:.100}"
            where = f"{type(error).__name__} {line.filename}:{line.lineno}"
        took = time.process_time() - began
        count += 1
        used = peak()
        if took > MAX_SECONDS:
            fault = where = f"{took:.1f} s"
        if used - most > MAX_BYTES:
            fault = where = f"{(used - most) / 1e6:.0f} MB"
        most = max(most, used)
        if took > slowest:
            slowest = took
            shutil.copyfile(file, folder / "slowest")
        if fault and where not in found:
            found[where] = fault
            (folder / f"finding-{len(found)}").write_bytes(content)
            print(f"{name}: {fault}", flush=True)
        if fault or count % 100 == 0:
            yield totals(count, len(found), slowest, (most - before) / 1e6)
    yield totals(count, len(found), slowest, (most - before) / 1e6)


def totals(executions: int, findings: int, slowest_s: float, memory_mb: float) -> dict:
    return {"executions": executions, "findings": findings, "slowest_s": slowest_s, "memory_mb": memory_mb}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_child(name: str, seconds: float, seed: int, keep: Path) -> dict:
    """The same in a process of its own; a crash is a finding, after which another one goes on with the next seed."""
    total, end = totals(0, 0, 0.0, 0.0), time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("spawn").Process(target=_child, args=(name, left, seed, keep, theirs))
        child.start()
        theirs.close()
        done = totals(0, 0, 0.0, 0.0)
        with suppress(EOFError):
            while True:
                done = ours.recv()
        child.join()
        if child.exitcode:
            done["findings"] += 1
            shutil.copyfile(keep / name / PARSERS[name].name, keep / name / f"crash-{seed}")
            print(f"{name}: the process ended with {child.exitcode}", flush=True)
        for key, value in done.items():
            total[key] = total[key] + value if key in ("executions", "findings") else max(total[key], value)
        seed += 1
    return total


def _child(name: str, seconds: float, seed: int, keep: Path, results) -> None:
    mx.set_default_device(mx.cpu)
    os.chdir(keep)
    warnings.simplefilter("ignore")
    for row in fuzz(name, seconds, seed, keep):
        results.send(row)


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(PARSERS))
    command.add_argument("--seconds", type=float, default=60, help="for each parser")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--keep", type=Path, help="the folder for findings")
    given = command.parse_args()
    keep = (given.keep or Path(tempfile.mkdtemp())).absolute()
    keep.mkdir(exist_ok=True)
    findings = 0
    print(f"seed {given.seed}, findings in {keep}")
    print(f"{'parser':22}{'executions':>12}{'findings':>10}{'slowest':>10}{'memory':>10}")
    for name in given.parsers or PARSERS:
        row = in_child(name, given.seconds, given.seed, keep)
        findings += row["findings"]
        print(
            f"{name:22}{row['executions']:12,}{row['findings']:10}{1000 * row['slowest_s']:7.0f} ms"
            f"{row['memory_mb']:7.0f} MB",
            flush=True,
        )
    sys.exit(f"{findings} findings in {keep}" if findings else 0)


if __name__ == "__main__":
    main()
