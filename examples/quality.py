"""What each way of converting costs in quality: converts a model in every way and compares the images.

    python examples/quality.py [MODEL] [--prompts 24] [--seeds 2] [--size 128] [--steps 8] [--ways 4bit,target]
    python examples/quality.py MODEL --weights

Prints one row per way. Errors are root mean squares relative to the source: of the quantized weights; of the velocity
at the source's own latents, averaged over steps; and of the final latents. The last two columns are the change of an
error compared with plain 4 bits, as the geometric mean over prompts with its standard error.

With --weights nothing is converted or generated: it prints sizes, and the error of 16 rows of each matrix, for a model
of any size.
"""

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.convert import convert, report
from mlx_zimage.convert.choose import quantizations
from mlx_zimage.convert.layout import lay_out_folder
from mlx_zimage.convert.rounding import dequantize_rows, quantize_rows
from mlx_zimage.convert.sources import open_source
from mlx_zimage.weights.checkpoint import open_checkpoint

PROMPTS = [
    "a red circle on a blue background",
    "two green squares on a white background",
    "一个黄色的三角形",
    "a large purple star on a black background",
    "a small blue circle left of a red square",
    "an orange ring",
    "a pink heart on a green background",
    "三个红色的爱心排成一行，粉色背景",
    "a black cross in the center",
    "一个绿色的圆在一个黄色方块上面",
    "a white diamond on a red background",
    "three small yellow stars",
    "a gray ring to the right of an orange triangle",
    "蓝色背景上的白色星星",
    "a big red heart on a gray background",
    "two purple circles on a yellow background",
    "a green triangle below a black square",
    "一个小的橙色十字",
    "an orange square to the left of a small blue heart on a white background",
    "a blue ring inside a red square",
    "两个粉色的菱形",
    "a large white circle on a black background",
    "a yellow cross in the top left corner",
    "一个紫色的环在右下角",
]
SAME = "the size of 4 bits"
WAYS = {
    "4bit": {"bits": 4},  # first: what the others are compared with
    "4bit-searched": {"bits": 4, "search": True},
    "4bit-calibrated": {"bits": 4, "calibrate": True},
    "target": {"target_size": SAME},
    "target-searched": {"target_size": SAME, "search": True},
    "target-calibrated": {"target_size": SAME, "calibrate": True},
    "mixed": {"bits": 4, "recipe": "mixed"},
    "mixed-calibrated": {"bits": 4, "recipe": "mixed", "calibrate": True},
    "mxfp4": {"mode": "mxfp4"},
    "nvfp4": {"mode": "nvfp4"},
    "4bit-group32": {"bits": 4, "group_size": 32},
    "3bit": {"bits": 3},
    "3bit-calibrated": {"bits": 3, "calibrate": True},
    "5bit": {"bits": 5},
    "6bit": {"bits": 6},
    "8bit": {"bits": 8},
    "mxfp8": {"mode": "mxfp8"},
}


def change(errors: np.ndarray, plain: np.ndarray) -> str:
    """The change from plain errors, both (prompts, seeds), and its standard error, in percent."""
    logs = np.log(errors / plain).mean(1)
    spread = logs.std(ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else 0.0
    return f"{100 * (np.exp(logs.mean()) - 1):+.0f} ± {100 * spread:.0f} %"


def compare_weights(model: str, ways: list[str]) -> None:
    source = open_source(model)
    print("| way | MB | weights |\n|---|---|---|", flush=True)
    size = None
    for way in [next(iter(WAYS)), *(way for way in ways if way != next(iter(WAYS)))]:
        options = {key: size if value == SAME else value for key, value in WAYS[way].items()}
        if options.pop("calibrate", False):
            continue  # it reduces the error of the products, not of the weights
        search = options.pop("search", False)
        choose = quantizations(options.pop("bits", None), **options).choice(source, "bfloat16")
        nbytes = lay_out_folder(source, "bfloat16", choose, "mlx", {}).nbytes
        size = size or nbytes
        errors = []
        for component in source.components.values():
            for tensor in component.tensors:
                q = choose(component.name, tensor)
                if q:
                    rows = [tensor.read(start, start + 8) for start in (0, tensor.shape[0] // 2)]
                    exact = mx.concatenate(rows).astype(mx.bfloat16)
                    off = dequantize_rows(quantize_rows(exact, q, search), q) - exact
                    errors.append((mx.square(off).sum() / mx.square(exact.astype(mx.float32)).sum()).sqrt().item())
        print(f"| {way} | {nbytes / 1e6:.2f} | {np.mean(errors):.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="pocket")
    for name, default in (("prompts", len(PROMPTS)), ("seeds", 2), ("size", 128), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--weights", action="store_true")
    args = parser.parse_args()
    if args.weights:
        compare_weights(args.model, args.ways)
        return
    requests = [
        GenerateRequest(prompt=prompt, width=args.size, height=args.size, seed=seed, steps=args.steps)
        for prompt in PROMPTS[: args.prompts]
        for seed in range(args.seeds)
    ]
    pipe = ZImagePipeline.from_pretrained(args.model, dtype="float32")
    generated = [report.trajectory(pipe, request) for request in requests]
    del pipe
    print("| way | MB | weights | velocity | latents | velocity, from 4 bits | latents, from 4 bits |")
    print("|---|---|---|---|---|---|---|", flush=True)
    plain = size = None
    for way in [next(iter(WAYS)), *(way for way in args.ways if way != next(iter(WAYS)))]:
        options = {key: size if value == SAME else value for key, value in WAYS[way].items()}
        with tempfile.TemporaryDirectory() as folder:
            out = convert(args.model, Path(folder) / way, **options)
            nbytes = sum(component.nbytes for component in open_checkpoint(out).components)
            weights = report.report(out, args.model, prompts=[])["weight_error"]["mean"]
            pipe = ZImagePipeline.from_pretrained(out, dtype="float32")
            compared = [report.compare(pipe, *pair) for pair in zip(requests, generated, strict=True)]
            del pipe
        velocity, latents = (
            np.array([np.mean(c[key]) for c in compared]).reshape(-1, args.seeds)
            for key in ("velocity_error", "latent_error")
        )
        if plain is None:
            plain, size = (velocity, latents), nbytes
        changes = [change(errors, before) for errors, before in zip((velocity, latents), plain, strict=True)]
        means = f"{weights:.4f} | {velocity.mean():.4f} | {latents.mean():.4f}"
        print(f"| {way} | {nbytes / 1e6:.2f} | {means} | {' | '.join(changes)} |", flush=True)


if __name__ == "__main__":
    main()
