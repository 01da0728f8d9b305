"""What a request takes: seconds and memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx

from .memory import Plan
from .networks import Phase
from .sampling import Step


@dataclass(frozen=True)
class Cost:
    """What a request took up to one of its images: seconds, and peak memory in bytes, measured and predicted.

    The first step includes reading the transformer. encode_s is 0 for a cached prompt, image_s without an image to
    start from; scale_s, the time to find float16's scale, is 0 in other dtypes and when the scale is cached.
    """

    elapsed_s: float
    scale_s: float
    encode_s: float
    steps_s: tuple[float, ...]
    decode_s: float
    peak: int
    predicted_peak: int
    image_s: float = 0.0

    def to_dict(self) -> dict:
        """Rounded values for JSON; memory in GB."""
        first, *rest = self.steps_s
        return {
            "seconds": round(self.elapsed_s, 4),
            "scale_seconds": round(self.scale_s, 4),
            "encode_seconds": round(self.encode_s, 4),
            "image_seconds": round(self.image_s, 4),
            "first_step_seconds": round(first, 4),
            "step_seconds": round(sum(rest) / len(rest), 4) if rest else None,
            "decode_seconds": round(self.decode_s, 4),
            "peak_memory_gb": round(self.peak / 1e9, 4),
            "predicted_peak_memory_gb": round(self.predicted_peak / 1e9, 4),
        }


class Clock:
    """Times one request: starts when created, and is given the pipeline's events as they arrive."""

    def __init__(self) -> None:
        mx.reset_peak_memory()
        self.begin = self.last = time.perf_counter()
        self.before = {"scale": 0.0, "encode": 0.0, "image": 0.0}  # the phases before the steps
        self.steps: list[float] = []

    def __call__(self, event: Phase | Step) -> None:
        if isinstance(event, Step):
            del self.steps[event.index :]  # drop the steps of an image that started over
            self.steps.append(self._lap())
        elif event.name in self.before:
            self.before[event.name] += self._lap()

    def cost(self, plan: Plan) -> Cost:
        """The cost of an image that has arrived, and was generated according to plan."""
        decode, before = self._lap(), self.before
        return Cost(
            elapsed_s=self.last - self.begin,
            scale_s=before["scale"],
            encode_s=before["encode"],
            steps_s=tuple(self.steps),
            decode_s=decode,
            peak=mx.get_peak_memory(),
            predicted_peak=plan.peak,
            image_s=before["image"],
        )

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self.last = now - self.last, now
        return lap
