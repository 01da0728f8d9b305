"""Previews: what a LoRA generates while it is trained, from prompts and seeds that stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import MemoryBudgetError
from ..networks import Phase
from ..pipeline import Generated, ZImagePipeline
from ..request import GenerateRequest
from ..weights.deltas import Delta
from ..weights.lora import Lora


@dataclass(frozen=True)
class Previewed:
    """The image of preview prompt `index` with the LoRA as it is after a step: pixels (H, W, 3) uint8."""

    step: int
    index: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Previews:
    """Images of prompts, prompt i from seed i, of side x side pixels; training holds `held` bytes meanwhile."""

    pipe: ZImagePipeline
    prompts: Sequence[str]
    side: int
    held: int

    def check(self, output: Path, deltas: Mapping[str, Delta]) -> None:
        """Refuse, before training, prompts whose images cannot be generated with a LoRA of these differences."""
        if not self.prompts:
            return
        extras = self.pipe.networks.extras_of({"": Lora(output, "", {"transformer": deltas})}, {"": 1.0})
        with self._beside_training():
            for request in self.requests:
                try:
                    self.pipe.plan(request, loras=extras)
                except MemoryBudgetError as error:
                    raise MemoryBudgetError(
                        f"the previews do not fit in memory alongside what training already uses: {error}. You can "
                        f"also leave out --preview (previews in Python)"
                    ) from error

    def generate(self, lora: Path, step: int) -> Iterator[Phase | Previewed]:
        """The images with the LoRA in a file, which is unloaded afterwards."""
        if not self.prompts:
            return
        name = self.pipe.load_lora(lora)
        try:
            with self._beside_training():
                for i, request in enumerate(self.requests):
                    for event in self.pipe.stream(request):
                        if isinstance(event, Generated):
                            yield Previewed(step, i, event.pixels)
                        else:
                            yield Phase("previews", i, len(self.prompts))
        finally:
            self.pipe.unload_lora(name)

    def are_in(self, folder: Path, step: int) -> bool:
        """Whether all previews of a step were saved in a run's folder."""
        return all(path_of(folder, step, i).exists() for i in range(len(self.prompts)))

    @property
    def requests(self) -> list[GenerateRequest]:
        return [GenerateRequest(prompt, self.side, self.side, seed=i) for i, prompt in enumerate(self.prompts)]

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        self.pipe.budget -= self.held
        try:
            yield
        finally:
            self.pipe.budget += self.held


def path_of(folder: Path, step: int, index: int) -> Path:
    """Where a run's folder has a preview, if it was saved."""
    return folder / "previews" / f"{step:06}-{index}.png"
