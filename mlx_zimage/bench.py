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
from collections.abc import Callable
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import mlx.core as mx

from .doctor import facts, product_rate
from .errors import RequestError, ZImageError
from .machine import default_dtype, kept_allocations, kernel_flops, unpack_from
from .memory import Workload, largest_strip
from .models.layers import product_from, vae_dtype
from .models.text_encoder import TextEncoder, TextEncoderConfig
from .models.transformer import PAD_MULTIPLE, PATCH, Transformer, TransformerConfig
from .models.vae import VAE, VAEConfig
from .pipeline import ZImagePipeline
from .quantization import default_quantization
from .scheduler import sigmas
from .variants import TURBO
from .weights.blocks import Blocks
from .weights.random import RandomWeights

# Architectures for random weights: the real one, and one that a laptop's CPU runs in seconds.
SIZES = {
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

    dtype None is the machine's default (see `machine.default_dtype`).
    """

    width: int = TURBO.size
    height: int = TURBO.size
    steps: int = TURBO.steps
    caption_tokens: int = 96
    dtype: str | None = None
    bits: int | None = None
    mode: str | None = None


def random_networks(case: Case, size: str) -> tuple[dict[str, Blocks], TextEncoder, Transformer, VAE]:
    """Networks with random weights, preceded by the runners of their blocks."""
    transformer, text_encoder, vae = SIZES[size]
    quantization = None
    if (case.bits, case.mode) != (None, None):
        quantization = default_quantization(case.bits, mode=case.mode or "affine")
    dtype = getattr(mx, case.dtype or default_dtype())

    runners = {
        "text_encoder": Blocks(RandomWeights("text_encoder", text_encoder, quantization), dtype),
        "transformer": Blocks(RandomWeights("transformer", transformer, quantization), dtype),
        "vae": Blocks(RandomWeights("vae", vae), vae_dtype(dtype)),
    }
    most = kernel_flops()
    product = product_from(unpack_from(), most)
    return (
        runners,
        TextEncoder(text_encoder, runners["text_encoder"], product),
        Transformer(transformer, runners["transformer"], product, most=most),
        VAE(vae, runners["vae"], most=most),
    )


def step_flops(config: TransformerConfig, image_tokens: int, caption_tokens: int) -> int:
    """Floating-point operations in one call of the transformer; a multiply-add counts as two."""
    image, caption = (-(-n // PAD_MULTIPLE) * PAD_MULTIPLE for n in (image_tokens, caption_tokens))
    matrices = 4 * config.dim**2 + 3 * config.dim * config.ffn_dim

    def blocks(count: int, tokens: int) -> int:
        return count * (2 * tokens * matrices + 4 * tokens**2 * config.dim)

    return blocks(config.n_refiner_layers, image) + blocks(config.n_layers, image + caption)


def timed(compute: Callable[[], mx.array], repeat: int) -> dict:
    """Seconds for the first run, the median of `repeat` more, and MLX's peak memory over all of them in GB."""
    mx.clear_cache()
    mx.reset_peak_memory()
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - start)
    return {
        "first_s": times[0],
        "median_s": statistics.median(times[1:]),
        "peak_gb": mx.get_peak_memory() / 1e9,
    }


FIRST_STEP = """
import sys
from mlx_zimage import GenerateRequest, Step, ZImagePipeline

model, dtype, width, height, steps, prompt = sys.argv[1:]
pipe = ZImagePipeline.from_pretrained(model, dtype=dtype)
request = GenerateRequest(prompt, int(width), int(height), 0, int(steps), guidance_scale=0.0)
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
                raise ZImageError(
                    f"the process started to time a first step exited with code {code}; its output is above"
                )
            return time.perf_counter() - start

        if case.dtype == "float16":
            run("a")  # finds the model's scale, which is then cached
        return run("a " * case.caption_tokens)


def bench(model: str = "random", size: str = "full", case: Case = Case(), repeat: int = 3) -> dict:
    """Time prompt encoding, all denoising steps and decoding; returns figures in seconds, GB and TFLOP/s.

    model is "random" (random weights of architecture `size`) or a model for ZImagePipeline.from_pretrained. For a
    model, bits are its own (those of most layers), and the report also has the seconds from the start of a new process
    to the end of its first step.
    """
    dtype_name, cold_start = case.dtype or default_dtype(), None
    case = replace(case, dtype=dtype_name)
    if model == "random":
        runners, text_encoder, transformer, vae = random_networks(case, size)
    else:
        if (case.bits, case.mode) != (None, None):
            given = f"bits={case.bits} and mode={case.mode}"
            raise RequestError(f"{given} are for random weights, but {model} has its own; omit them or convert it")
        pipe = ZImagePipeline.from_pretrained(model, dtype=case.dtype)
        work = Workload(case.width, case.height, 1, case.caption_tokens, case.steps)
        pipe.planner.plan(work, pipe.budget)  # raises if the work does not fit
        runners, text_encoder = pipe.networks.runners, pipe.text_encoder
        transformer, vae = pipe.transformer, pipe.vae
        cold_start = time_first_step(model, case)
    packed = Counter(q for runner in runners.values() for q in runner.weights.quantizations.values())
    for q, _ in packed.most_common(1):
        case = replace(case, bits=q.bits, mode=q.mode)
    dtype, config = getattr(mx, dtype_name), transformer.config
    h, w = case.height // vae.config.scale, case.width // vae.config.scale
    tokens = (h // PATCH) * (w // PATCH)
    ids = [i % text_encoder.config.vocab_size for i in range(case.caption_tokens)]
    noise = mx.random.normal((1, h, w, config.in_channels))

    with kept_allocations():
        encode = timed(lambda: text_encoder(ids), repeat)
        cap_feats = text_encoder(ids)
        runners["text_encoder"].release()
        schedule = sigmas(case.steps)

        def steps() -> mx.array:
            velocity, latents = transformer.velocity(cap_feats, schedule[:-1], h, w), noise
            for i in range(case.steps):
                latents = latents + float(schedule[i + 1] - schedule[i]) * velocity(latents, i)
                mx.eval(latents)
            return latents

        denoise = timed(steps, repeat)
        runners["transformer"].release()
        vae.strip_bytes = largest_strip(vae.config, case.width, case.height)
        decode = timed(lambda: vae.decode(noise), repeat)
    rate = product_rate(tokens, dtype, config.dim, config.ffn_dim, CHAIN)
    flops = case.steps * step_flops(config, tokens, case.caption_tokens)
    achieved = flops / denoise["median_s"]
    return {
        "model": f"random {size}" if model == "random" else str(model),
        "case": vars(case),
        "repeat": repeat,
        "machine": facts(),
        "encode": encode,
        "steps": denoise,
        "decode": decode,
        "total_s": sum(phase["median_s"] for phase in (encode, denoise, decode)),
        "cold_start_s": cold_start,
        "matmul_tflops": rate / 1e12,
        "steps_tflops": achieved / 1e12,
        "fraction_of_matmul": achieved / rate,
    }


def table(report: dict) -> str:
    """The report as text."""
    case, machine = report["case"], report["machine"]
    weights = f"{case['bits']}-bit {case['mode']} in {case['dtype']}" if case["bits"] else case["dtype"]
    lines = [
        f"{machine['device']}, {machine['backend']}, MLX {machine['mlx']}, {machine['system']}",
        f"{report['model']}, {weights}, {case['width']}x{case['height']}, {case['steps']} steps, "
        f"{case['caption_tokens']} prompt tokens; median of {report['repeat']}",
        f"{'':8}{'seconds':>10}{'first':>10}{'peak GB':>10}",
    ]
    for phase in ("encode", "steps", "decode"):
        figures = report[phase]
        lines.append(f"{phase:8}{figures['median_s']:10.3f}{figures['first_s']:10.3f}{figures['peak_gb']:10.2f}")
    lines.append(f"{'total':8}{report['total_s']:10.3f}")
    if report["cold_start_s"] is not None:
        lines.append(f"from the start of a new process to the end of its first step: {report['cold_start_s']:.1f} s")
    lines.append(
        f"steps run at {report['steps_tflops']:.2f} TFLOP/s, {report['fraction_of_matmul']:.0%} of this machine's "
        f"{report['matmul_tflops']:.2f} TFLOP/s for matrix products of the same width"
    )
    return "\n".join(lines)
