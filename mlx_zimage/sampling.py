"""The denoising loop: Euler steps along a velocity, optionally with guidance.

A velocity is a function (latents (B, h, w, C), step index i) -> d latents / d sigma at sigmas[i]; which network
computes it does not matter here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import TypeVar

import mlx.core as mx
import numpy as np

from . import scheduler
from .errors import NumericsError

Velocity = Callable[[mx.array, int], mx.array]
Velocities = Callable[[mx.array, int, int | None], Sequence[mx.array]]  # one per prompt, or for the first few
E = TypeVar("E")
SEEN, SEEN_OF_KEPT = exp(-1), 4 / 5  # parts of the noise in the latents that resampling keeps


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


@dataclass(frozen=True)
class Change:
    """A caller's answer to a Step, sent to the generator: latents (B, h, w, C) that replace the Step's.

    stop skips the remaining steps.
    """

    latents: mx.array | None = None
    stop: bool = False


@dataclass(frozen=True)
class Kept:
    """What inpainting keeps: the image (1, h, w, C), with the noise (B, h, w, C) that the steps began with.

    mask (1, h, w, 1) is 1 where the image is regenerated and 0 where it is kept. In between, it is regenerated from a
    later step on: at 0.25, in the last quarter of the steps (differential diffusion).

    Before each step, its latents are sampled again `resample` times, each as costly as a step: in the first steps,
    noise hides the kept part, so what takes shape in those steps may not match it. The regenerated part becomes the
    network's clean estimate, and the kept part the image, both with a mixture of the noise that the network sees in the
    latents and new noise from the seed. Source: LanPaint, lanpaint.py: its Langevin steps, here with step size 1 and
    lambda 4.
    """

    image: mx.array
    noise: mx.array
    mask: mx.array
    resample: int = 0
    seed: int = 0

    def over(self, latents: mx.array, sigma: float, done: float) -> mx.array:
        """The kept part, with noise for sigma, over latents; `done` is the part of the steps that are done."""
        kept = scheduler.add_noise(self.image, self.noise, sigma) if sigma else self.image
        return mx.where(self.mask > 1 - done, latents, kept)

    def resampled(
        self, velocity: Velocity, latents: mx.array, sigmas: Sequence[float] | np.ndarray, i: int
    ) -> mx.array:
        """The latents before step i, with the regenerated part resampled."""
        sigma, steps = float(sigmas[i]), len(sigmas) - 1
        if sigma == 1:  # nothing of the kept part is seen yet
            return latents
        first = 2 + i * self.resample  # the initial noise may come from the first two
        keys = mx.random.split(mx.random.key(self.seed), 2 + steps * self.resample)
        for key in keys[first : first + self.resample]:
            v = velocity(latents, i)
            clean, seen = (scheduler.step(latents, v, sigma, end) for end in (0.0, 1.0))
            new = mx.random.normal(latents.shape, key=key)
            again = scheduler.add_noise(clean, SEEN * seen + (1 - SEEN**2) ** 0.5 * new, sigma)
            kept = scheduler.add_noise(self.image, SEEN_OF_KEPT * seen + (1 - SEEN_OF_KEPT) ** 0.5 * new, sigma)
            latents = mx.where(self.mask > 1 - (i + 1) / steps, again, kept)
            mx.eval(latents)
        return latents


def denoise(
    velocity: Velocity, latents: mx.array, sigmas: Sequence[float] | np.ndarray, kept: Kept | None = None
) -> Generator[Step, Change | None, mx.array]:
    """Take latents (B, h, w, C) float32 through the sigmas, yielding each Step once it is computed.

    Returns the final latents. What is kept replaces its part of the latents after each step.
    """
    steps = len(sigmas) - 1
    for i in range(steps):
        if kept:
            latents = kept.resampled(velocity, latents, sigmas, i)
        v = velocity(latents, i)
        latents = scheduler.step(latents, v, sigmas[i], sigmas[i + 1])
        clean = scheduler.step(latents, v, sigmas[i + 1], 0.0)
        if kept:
            done = (i + 1) / steps
            latents, clean = kept.over(latents, float(sigmas[i + 1]), done), kept.over(clean, 0.0, done)
        mx.eval(latents, clean)
        if not mx.isfinite(latents).all().item():
            raise NumericsError(
                f"the latents are not finite after step {i + 1} of {steps}; no image was generated. Lower the strength "
                f"of any LoRA or ControlNet, or try dtype float32; if that fails too, the weights are damaged"
            )
        change = yield Step(i, steps, float(sigmas[i + 1]), latents, clean)
        if change and change.latents is not None:
            latents = change.latents
        if change and change.stop:
            break
    return latents


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance in diffusers' convention: positive + scale * (positive - negative).

    normalization, unless 0, limits each image's guided velocity to that many times the length of the positive one.
    Steps whose time, 1 - sigma, is above truncation use the positive velocity alone.
    """

    scale: float
    normalization: float = 0.0
    truncation: float = 1.0

    def applies(self, time: float) -> bool:
        """Whether a step at this time is guided."""
        return time <= self.truncation


def guide(velocities: Velocities, guidance: Guidance, sigmas: Sequence[float] | np.ndarray) -> Velocity:
    """The velocity along the sigmas, guided if there is a negative prompt.

    velocities returns the prompt's velocity and, with guidance, the negative prompt's; its third argument limits them.
    """
    times = scheduler.times(sigmas)

    def velocity(latents: mx.array, i: int) -> mx.array:
        positive, *negative = velocities(latents, i, None if guidance.applies(times[i]) else 1)
        if not negative:
            return positive
        guided = positive + guidance.scale * (positive - negative[0])
        return shorten(guided, guidance.normalization * length(positive)) if guidance.normalization else guided

    return velocity


def shorten(x: mx.array, most: mx.array) -> mx.array:
    """x (B, h, w, C) with each image that is longer than `most` (B, 1, 1, 1) scaled down to that length."""
    return mx.where(length(x) > most, x * (most / length(x)), x)


def length(x: mx.array) -> mx.array:
    """The Euclidean norm of each image of x (B, h, w, C): (B, 1, 1, 1)."""
    return mx.sqrt(mx.square(x).sum(axis=(1, 2, 3), keepdims=True))


def relayed(
    events: Generator[E, Change | None, None], each: Callable[[E], E | None]
) -> Generator[E, Change | None, bool]:
    """The events as `each` returns them, without those for which it returns None; answers go back to their origin.

    Returns whether one of them stopped the steps.
    """
    change, stopped = None, False
    while True:
        try:
            event = each(events.send(change))
        except StopIteration:
            return stopped
        change = (yield event) if event is not None else None
        stopped = stopped or (change is not None and change.stop)


def answered(events: Generator[E, Change | None, None], answer: Callable[[Step], Change]) -> Iterator[E | Step]:
    """The events, with each Step answered; it is passed on with the answer's latents."""
    change = None
    while True:
        try:
            event = events.send(change)
        except StopIteration:
            return
        if isinstance(event, Step):
            change = answer(event)
            yield event if change.latents is None else replace(event, latents=change.latents)
        else:
            change = None
            yield event
