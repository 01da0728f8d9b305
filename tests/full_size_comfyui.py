"""Convert ComfyUI files of the transformer's full size: python tests/full_size_comfyui.py FOLDER [bf16 int8 nvfp4]

Prints the seconds that each conversion takes, beside those of cp for as many bytes, and the memory above that of an
interpreter that has imported the converter; fails above 1 GB. The weights are random; comfy-kitchen quantizes those of
one block, which every block then has. Takes up to 25 GB of disk, freed at the end.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from measure import measured

from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.names import comfyui_name

sys.path.insert(0, str(Path(__file__).parent / "golden"))
FORMATS = {"bf16": None, "int8": "int8-convrot", "nvfp4": "nvfp4"}
MATRIX = re.compile(r"(layers|\w+_refiner)\.\d+\.(attention\.(qkv|out)|feed_forward\.w[123])\.weight")
MOST = 10**9  # bytes
RANDOM = np.random.default_rng(0).standard_normal(2**20).astype(np.float32) / 50
IMPORTS = "from mlx_zimage.convert import convert"
WORK = "convert(sys.argv[1], sys.argv[2], base=sys.argv[3])"


def stacked() -> dict[str, tuple[int, ...]]:
    """The shapes of the transformer's tensors by ComfyUI's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, *rest) in TransformerConfig().shapes().items():
        own = comfyui_name("transformer", name)
        shapes[own] = (shapes[own][0] + rows if own in shapes else rows, *rest)
    return shapes


def write(file: Path, kind: str) -> None:
    """A file of one kind; matrices of equal shape have the same bytes, so that little is in memory."""
    made: dict[tuple[int, ...], dict] = {}
    header, contents, offset = {}, [], 0
    for name, shape in stacked().items():
        own = {"weight": ("BF16", shape, 2 * int(np.prod(shape)), partial(dense, shape))}
        if FORMATS[kind] and MATRIX.fullmatch(name):
            own = made[shape] = made.get(shape) or quantized(FORMATS[kind], shape)
        for suffix, (dtype, size, nbytes, content) in own.items():
            key = name if suffix == "weight" else f"{name.removesuffix('.weight')}.{suffix}"
            header[key] = {"dtype": dtype, "shape": size, "data_offsets": [offset, offset + nbytes]}
            contents.append(content)
            offset += nbytes
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for content in contents:
            stream.write(content())


def dense(shape: tuple[int, ...]) -> bytes:
    """Random bfloat16 that repeats after a million values."""
    return np.resize((RANDOM.view(np.uint32) >> 16).astype(np.uint16), int(np.prod(shape))).tobytes()


def quantized(form: str, shape: tuple[int, ...]) -> dict[str, tuple]:
    """By suffix: the dtype, shape, size and content of what comfy-kitchen stores."""
    import torch
    from comfyui_layers import layer

    names = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    parts, _ = layer(form, torch.from_numpy(np.resize(RANDOM, shape)))
    return {
        suffix: (names[t.dtype], tuple(t.shape), t.nbytes, t.reshape(-1).view(torch.uint8).numpy().tobytes)
        for suffix, t in parts.items()
    }


def base(folder: Path) -> Path:
    """What the file lacks: the pocket model, with a text encoder of two layers that is as wide as the real one."""
    shutil.copytree(POCKET, folder)
    (folder / "transformer" / "config.json").write_text(json.dumps(vars(TransformerConfig())))
    file = folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text()) | {"hidden_size": 2560, "num_hidden_layers": 2}
    file.write_text(json.dumps(config))
    shapes = TextEncoderConfig.from_dict(config).shapes()
    mx.save_safetensors(str(folder / "text_encoder" / "model.safetensors"), {n: mx.ones(x) for n, x in shapes.items()})
    return folder


def main(folder: Path, kinds: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    other = base(folder / "base")
    for kind in kinds:
        file, out = folder / f"z_image_turbo_{kind}.safetensors", folder / "out"
        write(file, kind)
        began = time.monotonic()
        _, used = measured(IMPORTS, WORK, file, out, other)
        seconds = time.monotonic() - began
        total = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
        began = time.monotonic()
        subprocess.run(["cp", str(file), str(folder / "copy")], check=True)
        subprocess.run(["sync", str(folder / "copy")], check=True)
        copied = (time.monotonic() - began) / file.stat().st_size
        print(
            f"{kind}: {file.stat().st_size / 1e9:.1f} GB to {total / 1e9:.1f} GB in {seconds:.0f} s, "
            f"{used / 1e6:.0f} MB above the interpreter; cp writes as much in {copied * total:.0f} s",
            flush=True,
        )
        assert used < MOST
        (folder / "copy").unlink()
        file.unlink()
        shutil.rmtree(out)
    shutil.rmtree(other)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(FORMATS))
