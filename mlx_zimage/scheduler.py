"""The flow-matching schedule: sigmas from 1 (noise) to 0 (picture), and Euler's step between them.

Source: diffusers schedulers/scheduling_flow_match_euler_discrete.py and pipelines/z_image. All values float32.
N steps are N calls of the transformer; the 9 of the model card, written for diffusers 0.36, are 8 here.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from .errors import CheckpointError

DEFAULT_SHIFT = 3.0


def sigmas(steps: int, shift: float = DEFAULT_SHIFT, mu: float | None = None) -> np.ndarray:
    """The schedule of `steps` model calls: (steps + 1,) float32, falling from 1 to 0.

    shift bends it towards noise; mu, where given, does so instead by exp(mu) (dynamic shifting).
    """
    u = np.linspace(1.0, 1.0 / steps, steps, dtype=np.float32)
    # the forms differ in rounding; each is the one diffusers uses
    sigma = math.exp(mu) / (math.exp(mu) + (1 / u - 1)) if mu is not None else shift * u / (1 + (shift - 1) * u)
    return np.append(sigma, 0.0).astype(np.float32)


def schedule(config: dict, steps: int, image_tokens: int, shift: float | None = None) -> np.ndarray:
    """The sigmas that scheduler/scheduler_config.json asks for; an explicit shift overrides its way."""
    if config.get("_class_name", "FlowMatchEulerDiscreteScheduler") != "FlowMatchEulerDiscreteScheduler":
        raise CheckpointError(f"scheduler must be FlowMatchEulerDiscreteScheduler, got {config['_class_name']}")
    if shift is None and config.get("use_dynamic_shifting", False):
        return sigmas(steps, mu=dynamic_mu(image_tokens, config))
    return sigmas(steps, config.get("shift", DEFAULT_SHIFT) if shift is None else shift)


def dynamic_mu(image_tokens: int, config: dict) -> float:
    """Log of the shift, linear in the number of image tokens."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (high - low)
    return image_tokens * slope + base - slope * low


def add_noise(latents: mx.array, noise: mx.array, sigma: float) -> mx.array:
    """The point at sigma on the straight line from latents (0) to noise (1)."""
    return sigma * noise + (1 - sigma) * latents


def step(latents: mx.array, velocity: mx.array, sigma: float, next_sigma: float) -> mx.array:
    """Euler's step from sigma to next_sigma along velocity = d latents / d sigma."""
    return latents + float(np.float32(next_sigma) - np.float32(sigma)) * velocity
