"""Measure training on models: python tests/full_size_training.py MODEL [MODEL ...] [--side 512 1024] [--steps 4]

Prints, for each model and size of images, with its blocks in memory and with as many as possible streamed: the number
of streamed blocks, the median seconds per step of one image at rank 16, the peak memory, and the planned memory.
`examples/full_size.py` writes models of full size with random weights.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_zimage import ZImagePipeline
from mlx_zimage.train.dataset import Example, read_dataset
from mlx_zimage.train.encoded import Encoded
from mlx_zimage.train.factors import arrays_of, new_factors
from mlx_zimage.train.loop import ENCODED, Measured, Planned, Stepped, folder_of, open_to_train, train
from mlx_zimage.train.memory import best_plan
from mlx_zimage.train.settings import Settings

TOKENS = 96


def caption(pipe: ZImagePipeline) -> str:
    """A caption of TOKENS tokens."""
    words = "red"
    while len(pipe.networks.tokenize(words)) < TOKENS:
        words += " red"
    return words


def dataset(folder: Path, side: int, caption: str) -> list[Example]:
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return read_dataset(folder, side)


def measure(model: str, side: int, streamed: bool, steps: int, folder: Path) -> str:
    """A row of the table."""
    pipe, output = open_to_train(model), folder / "lora.safetensors"
    examples = dataset(folder, side, caption(pipe))
    settings = Settings(steps=steps, resolution=side)
    encoded = Encoded(pipe.networks, folder_of(output) / ENCODED, pipe.budget)
    for _ in encoded.encode(examples):  # which may need more memory than training
        pass
    if streamed:
        factors = new_factors(pipe.transformer.config, settings.rank, (), 0)
        count = sum(array.size for array in arrays_of(factors))
        pipe.budget = best_plan(pipe.planner, side, side, TOKENS, count, 0).room
        del factors
    blocks, times, peak, planned = 0, [], 0.0, 0.0
    for event in train(pipe, examples, settings, output):
        if isinstance(event, Planned):
            blocks, planned = len(event.plan.streamed), event.plan.room / 1e9
        elif isinstance(event, Measured):
            mx.clear_cache()
            mx.reset_peak_memory()
        elif isinstance(event, Stepped):
            times.append(event.elapsed_s)
            peak = mx.get_peak_memory() / 1e9
    return f"{side}x{side} | {blocks} | {np.median(times):.2f} | {peak:.2f} | {planned:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--side", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    print("| model | images | streamed | s per step | peak GB | planned GB |\n|---|---|---|---|---|---|")
    for model in options.models:
        for streamed in (True, False):
            for side in options.side:
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(model, side, streamed, options.steps, Path(folder))
                print(f"| {Path(model).name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
