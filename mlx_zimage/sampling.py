"""The denoising loop: Euler steps along a velocity, with guidance where asked.

Knows a velocity, the function (latents (B, h, w, C), step index i) -> d latents / d sigma at sigmas[i]; not which
network computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import scheduler
from .errors import NumericsError

Velocity = Callable[[mx.array, int], mx.array]
Velocities = Callable[[mx.array, int], Sequence[mx.array]]  # one of each prompt


@dataclass(frozen=True)
class Step:
    """One step done: `index` of `steps` counts from 0; latents (B, h, w, C) float32 now stand at `sigma`.

    clean (B, h, w, C) float32 are the latents of the picture to which the step's velocity points: a guess that each
    step betters, and at the last step latents themselves.
    """

    index: int
    steps: int
    sigma: float
    latents: mx.array
    clean: mx.array


def denoise(velocity: Velocity, latents: mx.array, sigmas: Sequence[float] | np.ndarray) -> Iterator[Step]:
    """Walk latents (B, h, w, C) float32 down the sigmas, yielding each Step once it is computed."""
    steps = len(sigmas) - 1
    for i in range(steps):
        v = velocity(latents, i)
        latents = scheduler.step(latents, v, sigmas[i], sigmas[i + 1])
        clean = scheduler.step(latents, v, sigmas[i + 1], 0.0)
        mx.eval(latents, clean)
        if not mx.isfinite(latents).all().item():
            raise NumericsError(
                f"the latents are not finite after step {i + 1} of {steps}; nothing was drawn. "
                f"Try dtype float32; if that fails too, the weights are damaged"
            )
        yield Step(i, steps, float(sigmas[i + 1]), latents, clean)


def guide(velocities: Velocities, scale: float) -> Velocity:
    """Classifier-free guidance in diffusers' convention: positive + scale * (positive - negative).

    velocities gives the positive prompt's, and the negative's where there is one.
    """

    def velocity(latents: mx.array, i: int) -> mx.array:
        wanted, *unwanted = velocities(latents, i)
        return wanted + scale * (wanted - unwanted[0]) if unwanted else wanted

    return velocity
