"""Times the three networks on this machine, and a matrix product in the same run for comparison.

Every figure is the median of repeated runs; the first run, which reads weights and compiles kernels, is reported
separately. The fraction of the matrix product's rate makes figures from different machines comparable. With random
weights (`model="random"`) no checkpoint is needed: time and memory do not depend on the values.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from math import floor, log10
from tempfile import TemporaryDirectory
from typing import cast

import mlx.core as mx

from .doctor import facts
from .errors import MemoryBudgetError, RequestError, ZImageError
from .machine import default_dtype, machine_budget, time_products
from .memory import Workload
from .models.runner import NetworkConfig
from .models.text_encoder import TextEncoderConfig
from .models.transformer import PAD_MULTIPLE, PATCH, TransformerConfig
from .models.vae import VAEConfig
from .networks import Networks
from .pipeline import ZImagePipeline
from .quantization import default_quantization
from .sampling import Guidance, guide
from .scheduler import sigmas
from .sizes import counted, rounded_up
from .variants import TURBO
from .weights.random import random_model

# Architectures for random weights: the real one, and one that a laptop's CPU runs in seconds.
ARCHITECTURES = {
    "full": (TransformerConfig(), TextEncoderConfig(), VAEConfig()),
    "small": (
        TransformerConfig(dim=1536, n_layers=8, n_heads=12, cap_feat_dim=1024),
        TextEncoderConfig(1024, 3072, 8, 16, 8, 128, vocab_size=8192),
        VAEConfig(block_out_channels=(64, 128, 256, 256)),
    ),
}


CHAIN = 32  # number of matrix products timed together


@dataclass(frozen=True)
class Case:
    """What to time: image size in pixels, prompt length in tokens, weights of `bits` in `mode` (both None: dense).

    If steps is None, it is the model's default; if dtype is None, the machine's (see `machine.default_dtype`).
    """

    width: int = TURBO.size
    height: int = TURBO.size
    steps: int | None = None
    caption_tokens: int = 96
    dtype: str | None = None
    bits: int | None = None
    mode: str | None = None


def random_networks(case: Case, architecture: str) -> Networks:
    """Networks with random weights of an architecture."""
    quantization = None
    if (case.bits, case.mode) != (None, None):
        quantization = default_quantization(case.bits, mode=case.mode or "affine")
    transformer, text_encoder, vae = ARCHITECTURES[architecture]
    configs: dict[str, NetworkConfig] = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    dtype = getattr(mx, case.dtype or default_dtype())
    return Networks(random_model(configs, quantization), dtype, machine_budget())


def step_flops(config: TransformerConfig, image_tokens: int, caption_tokens: int) -> int:
    """Floating-point operations in one call of the transformer; a multiply-add counts as two."""
    image, caption = (-(-n // PAD_MULTIPLE) * PAD_MULTIPLE for n in (image_tokens, caption_tokens))
    matrices = 4 * config.dim**2 + 3 * config.dim * config.ffn_dim

    def blocks(count: int, tokens: int) -> int:
        return count * (2 * tokens * matrices + 4 * tokens**2 * config.dim)

    return blocks(config.n_refiner_layers, image) + blocks(config.n_layers, image + caption)


@dataclass(frozen=True)
class Timing:
    """Progress: run `done` of `total` of a phase ("start", "encode", "steps", "decode") took `seconds`.

    done is 0, and seconds None, where a phase begins.
    """

    phase: str
    total: int
    done: int = 0
    seconds: float | None = None


def timed(
    phase: str, compute: Callable[[], mx.array], repeat: int, planned: int, generated: bool
) -> Generator[Timing, None, dict]:
    """Seconds for the first run, the median of `repeat` more, and MLX's peak memory over all of them in GB.

    planned is the predicted peak in bytes. A first run that generates its weights is left out of the measured peak.
    """
    yield Timing(phase, repeat + 1)
    mx.clear_cache()
    mx.reset_peak_memory()
    times = []
    for run in range(1, repeat + 2):
        start = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - start)
        if generated and run == 1:
            mx.reset_peak_memory()
        yield Timing(phase, repeat + 1, run, times[-1])
    return {
        "first_s": times[0],
        "median_s": statistics.median(times[1:]),
        "peak_gb": mx.get_peak_memory() / 1e9,
        "planned_gb": planned / 1e9,
    }


FIRST_STEP = """
import sys
from mlx_zimage import GenerateRequest, Step, ZImagePipeline

model, dtype, width, height, steps, prompt = sys.argv[1:]
pipe = ZImagePipeline.from_pretrained(model, dtype=dtype)
request = GenerateRequest(prompt, int(width), int(height), 0, int(steps))
next(event for event in pipe.stream(request) if isinstance(event, Step))
"""


def time_first_step(model: str, case: Case) -> float:
    """Seconds from the start of a new Python process to the end of its first step, for a prompt that is not cached."""
    values = [model, case.dtype, case.width, case.height, case.steps]
    command = [sys.executable, "-c", FIRST_STEP, *map(str, values)]
    with TemporaryDirectory() as kept:
        # the cache is needed only for float16's scale; otherwise the encoder's checksum is a waste of time
        env = os.environ | {"MLX_ZIMAGE_EMBEDDINGS": kept if case.dtype == "float16" else "off"}

        def run(prompt: str) -> float:
            start = time.perf_counter()
            code = subprocess.run([*command, prompt], env=env).returncode
            if code:
                raise ZImageError(f"the process timing the first step exited with code {code}; its output is above")
            return time.perf_counter() - start

        if case.dtype == "float16":
            run("a")  # finds the model's scale, which is then cached
        return run("a " * case.caption_tokens)


def bench(model: str = "random", architecture: str = "full", case: Case = Case(), repeat: int = 3) -> dict:
    """Time prompt encoding, all denoising steps and decoding; returns figures in seconds, GB and TFLOP/s.

    model is "random" (random weights of this architecture) or a model for ZImagePipeline.from_pretrained. For a
    model, bits are its own (those of most layers), and the report also has the seconds from the start of a new process
    to the end of its first step. Steps are guided if the model's are by default, which takes two calls of the
    transformer each. The networks run as planned for this machine's memory budget, as in the pipeline; raises
    MemoryBudgetError if they cannot.
    """
    *_, report = bench_steps(model, architecture, case, repeat)
    return cast(dict, report)


def bench_steps(model: str, architecture: str, case: Case, repeat: int) -> Iterator[Timing | dict]:
    """`bench`, yielding a Timing where a phase begins and after each run, and finally the report."""
    dtype_name, cold_start, generated = case.dtype or default_dtype(), None, model == "random"
    case = replace(case, dtype=dtype_name)
    if generated:
        networks = random_networks(case, architecture)
    else:
        if (case.bits, case.mode) != (None, None):
            name = "mode" if case.bits is None else "bits"
            raise RequestError(f"{name} only applies to random weights, and {model} has its own; leave it out")
        networks = ZImagePipeline.from_pretrained(model, dtype=case.dtype).networks
    variant = networks.checkpoint.variant
    guidance, count = Guidance(variant.guidance_scale), case.steps or variant.steps
    case = replace(case, steps=count)
    prompts = 2 if guidance.scale else 1
    plan = networks.plan(Workload(case.width, case.height, 1, case.caption_tokens, count, prompts))
    if generated and plan.streamed:
        raise MemoryBudgetError(
            f"random weights of the {architecture} architecture do not fit into this machine's memory budget of "
            f"{rounded_up(plan.budget)}, and cannot be streamed from disk; choose fewer bits, or the small architecture"
        )
    text_encoder, transformer, vae = networks.text_encoder, networks.transformer, networks.vae
    packed = Counter(q for network in networks.checkpoint.components for q in network.quantizations.values())
    for q, _ in packed.most_common(1):
        case = replace(case, bits=q.bits, mode=q.mode)
    dtype, config = getattr(mx, dtype_name), transformer.config
    h, w = case.height // vae.config.scale, case.width // vae.config.scale
    tokens = (h // PATCH) * (w // PATCH)
    ids = tuple(i % text_encoder.config.vocab_size for i in range(case.caption_tokens))
    noise = mx.random.normal((1, h, w, config.in_channels))
    schedule = sigmas(count)

    def steps() -> mx.array:
        velocities, latents = transformer.velocities([cap_feats] * prompts, schedule[:-1], h, w), noise
        velocity = guide(velocities, guidance, schedule)
        for i in range(count):
            latents = latents + float(schedule[i + 1] - schedule[i]) * velocity(latents, i)
            mx.eval(latents)
        return latents

    if not generated:
        yield Timing("start", 1)
        cold_start = time_first_step(model, case)
        yield Timing("start", 1, 1, cold_start)
        networks.find_scale(ids)
    peaks = plan.peaks
    with networks.running(plan):
        encode = yield from timed("encode", lambda: text_encoder(ids), repeat, peaks["encode"], generated)
        cap_feats = text_encoder(ids)
        mx.eval(cap_feats)
        networks.end_stage("text_encoder")
        denoise = yield from timed("steps", steps, repeat, peaks["denoise"], generated)
        networks.end_stage("transformer")
        decode = yield from timed("decode", lambda: vae.decode(noise), repeat, peaks["decode"], generated)
    networks.release()
    rate = time_products(tokens, dtype, config.dim, config.ffn_dim, CHAIN)
    flops = count * prompts * step_flops(config, tokens, case.caption_tokens)
    achieved = flops / denoise["median_s"]
    yield {
        "model": f"random {architecture}" if generated else str(model),
        "case": vars(case),
        "guidance_scale": guidance.scale,
        "repeat": repeat,
        "machine": facts(),
        "encode": encode,
        "steps": denoise,
        "decode": decode,
        "total_s": sum(phase["median_s"] for phase in (encode, denoise, decode)),
        "cold_start_s": cold_start,
        "budget_gb": plan.budget / 1e9,
        "streamed_blocks": len(plan.streamed),
        "matmul_tflops": rate / 1e12,
        "steps_tflops": achieved / 1e12,
        "fraction_of_matmul": achieved / rate,
    }


def bench_table(report: dict) -> str:
    """The report as text."""
    case, machine = report["case"], report["machine"]
    weights = f"{case['bits']}-bit {case['mode']} in {case['dtype']}" if case["bits"] else case["dtype"]
    steps = counted(case["steps"], "guided step" if report["guidance_scale"] else "step")
    lines = [
        f"{machine['device']}, {machine['backend']}, MLX {machine['mlx']}, {machine['system']}",
        f"{report['model']}, {weights}, {case['width']}x{case['height']}, {steps}, "
        f"{counted(case['caption_tokens'], 'prompt token')}; median of {report['repeat']}",
        f"{'':8}{'seconds':>10}{'first':>10}{'peak GB':>10}{'planned':>10}",
    ]
    for phase in ("encode", "steps", "decode"):
        figures = (report[phase][name] for name in ("median_s", "first_s", "peak_gb", "planned_gb"))
        lines.append(f"{phase:8}" + "".join(f"{digits(figure):>10}" for figure in figures))
    lines.append(f"{'total':8}{digits(report['total_s']):>10}")
    step = report["steps"]["median_s"] / case["steps"]
    lines.append(f"a step takes {digits(step)} s: {digits(1 / step)} steps per second")
    if report["streamed_blocks"]:
        lines.append(
            f"blocks streamed from disk to stay within {digits(report['budget_gb'])} GB: {report['streamed_blocks']}"
        )
    if report["cold_start_s"] is not None:
        lines.append(
            f"from the start of a new process to the end of its first step: {digits(report['cold_start_s'])} s"
        )
    lines.append(
        f"steps run at {digits(report['steps_tflops'])} TFLOP/s, {report['fraction_of_matmul']:.1%} of this machine's "
        f"{digits(report['matmul_tflops'])} TFLOP/s for matrix products of the model's width"
    )
    return "\n".join(lines)


def digits(value: float) -> str:
    """A positive number with at least three significant digits."""
    return f"{value:.{max(0, 2 - floor(log10(value)))}f}"
