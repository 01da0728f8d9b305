"""Feed mutations of valid inputs to every parser of untrusted input for a while, and report what it failed on.

    python tests/fuzz.py [PARSER ...] [--seconds 60] [--seed 0] [--processes 1] [--results FILE] [--keep FOLDER]

A parser may only raise a ZImageError: anything else, a crash, a hang, more than 1 s or more than 200 MB is a finding,
and its input is kept. Prints, for each parser: executions, seconds, findings, the slowest input and the most memory.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import comfyui_files
import controls
import mlx.core as mx
import numpy as np
import tiny
from measure import peak
from PIL import Image, ImageCms

from mlx_zimage.cli import remote
from mlx_zimage.convert import gguf
from mlx_zimage.convert.files import stored_weights
from mlx_zimage.convert.sources import open_source
from mlx_zimage.drafts import lines_of, multiply, parse_seeds, parse_size, read_prompts, read_requests
from mlx_zimage.errors import UNSAFE, ZImageError
from mlx_zimage.images import source
from mlx_zimage.images.codec import encode
from mlx_zimage.images.metadata import Origin, parameters, read_origin
from mlx_zimage.inputs import NONE, read_latents
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.request import GenerateRequest
from mlx_zimage.sizes import parse_memory
from mlx_zimage.tokenizer import Tokenizer
from mlx_zimage.weights.checkpoint import open_headers, read_conversion
from mlx_zimage.weights.component import read_header, read_metadata, read_weight_map
from mlx_zimage.weights.controlnets import Kind, open_controlnet
from mlx_zimage.weights.lora import describe, read_lora
from mlx_zimage.weights.manifest import read_manifest
from mlx_zimage.weights.store import Store

MAX_SECONDS, MAX_BYTES = 1.0, 200 * 10**6
HANG_SECONDS = 300  # without an answer; a busy machine may take many to start
SLICE_SECONDS = 120
MARK = 120  # bytes of the JSON that marks a quantized layer
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


def mutate_layer(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is mutated, or the JSON that one of its tensors contains."""
    start = content.find(b'{"format"', 8 + int.from_bytes(content[:8], "little"))
    if start < 0 or rng.random() < 0.5:
        return mutate_header(content, rng)
    mark = mutate_text(content[start : start + MARK], rng)[:MARK]
    return content[:start] + mark.ljust(MARK) + content[start + MARK :]


def mutate_events(content: bytes, rng: random.Random) -> bytes:
    """Lines of which some are server-sent events."""
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    head, data, event = lines[i].rpartition(b"data: ")
    return b"\n".join([*lines[:i], head + data + mutate_text(event, rng), *lines[i + 1 :]])


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


def comfyui_seeds(folder: Path) -> list[bytes]:
    found = []
    for form, marked in itertools.product(comfyui_files.FORMS, (False, True)):
        settings, parts, _ = comfyui_files.random_layer(form, 7, 64, np.random.default_rng(0))
        fp8 = comfyui_files.F8_NAMES
        tensors = {f"a.{part}": ("F8_E4M3", x) if (form, part) in fp8 else x for part, x in parts.items()}
        mark = json.dumps({"layers": {"a": settings}})
        if marked:
            tensors["a.comfy_quant"] = np.frombuffer(json.dumps(settings).encode().ljust(MARK), np.uint8)
        metadata = None if marked else {"_quantization_metadata": mark}
        found.append(comfyui_files.save(folder / "seed.safetensors", tensors, metadata).read_bytes())
    return found


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
        text(name) + struct.pack("<IQQIQ", 2, *shape, kind, offset)
        for kind, offset, (name, shape) in zip((0, 1, 12), (0, 192, 14_016), shapes.items(), strict=True)
    ]
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    return [start + b"".join(pairs + tensors) + bytes(40_000)]


def gguf_rows_seeds(folder: Path) -> list[bytes]:
    """Two rows, or a vector, of every type of block, of random bytes."""
    rng, found = random.Random(0), []
    for (number, kind), shape in itertools.product(gguf.BLOCK_KINDS.items(), ((256, 2), (512,))):
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        start = b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + axes + struct.pack("<IQ", number, 0)
        blocks = 512 // kind.values * kind.block_bytes
        found.append(start.ljust(-(-len(start) // 32) * 32, b"\0") + rng.randbytes(blocks))
    return found


def controlnet_seeds(folder: Path) -> list[bytes]:
    found = []
    for tag in controls.CONFIGS:
        arrays = {name: mx.array(array).astype(mx.bfloat16) for name, array in controls.weights(0, tag).items()}
        mx.save_safetensors(str(folder / "seed.safetensors"), arrays)
        found.append((folder / "seed.safetensors").read_bytes())
    return found


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


def photo_seeds(folder: Path) -> list[bytes]:
    """An image of 16x16 in every format that is read, with transparency, a palette, a profile and EXIF."""
    rgb = Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    made: list[tuple[Image.Image, str, dict]] = [
        (rgb, "PNG", {"exif": exif, "icc_profile": profile}),
        *((image, "PNG", {}) for image in (grey, rgb.convert("P"), rgb.convert("RGBA"), rgb.convert("LA"))),
        (rgb, "JPEG", {"exif": exif, "icc_profile": profile}),
        (rgb.convert("CMYK"), "JPEG", {"progressive": True}),
        (rgb, "WEBP", {"exif": exif}),
        (rgb.convert("RGBA"), "WEBP", {"lossless": True, "save_all": True, "append_images": [rgb.rotate(90)]}),
        *((rgb, "TIFF", {"compression": name}) for name in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")),
        (rgb, "BMP", {}),
        (rgb.convert("P"), "GIF", {"save_all": True, "append_images": [rgb.convert("P").rotate(90)]}),
        *([(rgb, "AVIF", {"exif": exif})] if "AVIF" in Image.SAVE else []),
    ]
    found = []
    for image, kind, options in made:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        found.append(stream.getvalue())
    return found


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
CONVERSION |= {"parts": {"transformer": "Z-Image-Turbo-Fun-Controlnet-Union-2.1"}, "loras": [{"name": "a", "scale": 1}]}
MANIFEST = b"0" * 64 + b"  model_index.json\n" + b"1" * 64 + b"  vae/config.json\n"
WORDS = [b"6GB", b"1,2,5", b"3:2", b"1280x720", b"a cat\na dog\n# no", b"<lora:a:1>", b"8-steps, tile"]
REQUESTS = [
    {"prompt": "a cat", "seed": 1, "output": "cat.png", "size": "3:2", "guidance": 0, "count": 2},
    {"prompt": "a dog", "width": 64, "height": 64, "steps": 3, "sigmas": [1.0, 0.5, 0.1], "loras": [{"name": "a"}]},
    {"prompt": "猫", "negative_prompt": "b", "rng": "mlx", "num_images": 2, "shift": 3.0, "guidance_scale": 2.0},
    {
        **{"prompt": "a", "image": "0" * 64, "strength": 0.5, "upscale": 2, "tile": 64, "sample_posterior": True},
        "controls": [{"image": "0" * 64, "prepare": "canny", "scale": 0.5, "start": 0.1, "end": 0.9}, {}],
    },
    {
        **{"prompt": "a", "image": "0" * 64, "mask_image": "1" * 64, "mask_feather": 8, "mask_grow": 2},
        **{"mask_soft": True, "mask_resample": 3, "outpaint": {"left": 16, "top": 0, "right": 0, "bottom": 32}},
    },
]
ANSWERED = {"type": "image_generation.completed", "origin": ORIGIN, "b64_json": ""}  # to be completed
PROGRESS = {"type": "image_generation.progress", "position": 1, "step": 2, "steps": 8, "estimated_seconds": 1.5}
MODELS = {"object": "list", "data": [{"id": "a", "object": "model", "size": 1024, "steps": 8}]}
TO_OPENAI = {
    **{"prompt": "a cat", "model": "pocket", "n": 2, "size": "64x64", "seed": 1, "steps": 4, "guidance": 1.5},
    **{"negative_prompt": "b", "stream": True, "partial_images": 1, "output_format": "webp", "output_compression": 9},
    **{"response_format": "url", "loras": [{"name": "a", "strength": 0.5}], "upscale": 2.0, "progress": True},
}
TO_A1111 = {
    **{"prompt": "a cat <lora:a:0.8>", "negative_prompt": "b", "width": 64, "height": 64, "steps": 4, "seed": -1},
    **{"cfg_scale": 1.5, "batch_size": 1, "n_iter": 2, "sampler_name": "Euler", "enable_hr": True, "hr_scale": 2.0},
    **{"denoising_strength": 0.5, "override_settings": {"sd_model_checkpoint": "pocket"}, "send_images": True},
}
BOUNDARY = "-boundary"


def npy_seeds(folder: Path) -> list[bytes]:
    np.save(folder / "seed.npy", np.ones((1, 16, 2, 2), np.float32))
    return [(folder / "seed.npy").read_bytes()]


def read_image(file: Path) -> None:
    parameters(read_origin(file))


def read_photo(file: Path) -> None:
    image = source.read_image(file)
    assert image.mode in ("RGB", "RGBA") and not image.info
    source.over_white(image)


def read_lines(file: Path) -> None:
    with file.open("rb") as stream:
        requests = read_requests(lines_of(stream, "requests"), "requests")
    for series in multiply({"prompt": "a"}, requests.values(), [1], Path("image.png")):
        job = next(iter(series))
        job.path(job.request(1024))


def read_words(file: Path) -> None:
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    for parse in (
        parse_memory,
        parse_seeds,
        parse_size,
        Kind.parse,
        lambda text: read_prompts(text.split(), "prompts"),
    ):
        with suppress(ZImageError):
            parse(text)
    Kind.of(text)
    GenerateRequest(text, seed=0)


def read_single(file: Path) -> None:
    open_source(file, base=model(file.parent))


def read_rows(file: Path) -> None:
    for tensor in gguf.read_tensors(file).values():
        if tensor.shape and tensor.shape[0]:
            with np.errstate(all="ignore"):  # random scales
                assert gguf.read_floats(tensor, 0, 1).shape == (1, *tensor.shape[1:])


def read_controlnet(source: Path) -> None:
    opened = open_controlnet(source, transformer=TransformerConfig.from_dict(tiny.TRANSFORMER))
    assert str(opened) and opened.fingerprint and opened.scale and opened.steps in (None, 20)


def controlnet(folder: Path) -> Path:
    return folder / "control_v21" if (folder / "control_v21").exists() else controls.write(folder, 0, "control_v21")


def read_controlnet_config(file: Path) -> None:
    folder = controlnet(file.parent)
    shutil.copyfile(file, folder / "config.json")
    read_controlnet(folder)


def answers(folder: Path) -> list[bytes]:
    """What a server answers `generate --server`: its models, and the events of an image."""
    events = [f"event: a\ndata: {json.dumps(event)}\n" for event in (PROGRESS, ANSWERED | {"b64_json": small_text()})]
    return ["\n".join([json.dumps(MODELS), *events]).encode()]


class Answering(remote.Remote):
    """A server that answers with the lines of a file."""

    def __init__(self, content: bytes):
        self.lines = [io.BytesIO(part) for part in content.partition(b"\n")[::2]]
        super().__init__("http://127.0.0.1", None, {})

    def _send(self, *request: object):
        return self.lines.pop(0)


def read_answer(file: Path) -> None:
    Answering(file.read_bytes()).generate(GenerateRequest("a cat", 16, 16, seed=1), ".png", NONE, False, quiet=True)


def ask(path: str, kind: str) -> Callable[[Path], object]:
    """Sends the input to the server's application, whose jobs are checked as the worker does and then refused."""

    def read(file: Path) -> int:
        loras = file.parent / "loras"
        loras.mkdir(exist_ok=True)
        (loras / "a.safetensors").touch()
        return asyncio.run(answer(path, kind, file.read_bytes(), loras))

    return read


async def answer(path: str, kind: str, body: bytes, loras: Path) -> int:
    """The status of the application's answer: 503 for a job that is valid."""
    from mlx_zimage.server import app, errors, guard, messages, service, worker

    class Checked:
        models = (messages.Model("pocket", "Turbo", 8, 1024, False, 0.0, "0" * 10, "union", 8),)

        def submit(self, job: messages.Job) -> None:
            try:
                fields, inputs = worker.read(job)
                for seed in job.seeds:
                    assert GenerateRequest(**fields, seed=seed).to_dict()
                assert inputs.source is None or inputs.source.size
            except ZImageError as error:
                raise errors.Refusal(400, str(error)) from error
            raise errors.Refusal(503, "checked")

    async def receive() -> dict:
        return {"type": "http.request", "body": body}

    async def send(message: dict) -> None:
        statuses.append(message.get("status"))

    statuses: list[int] = []
    head = {"host": "localhost", "content-type": kind, "content-length": str(len(body))}
    headers = [(name.encode(), value.encode()) for name, value in head.items()]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": headers, "scheme": "http", "http_version": "1.1", "server": ("localhost", 80)}  # fmt: skip
    await app.application(service.Service(Checked(), loras), guard.Access())(scope, receive, send)
    assert statuses[0] in (400, 404, 422, 503), statuses
    return statuses[0]


def small_png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", (16, 16)).save(stream, "PNG")
    return stream.getvalue()


def small_text() -> str:
    return base64.b64encode(small_png()).decode()


def to_openai(folder: Path) -> list[bytes]:
    control = {"kind": "canny", "scale": 0.5, "start": 0.1, "end": 0.9, "image": small_text()}
    return [json.dumps(TO_OPENAI | more).encode() for more in ({}, {"control": [control, control]})]


def forms(folder: Path) -> list[bytes]:
    body, kind = remote.form(TO_OPENAI, {"image": small_png(), "mask": small_png()})
    return [body.replace(kind.partition("=")[2].encode(), BOUNDARY.encode())]


def a1111_images(folder: Path) -> list[bytes]:
    image = small_text()
    unit = {"enabled": True, "module": "canny", "weight": 0.5, "guidance_end": 0.9, "image": image, "model": "union"}
    more = {"init_images": [image], "mask": image, "mask_blur": 4, "inpainting_mask_invert": 1}
    units = {"alwayson_scripts": {"ControlNet": {"args": [unit, {"module": "none", "image": {"image": image}}]}}}
    return [json.dumps(TO_A1111 | more | controls).encode() for controls in ({}, units)]


def read_quantized(file: Path) -> None:
    for tensor in stored_weights(read_header(file), [read_metadata(file)], "file").values():
        if tensor.shape and tensor.shape[0]:
            assert tensor.read(0, 1).shape[0] == 1


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


EMBEDDINGS = mx.array(np.arange(6, dtype=np.float32).reshape(2, 3))


def cached(folder: Path) -> Path:
    """The file of one cached array, made anew."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    Store(mx.float32, folder / "cache").put([], ["a"], EMBEDDINGS)
    (file,) = (folder / "cache").iterdir()
    return file


def read_embeddings(file: Path) -> None:
    """A cached array is the one that was stored, or none."""
    shutil.copyfile(file, cached(file.parent))
    found = Store(mx.float32, file.parent / "cache").get([], ["a"], EMBEDDINGS.shape, EMBEDDINGS.dtype)
    assert found is None or mx.array_equal(found, EMBEDDINGS)


def text_of(*values: object) -> Callable[[Path], list[bytes]]:
    return lambda folder: [json.dumps(value).encode() for value in values]


def config(name: str, read: Callable[[Path], object] = open_headers) -> Parser:
    return Parser(of_model(name), mutate_text, in_model(name, read))


PARSERS = {
    "headers": Parser(safetensors_seeds, mutate_header, read_header, "model.safetensors"),
    "single": Parser(single_seeds, mutate_header, read_single, "single.safetensors"),
    "comfyui": Parser(comfyui_seeds, mutate_layer, read_quantized, "layer.safetensors"),
    "controlnet": Parser(controlnet_seeds, mutate_header, read_controlnet, "controlnet.safetensors"),
    "controlnet-config": Parser(
        lambda folder: [(controlnet(folder) / "config.json").read_bytes()], mutate_text, read_controlnet_config
    ),
    "gguf": Parser(gguf_seeds, mutate_bytes, gguf.read_tensors, "dit.gguf"),
    "gguf-rows": Parser(gguf_rows_seeds, mutate_bytes, read_rows, "rows.gguf"),
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
    "photos": Parser(photo_seeds, mutate_image, read_photo, "photo"),
    "sidecars": Parser(text_of(ORIGIN, MFLUX), mutate_text, read_image, "image.json"),
    "json-lines": Parser(lambda folder: ["\n".join(map(json.dumps, REQUESTS)).encode()], mutate_lines, read_lines),
    "words": Parser(lambda folder: WORDS, mutate_bytes, read_words),
    "embeddings": Parser(lambda folder: [cached(folder).read_bytes()], mutate_header, read_embeddings),
    "latents": Parser(npy_seeds, mutate_bytes, read_latents, "latents.npy"),
    "answers": Parser(answers, mutate_events, read_answer),
    "to-openai": Parser(to_openai, mutate_text, ask("/v1/images/generations", "application/json")),
    "to-a1111": Parser(text_of(TO_A1111), mutate_text, ask("/sdapi/v1/txt2img", "application/json")),
    "to-a1111-image": Parser(a1111_images, mutate_text, ask("/sdapi/v1/img2img", "application/json")),
    "forms": Parser(forms, mutate_bytes, ask("/v1/images/edits", f"multipart/form-data; boundary={BOUNDARY}")),
}


# Untrusted numbers are multiplied here, and decide what is allocated, so these parsers are worth more time.
HARD = ("gguf", "gguf-file", *(name for name in PARSERS if name.endswith("-config")))


def fuzz(name: str, seconds: float, seed: int, folder: Path, most_inputs: float = math.inf) -> Iterator[dict]:
    """Run one parser in this process, yielding totals now and then. The folder has the last input and the findings."""
    parser, rng = PARSERS[name], random.Random(seed)
    seeds = parser.seeds(folder)
    file = folder / parser.name
    found: dict[str, str] = {}
    row: dict = {"seconds": 0.0, "executions": 0, "findings": [], "slowest_s": 0.0, "memory_mb": 0.0}
    before = most = peak()
    began = sent = time.monotonic()
    while (now := time.monotonic()) < began + seconds and row["executions"] < most_inputs:
        content = rng.choice(seeds)
        if row["executions"] >= len(seeds):
            content = parser.mutate(content, rng)
        file.write_bytes(content)
        start, fault, where = time.process_time(), None, None
        try:
            parser.read(file)
        except ZImageError as error:
            fault = where = "an error that is not plain" if UNSAFE.search(str(error)) else None
        except BaseException as error:  # a panic of a Rust library is not an Exception
            line = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__} in {Path(line.filename).name}:{line.lineno}: {error!s:.100}"
            where = f"{type(error).__name__} {line.filename}:{line.lineno}"
        took = time.process_time() - start
        used = peak()
        if took > MAX_SECONDS:
            fault = where = f"{took:.1f} s"
        if used > most and used - before > MAX_BYTES:
            fault = where = f"{(used - before) / 1e6:.0f} MB"
        most = max(most, used)
        row["executions"] += 1
        row["seconds"] = now - began
        row["slowest_s"] = max(row["slowest_s"], took)
        row["memory_mb"] = (most - before) / 1e6
        if fault and where not in found:
            found[where] = fault
            row["findings"].append(fault)
            (folder / f"finding-{len(found)}").write_bytes(content)
        if fault or now > sent + 1:
            sent = now
            yield row
    yield row


def in_child(name: str, seconds: float, seed: int, keep: Path, most_inputs: float) -> dict:
    """The same in a process of its own, whose crash or hang is a finding, too. What was found is copied to `keep`."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    row: dict = {"seconds": 0.0, "executions": 0, "findings": [], "slowest_s": 0.0, "memory_mb": 0.0}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place).resolve()
        arguments = (name, seconds, seed, folder, most_inputs, theirs)
        child = multiprocessing.get_context("spawn").Process(target=_child, args=arguments)
        child.start()
        theirs.close()
        with suppress(EOFError):
            while ours.poll(HANG_SECONDS):
                row = ours.recv()
        child.join(HANG_SECONDS)
        if child.exitcode != 0:
            child.kill()
            child.join()
            row["findings"].append(f"the process ended with {child.exitcode}")
            with suppress(OSError):
                shutil.copyfile(folder / PARSERS[name].name, folder / f"finding-{len(row['findings'])}")
        for file in folder.glob("finding-*"):
            shutil.copyfile(file, keep / f"{name}-{seed}-{file.name}")
    return {"parser": name, "seed": seed, **row}


def _child(name: str, seconds: float, seed: int, folder: Path, most_inputs: float, results) -> None:
    mx.set_default_device(mx.cpu)
    os.chdir(folder)
    warnings.simplefilter("ignore")
    logging.disable()
    for row in fuzz(name, seconds, seed, folder, most_inputs):
        results.send(row)


class Campaign:
    """Runs of many parsers, a slice of time each, until every parser has had its inputs or its time."""

    def __init__(self, names: list[str], given: argparse.Namespace):
        self.seconds = {name: given.seconds * (given.hard if name in HARD else 1) for name in names}
        self.given = given
        self.end = time.monotonic() + given.within
        self.rows: list[dict] = []
        self.started: dict[str, float] = dict.fromkeys(names, 0.0)  # seconds of slices, running ones included
        self.seeds = dict.fromkeys(names, given.seed)
        self.lock = threading.Lock()
        if given.results and given.results.exists():
            for row in map(json.loads, given.results.read_text().splitlines()):
                self.rows.append(row)
                if row["parser"] in self.started:
                    self.started[row["parser"]] += row["seconds"]
                    self.seeds[row["parser"]] = max(self.seeds[row["parser"]], row["seed"] + 1)

    def total(self, name: str) -> dict:
        rows = [row for row in self.rows if row["parser"] == name]
        return {
            "executions": sum(row["executions"] for row in rows),
            "findings": sorted({fault for row in rows for fault in row["findings"]}),
            "slowest_s": max((row["slowest_s"] for row in rows), default=0),
            "memory_mb": max((row["memory_mb"] for row in rows), default=0),
            "seconds": sum(row["seconds"] for row in rows),
        }

    def run(self) -> None:
        threads = [threading.Thread(target=self._work) for _ in range(self.given.processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        while taken := self._take():
            row = in_child(*taken)
            with self.lock:
                if row["executions"]:  # otherwise it would be taken again and again
                    self.started[row["parser"]] += row["seconds"] - taken[1]
                self.rows.append(row)
                if self.given.results:
                    with self.given.results.open("a") as stream:
                        stream.write(json.dumps(row) + "\n")
            for fault in row["findings"]:
                print(f"{row['parser']}, seed {row['seed']}: {fault}", flush=True)

    def _take(self) -> tuple[str, float, int, Path, float] | None:
        """The next slice: of the parser that is furthest behind."""
        with self.lock:
            left = {
                name: sys.maxsize
                if name in HARD and self.given.hard > 1
                else self.given.most - self.total(name)["executions"]
                for name in self.started
                if self.started[name] + 1 < self.seconds[name]
            }
            left = {name: n for name, n in left.items() if n > 0}
            until_end = self.end - time.monotonic()
            if not left or until_end < 5:
                return None
            name = min(left, key=lambda name: self.started[name])
            seconds = min(SLICE_SECONDS, until_end, self.seconds[name] - self.started[name])
            self.started[name] += seconds
            self.seeds[name] += 1
            return name, seconds, self.seeds[name] - 1, self.given.keep, left[name]


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(PARSERS))
    command.add_argument("--seconds", type=float, default=60, help="for each parser")
    command.add_argument("--hard", type=float, default=1, help=f"times as many seconds for {', '.join(HARD)}")
    command.add_argument("--most", type=int, default=sys.maxsize, help="inputs for each parser")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--processes", type=int, default=1)
    command.add_argument("--within", type=float, default=1e9, help="seconds, after which the rest is left")
    command.add_argument(
        "--results", type=Path, help="a JSON Lines file to add results to; continues with what is missing from it"
    )
    command.add_argument("--keep", type=Path, help="the folder for findings")
    given = command.parse_args()
    given.keep = (given.keep or Path(tempfile.mkdtemp())).absolute()
    given.keep.mkdir(exist_ok=True, parents=True)
    print(f"seed {given.seed}, findings in {given.keep}", flush=True)
    campaign = Campaign(given.parsers or list(PARSERS), given)
    campaign.run()
    findings = 0
    print(f"{'parser':20}{'executions':>12}{'seconds':>9}{'findings':>10}{'slowest':>10}{'memory':>10}")
    for name in campaign.started:
        row = campaign.total(name)
        findings += len(row["findings"])
        print(
            f"{name:20}{row['executions']:12,}{row['seconds']:9.0f}{len(row['findings']):10}"
            f"{1000 * row['slowest_s']:7.0f} ms{row['memory_mb']:7.0f} MB"
        )
    sys.exit(f"{findings} findings in {given.keep}" if findings else 0)


if __name__ == "__main__":
    main()
