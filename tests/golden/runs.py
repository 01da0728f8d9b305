"""Record the results and costs of requests, so that a refactoring can be checked for the same bits and counts.

    python tests/golden/runs.py

Writes runs.json and runs.safetensors next to this file, or adds to runs.json the digests of a machine whose last bits
differ. They were recorded at commit a29d5d4, before the pipeline was split into networks, stages and streams; this file
uses only the public pipeline of the package, so it runs on that commit as well as on later ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
import numpy as np
import tiny
from safetensors.numpy import load_file, save_file

from mlx_zimage import GenerateRequest, MemoryBudgetError, ZImagePipeline

DIGESTS, ARRAYS = (Path(__file__).with_name(f"runs.{ending}") for ending in ("json", "safetensors"))
LONG = "a red star and a blue circle, " * 8
ABOUT_THE_RUN = {"model", "dtype", "tight", "keep", "latents"}  # fields of a Case that are not fields of a request


@dataclass(frozen=True)
class Case:
    """One request to one model; tight is a budget at most a tenth larger than its smallest plan."""

    model: str
    dtype: str = "float32"
    tight: bool = False
    keep: bool | None = None
    prompt: str = "a red circle"
    width: int = 48
    height: int = 64
    steps: int = 2
    num_images: int = 1
    guidance_scale: float = 0.0
    negative_prompt: str = ""
    shift: float | None = None
    rng: str = "torch"
    latents: bool = False

    @property
    def request(self) -> GenerateRequest:
        settings = {name: value for name, value in vars(self).items() if name not in ABOUT_THE_RUN}
        return GenerateRequest(seed=5, **settings)


GUIDED = {"guidance_scale": 3.0, "negative_prompt": LONG}
WAYS = {"kept": {"keep": True}, "staged": {"keep": False}, "streamed": {"tight": True}}
CASES = {
    **{
        f"{model} {dtype} {name}": Case(model, dtype, **way)
        for model in ("tiny", "pocket", "pocket-4bit", "pocket-mxfp8")
        for dtype in ("float32", "bfloat16", "float16")
        for name, way in WAYS.items()
    },
    **{f"{model} float32": Case(model) for model in ("wide", "faint", "tiny7")},
    **{f"{model} float32": Case(model) for model in ("pocket-8bit", "pocket-3bit", "pocket-mxfp4", "pocket-nvfp4")},
    **{f"pocket guided {name}": Case("pocket", **way, **GUIDED) for name, way in WAYS.items()},
    **{f"tiny guided {dtype}": Case("tiny", dtype, **GUIDED) for dtype in ("float32", "bfloat16", "float16")},
    **{f"pocket three images {name}": Case("pocket", num_images=3, **way) for name, way in WAYS.items()},
    "pocket 80 images in turns": Case("pocket", num_images=80, width=16, height=16, steps=1),
    "pocket 80 images in turns streamed": Case("pocket", num_images=80, width=16, height=16, steps=1, tight=True),
    "tiny long prompt": Case("tiny", prompt=LONG * 3),
    "tiny chinese": Case("tiny", prompt="霓虹灯下的街道，写着「造相」", steps=4),
    "tiny no padding": Case("tiny", width=128, height=64, prompt=tiny.PROMPTS["medium"]),
    "tiny one token": Case("tiny", width=16, height=16),
    "pocket wide": Case("pocket", width=192, height=32),
    "pocket wide streamed": Case("pocket", width=1008, height=16, steps=1, tight=True),
    "pocket shift": Case("pocket", shift=6.0, steps=4),
    "pocket mlx noise": Case("pocket", rng="mlx"),
    "pocket latents": Case("pocket", latents=True),
}


class Models:
    """The path of each model in the cases; a model that is not in the package is written to folder when first used."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, name: str) -> str:
        from mlx_zimage.convert import convert

        path = self.folder / name
        stem, _, stored = name.partition("-")
        if name == "pocket":
            return name
        if path.exists():
            return str(path)
        if stem != "pocket":
            return str(tiny.write_checkpoint(path, 7 if name == "tiny7" else 0, stem.removesuffix("7")))
        options = {"bits": int(stored[0])} if stored.endswith("bit") else {"mode": stored}
        return str(convert("pocket", path, **options))


@contextmanager
def counted() -> Iterator[Counter]:
    """A request's cost: bytes of tensors read from each network's files, calls of the transformer, and attentions."""
    counts: Counter = Counter()
    load, layer_norm, attention = mx.load, mx.fast.layer_norm, mx.fast.scaled_dot_product_attention

    class Read(dict):
        def __init__(self, file: str, arrays: dict):
            super().__init__(arrays)
            self.network = Path(file).parent.name

        def __getitem__(self, name: str) -> mx.array:
            array = super().__getitem__(name)
            counts[f"bytes of the {self.network}"] += array.nbytes
            return array

    def counting_load(file, *args, **options):
        loaded = load(file, *args, **options)
        return Read(file, loaded) if isinstance(loaded, dict) else loaded

    def counting_norm(x, weight, bias, eps):
        counts["calls of the transformer"] += weight is None  # only its last norm has no weight
        return layer_norm(x, weight, bias, eps)

    def counting_attention(*args, **options):
        counts["attentions"] += 1
        return attention(*args, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(mx, "load", counting_load))
        stack.enter_context(patch.object(mx.fast, "layer_norm", counting_norm))
        stack.enter_context(patch.object(mx.fast, "scaled_dot_product_attention", counting_attention))
        yield counts


def run(model: str, case: Case, budget: int | None) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """A case's latents after each step, its pixels, and its counts."""
    pipe = ZImagePipeline.from_pretrained(model, case.dtype, budget, case.keep)
    h, w = case.height // 8, case.width // 8
    latents = tiny.randn(5, "golden", case.num_images, 16, h, w) if case.latents else None
    with counted() as counts:
        events = list(pipe.stream(case.request, latents))
    steps, images = events[: case.steps], events[case.steps :]
    arrays = {
        "latents": np.stack([np.array(step.latents) for step in steps]),
        "clean": np.stack([np.array(step.clean) for step in steps]),
        "pixels": np.stack([image.pixels for image in images]),
    }
    return arrays, dict(sorted(counts.items()))


def least_budget(model: str, case: Case) -> int:
    """A tenth more than the smallest budget in which the case can run."""
    pipe = ZImagePipeline.from_pretrained(model, case.dtype)
    low, high = 1, 10**11
    while high - low > 1000:
        pipe.budget = (low + high) // 2
        try:
            pipe.plan(case.request)
            high = pipe.budget
        except MemoryBudgetError:
            low = pipe.budget
    return high * 11 // 10


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def arithmetic() -> str:
    """Identifies machines on which the same operations give the same bits: processor, BLAS and MLX matter."""
    key, sha = mx.random.key(3), hashlib.sha256()
    a, b = mx.random.normal((192, 512), key=key), mx.random.normal((512, 192), key=key)
    image, kernel = mx.random.normal((1, 16, 16, 32), key=key), mx.random.normal((32, 3, 3, 32), key=key)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        x, y = a.astype(dtype), b.astype(dtype)
        heads = x.reshape(1, 192, 8, 64).transpose(0, 2, 1, 3)
        for rows in (192, 33, 8):
            sha.update(np.array((x[:rows] @ y).astype(mx.float32)).tobytes())
        found = [mx.exp(x), mx.tanh(x), mx.cos(x), mx.rsqrt(mx.abs(x)), x.sum(0), x.sum(1)]
        found += [mx.fast.rms_norm(x, y[:, 0], 1e-5), mx.addmm(y[:192], x, y)]
        found += [mx.fast.scaled_dot_product_attention(heads, heads, heads, scale=0.125)]
        found += [mx.conv2d(image.astype(dtype), kernel.astype(dtype), padding=1)]
        for array in found:
            sha.update(np.array(array.astype(mx.float32)).tobytes())
    return sha.hexdigest()[:16]


def record() -> None:
    os.environ["MLX_ZIMAGE_EMBEDDINGS"] = "off"  # every case encodes its prompt
    known = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {"costs": {}, "digests": {}}
    arrays, digests = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        found = Models(Path(folder))
        for name, case in CASES.items():
            budget = least_budget(found[case.model], case) if case.tight else None
            made, counts = run(found[case.model], case, budget)
            cost = {"budget": budget, **counts}
            assert known["costs"].setdefault(name, cost) == cost, f"{name}: {cost}"
            digests[name] = {kind: digest(array) for kind, array in made.items()}
            arrays |= {f"{name}/latents": made["latents"][-1], f"{name}/pixels": made["pixels"]}
    known["digests"][arithmetic()] = digests
    DIGESTS.write_text(json.dumps(known, indent=1) + "\n")
    if not ARRAYS.exists():
        few = {name: array[:1] for name, array in arrays.items()}  # the first of a batch
        save_file({name: np.ascontiguousarray(array) for name, array in few.items()}, ARRAYS)


if __name__ == "__main__":
    record()
    print(len(load_file(ARRAYS)), "arrays")
