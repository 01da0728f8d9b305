"""A run of training: from a folder of images to a LoRA, step by step.

    for event in train(pipe, examples, settings, Path("lora.safetensors")):
        ...

`train` yields events as things happen: Phases while images and captions are encoded, a Stepped after each step, and a
Saved when a file is written. Whoever holds the loop owns progress and logs, and leaving it stops the run; the same call
goes on from the last state that was saved, and ends with the same file.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from ..errors import NumericsError, RequestError
from ..networks import Phase
from ..pipeline import ZImagePipeline
from ..weights.hub import name_of
from ..weights.store import checksum
from .dataset import Example, order_of
from .encoded import Encoded
from .factors import Factors, new_factors
from .gradients import Case, Gradients
from .objective import Draw, default_objective, draw
from .optimizer import AdamW, added, clipped, warmed_up
from .output import FREE, read_state, write_lora, write_state
from .settings import Settings

SAVE_EVERY = 100  # steps


@dataclass(frozen=True)
class Stepped:
    """A finished step, counted from 1: the mean of its losses, the gradient's norm before clipping, and its rate."""

    step: int
    loss: float
    norm: float
    rate: float
    elapsed_s: float


@dataclass(frozen=True)
class Saved:
    """The LoRA as it is after a step, written to a file."""

    step: int
    path: Path


@dataclass(frozen=True)
class Run:
    """What a run is made of. folder has the state it resumes from, and what was encoded."""

    pipe: ZImagePipeline
    examples: Sequence[Example]
    settings: Settings
    output: Path

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.stem}-training")

    @property
    def state(self) -> Path:
        return self.folder / "state.safetensors"

    @cached_property
    def checksum(self) -> str:
        """The SHA-256 of the transformer's weights."""
        return checksum(self.pipe.checkpoint.transformer, self.folder)

    @cached_property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to be resumed."""
        data = [[e.digest, e.width, e.height, e.caption, e.repeats] for e in self.examples]
        own = {name: value for name, value in self.settings.to_dict().items() if name not in FREE}
        return {
            **own,
            "base_sha256": self.checksum,
            "dtype": str(self.pipe.dtype),
            "data": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
        }


def train(
    pipe: ZImagePipeline, examples: Sequence[Example], settings: Settings, output: Path, save_every: int = SAVE_EVERY
) -> Iterator[Phase | Stepped | Saved]:
    """Train a LoRA on examples, and write it to output; resumes the run if there is one. See the module."""
    if pipe.dtype == mx.float16:
        raise RequestError("gradients exceed float16's range; train in bfloat16 or float32")
    settings = replace(settings, objective=settings.objective or default_objective(pipe.variant))
    networks = pipe.networks
    config = networks.transformer.config
    factors = new_factors(config, settings.rank, settings.extras, settings.seed)
    run = Run(pipe, examples, settings, output)
    resumed = read_state(run.state, factors, run.identity)
    factors, optimizer = resumed or (factors, AdamW.new(factors))
    encoded = Encoded(networks, run.folder / "encoded")
    yield from encoded.encode(examples)
    transformer = networks.transformer
    gradients = Gradients(
        config, networks.overlays["transformer"], settings.scale, transformer.product, transformer.most
    )
    for step in range(optimizer.step, settings.steps):
        begin = time.perf_counter()
        with pipe.turns.computing(), networks.guarded():
            factors, loss, norm = one_step(run, encoded, gradients, factors, optimizer)
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            write_state(run.state, factors, optimizer, run.identity)
        rate = warmed_up(settings.rate, step, settings.warm_up)
        yield Stepped(step + 1, loss, norm, rate, time.perf_counter() - begin)
    write_lora(output, factors, settings, config, name_of(pipe.checkpoint.folder), run.checksum)
    yield Saved(optimizer.step, output)


def one_step(
    run: Run, encoded: Encoded, gradients: Gradients, factors: Factors, optimizer: AdamW
) -> tuple[Factors, float, float]:
    """The factors after one more step, its mean loss, and its gradient's norm."""
    settings, total, losses = run.settings, Factors(), []
    for i in range(settings.accumulate):
        value, found = gradients(factors, case(run, encoded, optimizer.step * settings.accumulate + i))
        losses.append(float(value))
        total = added(total, found)
    total, norm = clipped(total, settings.clip, 1 / settings.accumulate)
    if not math.isfinite(norm):
        raise NumericsError(
            f"the gradient of step {optimizer.step + 1} is not finite; lower the rate, or try dtype float32"
        )
    rate = warmed_up(settings.rate, optimizer.step, settings.warm_up)
    return optimizer.apply(factors, total, rate, settings.decay), sum(losses) / len(losses), norm


def case(run: Run, encoded: Encoded, index: int) -> Case:
    """What gradient `index` of a run, counted from 0, is computed from."""
    settings, examples = run.settings, run.examples
    shapes = [encoded.shape(example) for example in examples]
    assert settings.objective is not None
    drawn: Draw = draw(settings.seed, index, order_of(examples), shapes, settings.objective, settings.dropout)
    example = examples[drawn.example]
    caption = encoded.caption("" if drawn.drops_caption else example.caption)
    return Case(encoded.latents(example), caption, mx.array(drawn.noise), drawn.sigma, drawn.weight)
