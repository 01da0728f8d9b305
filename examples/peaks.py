"""Predicted and measured memory peaks of the same image under one budget after another.

    python examples/peaks.py MODEL REQUEST ... [--steps 8] [--stage] [--dtype float16]

A request is a side in pixels, optionally with a budget and a number of images: 1024, 1024:2GB, 512:2GB:4. Images of one
size have the same latents under every budget: the last column is their checksum. Bytes read are the
transformer's per step; seconds are for encoding, one step, decoding one image, and the total. The first row of a size
includes compiling kernels.
"""

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from mlx_zimage import GenerateRequest, Step, ZImageError, ZImagePipeline
from mlx_zimage.dtypes import FLOATS
from mlx_zimage.pipeline import Phase
from mlx_zimage.weights.component import Component

PROMPT = "a lighthouse on a cliff at dusk, oil painting, " * 6
PHASES = ("encode", "denoise", "decode")


class Counted:
    """A network's weights, counting the bytes that are read from disk."""

    def __init__(self, stored: Component):
        self.stored, self.config, self.shapes, self.rows = stored, stored.config, stored.shapes, stored.rows
        self.nbytes = 0

    def read(self, prefix, dtype, without="", stream=None):
        self._count(prefix, without)
        return self.stored.read(prefix, dtype, without, stream)

    def read_all(self, prefixes, dtype, without=""):
        for prefix in prefixes:
            self._count(prefix, without)
        return self.stored.read_all(prefixes, dtype, without)

    def _count(self, prefix: str, without: str) -> None:
        for name, entry in self.stored.entries.items():
            inside = name.startswith(f"{prefix}.") and not (without and name.startswith(f"{prefix}.{without}"))
            self.nbytes += entry.nbytes if inside or name == prefix else 0


@dataclass
class Meter:
    """MLX's peak and the seconds of each phase; `enter` begins one."""

    peaks: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    phase: str | None = None
    since: float = 0

    def enter(self, phase: str | None) -> None:
        if phase == self.phase:
            return
        now = time.perf_counter()
        if self.phase:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), mx.get_peak_memory())
            self.seconds[self.phase] = self.seconds.get(self.phase, 0) + now - self.since
        mx.reset_peak_memory()
        self.phase, self.since = phase, now


def measure(
    model: str, side: int, budget: str | None, count: int, steps: int, keep: bool | None, dtype: str | None
) -> dict:
    """One row of the table."""
    pipe = ZImagePipeline.from_pretrained(model, dtype, budget, keep)
    if pipe.dtype == mx.float16:
        pipe.encode("a")  # finds the scale before anything is measured
    request = GenerateRequest(PROMPT, side, side, seed=3, steps=steps, num_images=count)
    pipe.networks.runners["transformer"].weights = transformer = Counted(pipe.checkpoint.transformer)
    read, times = [], []
    mx.clear_cache()
    meter = Meter()
    meter.enter("encode")
    for event in pipe.events(request):
        if isinstance(event, Phase):
            if event.name == "encode" and event.done == event.total:
                meter.enter("denoise")
            elif event.name == "decode":
                meter.enter("decode")
        elif isinstance(event, Step):
            meter.enter("denoise")
            read.append(transformer.nbytes)
            times.append(time.perf_counter())
            latents = event.latents
        else:
            plan = event.plan
    meter.enter(None)
    measured = max(meter.peaks.values())
    return {
        "model": Path(model).name,
        "side": side,
        "images": count,
        "budget": budget,
        "keep": plan.keep,
        "streamed": len(plan.streamed),
        "lean": plan.lean,
        "strip_bytes": plan.strip_bytes,
        "predicted": plan.peak,
        "measured": measured,
        "predicted_by_phase": plan.peaks,
        "measured_by_phase": meter.peaks,
        "seconds_by_phase": meter.seconds | {"decode": meter.seconds["decode"] / count},
        "step_s": (times[-1] - times[0]) / (steps - 1),
        "total_s": sum(meter.seconds.values()),
        "read_per_step": (read[-1] - read[0]) // (steps - 1),
        "latents": hashlib.sha256(np.array(latents)).hexdigest()[:12],
    }


COLUMNS = (
    f"{'side':>5} {'n':>3} {'budget':>7} {'networks':>13} {'predicted':>9} {'measured':>8} {'ratio':>6}   "
    f"{'(encoding, denoising, decoding)':40} {'encode_s':>8} {'step_s':>7} {'decode_s':>8} {'total_s':>7} "
    f"{'GB/step':>8} latents"
)


def as_text(row: dict) -> str:
    stays = "kept" if row["keep"] else f"{row['streamed']} streamed" if row["streamed"] else "staged"
    both = [
        f"{row['predicted_by_phase'][phase] / 1e9:.2f} {row['measured_by_phase'][phase] / 1e9:.2f}" for phase in PHASES
    ]
    seconds = row["seconds_by_phase"]
    return (
        f"{row['side']:5} {row['images']:3} {row['budget'] or '-':>7} {stays:>13} {row['predicted'] / 1e9:9.3f} "
        f"{row['measured'] / 1e9:8.3f} {row['predicted'] / row['measured']:6.3f}   {'(' + ', '.join(both) + ')':40} "
        f"{seconds['encode']:8.2f} {row['step_s']:7.3f} {seconds['decode']:8.2f} {row['total_s']:7.2f} "
        f"{row['read_per_step'] / 1e9:8.3f} {row['latents']}"
    )


@click.command()
@click.argument("model")
@click.argument("requests", nargs=-1, required=True)
@click.option("--steps", type=click.IntRange(2), default=8, show_default=True)
@click.option("--stage", is_flag=True, help="Unload each network when its part is done.")
@click.option("--dtype", type=click.Choice(FLOATS), help="Data type to compute in.")
@click.option("--json", "file", type=click.File("a"), help="Append the results to this file, one JSON object per line.")
def main(model: str, requests: tuple[str, ...], steps: int, stage: bool, dtype: str | None, file) -> None:
    """Generate the images of each request, and print a row."""
    os.environ["MLX_ZIMAGE_EMBEDDINGS"] = "off"  # each row encodes
    print(COLUMNS)
    for text in requests:
        match = re.fullmatch(r"(\d+)(?::([\w.]*)(?::(\d+))?)?", text)
        if not match:
            raise click.UsageError(f"a request is SIDE, SIDE:BUDGET or SIDE:BUDGET:IMAGES, got {text!r}")
        side, budget, count = match.groups()
        try:
            row = measure(model, int(side), budget or None, int(count or 1), steps, False if stage else None, dtype)
        except ZImageError as error:
            print(f"{text}: {error}", flush=True)
            continue
        print(as_text(row), flush=True)
        if file:
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
