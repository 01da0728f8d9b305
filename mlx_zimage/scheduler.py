"""The flow-matching schedule: sigmas from 1 (noise) to 0 (image), and the Euler step between them.

Source: diffusers schedulers/scheduling_flow_match_euler_discrete.py and pipelines/z_image. All values are float32.
N steps are N calls of the transformer; the model card's 9 steps, written for diffusers 0.36, are 8 here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .config import read_config
from .errors import CheckpointError

DEFAULT_SHIFT = 3.0
IMAGE_TOKENS = 512**2  # of the largest image
MAX_MU = 80  # beyond it, the shift overflows float32; the published model's own slope gives 45 for the largest image


def sigmas(steps: int, shift: float = DEFAULT_SHIFT, mu: float | None = None) -> np.ndarray:
    """The schedule of `steps` denoising steps: (steps + 1,) float32, falling from 1 to 0.

    A higher shift spends more steps at high noise; mu, if given, replaces it with exp(mu) (dynamic shifting).
    """
    return shifted(evenly_spaced(steps), shift, mu)


def evenly_spaced(steps: int) -> np.ndarray:
    """(steps,) float32 from 1 to 1 / steps."""
    return np.linspace(1.0, 1.0 / steps, steps, dtype=np.float32)


def shifted(u: np.ndarray, shift: float, mu: float | None = None) -> np.ndarray:
    """Sigmas u (N,) float32 with the shift of `sigmas` applied, and a final 0: (N + 1,) float32."""
    # the two formulas round differently; each is the one diffusers uses
    sigma = math.exp(mu) / (math.exp(mu) + (1 / u - 1)) if mu is not None else shift * u / (1 + (shift - 1) * u)
    return np.append(sigma, 0.0).astype(np.float32)


@dataclass(frozen=True)
class SchedulerConfig:
    shift: float = DEFAULT_SHIFT
    use_dynamic_shifting: bool = False
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    @classmethod
    def from_dict(cls, config: dict) -> SchedulerConfig:
        """Read scheduler/scheduler_config.json; refuse what this file does not implement."""
        fixed = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "invert_sigmas": False,
            "shift_terminal": None,
            "stochastic_sampling": False,
            "time_shift_type": "exponential",
            "use_beta_sigmas": False,
            "use_exponential_sigmas": False,
            "use_karras_sigmas": False,
        }
        read = read_config(cls, config, "scheduler", fixed)
        if read.base_image_seq_len == read.max_image_seq_len:
            raise CheckpointError(
                f"scheduler config: base_image_seq_len and max_image_seq_len must differ, but both are "
                f"{read.base_image_seq_len}"
            )
        steepest = max(abs(read.dynamic_mu(tokens)) for tokens in (1, IMAGE_TOKENS))
        if read.use_dynamic_shifting and steepest > MAX_MU:
            raise CheckpointError(
                f"scheduler config: base_shift {read.base_shift} and max_shift {read.max_shift}, with "
                f"base_image_seq_len and max_image_seq_len, make the logarithm of the shift {steepest:.0f} for some "
                f"sizes; expected at most {MAX_MU}"
            )
        return read

    def sigmas(
        self, steps: int, image_tokens: int, shift: float | None = None, unshifted: Sequence[float] | None = None
    ) -> np.ndarray:
        """The schedule that the config asks for; an explicit shift overrides it.

        unshifted sigmas, one per step, replace the evenly spaced ones.
        """
        u = evenly_spaced(steps) if unshifted is None else np.array(unshifted).astype(np.float32)
        if shift is None and self.use_dynamic_shifting:
            return shifted(u, DEFAULT_SHIFT, self.dynamic_mu(image_tokens))
        return shifted(u, self.shift if shift is None else shift)

    def dynamic_mu(self, image_tokens: int) -> float:
        """The logarithm of the shift, linear in the number of image tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return image_tokens * slope + self.base_shift - slope * self.base_image_seq_len


def times(sigmas: Sequence[float] | np.ndarray) -> list[float]:
    """The times 1 - sigma as diffusers computes them, in float32."""
    return [float((1000 - np.float32(sigma) * np.float32(1000)) / np.float32(1000)) for sigma in sigmas]


def add_noise(latents: mx.array, noise: mx.array, sigma: float) -> mx.array:
    """The point at sigma on the straight line from latents (0) to noise (1)."""
    return sigma * noise + (1 - sigma) * latents


def step(latents: mx.array, velocity: mx.array, sigma: float, next_sigma: float) -> mx.array:
    """An Euler step from sigma to next_sigma along velocity = d latents / d sigma."""
    return latents + float(np.float32(next_sigma) - np.float32(sigma)) * velocity
