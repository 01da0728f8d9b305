"""The denoising loop: Euler steps along a velocity, optionally with guidance.

A velocity is a function (latents (B, h, w, C), step index i) -> d latents / d sigma at sigmas[i]; which network
computes it does not matter here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import scheduler
from .errors import NumericsError

Velocity = Callable[[mx.array, int], mx.array]
Velocities = Callable[[mx.array, int], Sequence[mx.array]]  # one per prompt


@dataclass(frozen=True)
class Step:
    """A finished step: `index` of `steps` counts from 0; latents (B, h, w, C) float32 are now at `sigma`.

    clean (B, h, w, C) float32 are the latents of the image that the step's velocity points to: an estimate that
    improves with each step and equals latents at the last one.
    """

    index: int
    steps: int
    sigma: float
    latents: mx.array
    clean: mx.array


def denoise(velocity: Velocity, latents: mx.array, sigmas: Sequence[float] | np.ndarray) -> Iterator[Step]:
    """Take latents (B, h, w, C) float32 through the sigmas, yielding each Step once it is computed."""
    steps = len(sigmas) - 1
    for i in range(steps):
        v = velocity(latents, i)
        latents = scheduler.step(latents, v, sigmas[i], sigmas[i + 1])
        clean = scheduler.step(latents, v, sigmas[i + 1], 0.0)
        mx.eval(latents, clean)
        if not mx.isfinite(latents).all().item():
            raise NumericsError(
                f"the latents are not finite after step {i + 1} of {steps}; no image was generated. "
                f"Try dtype float32; if that fails too, the weights are damaged"
            )
        yield Step(i, steps, float(sigmas[i + 1]), latents, clean)


def guide(velocities: Velocities, scale: float) -> Velocity:
    """Classifier-free guidance in diffusers' convention: positive + scale * (positive - negative).

    velocities returns the prompt's velocity and, with guidance, the negative prompt's.
    """

    def velocity(latents: mx.array, i: int) -> mx.array:
        positive, *negative = velocities(latents, i)
        return positive + scale * (positive - negative[0]) if negative else positive

    return velocity
