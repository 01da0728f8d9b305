"""Previews: what a LoRA generates while it is trained, from prompts and seeds that stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import MemoryBudgetError, NumericsError, RequestError
from ..networks import Phase
from ..pipeline import Generated, ZImagePipeline
from ..request import GenerateRequest, LoraUse
from ..untrusted import brief
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

    def check(self, loras: Mapping[str, Lora], strengths: Mapping[str, float]) -> None:
        """Refuse, before training, prompts whose images cannot be generated with these LoRAs attached."""
        extras = self.pipe.networks.extras_of(loras, strengths)
        with self._beside_training():
            for i, prompt in enumerate(self.prompts):
                try:
                    self.pipe.plan(self._request(i), loras=extras)
                except RequestError as error:
                    raise RequestError(f"preview {brief(prompt)}: {error}") from error
                except MemoryBudgetError as error:
                    raise MemoryBudgetError(
                        f"the previews do not fit in memory alongside what training already uses: {error}. You can "
                        f"also lower --resolution, or leave out --preview (previews in Python)"
                    ) from error

    def generate(self, lora: Path, step: int) -> Iterator[Phase | Previewed]:
        """The images with the LoRA in a file, which is unloaded afterwards."""
        if not self.prompts:
            return
        name = self.pipe.load_lora(lora)
        try:
            with self._beside_training():
                for i, prompt in enumerate(self.prompts):
                    request = replace(self._request(i), loras=(LoraUse(name),))
                    try:
                        for event in self.pipe.stream(request):
                            if isinstance(event, Generated):
                                yield Previewed(step, i, event.pixels)
                            else:
                                yield Phase("previews", i, len(self.prompts))
                    except NumericsError as error:
                        raise NumericsError(
                            f"preview {brief(prompt)}: {error}. To go on without previews, run the same command again "
                            f"without --preview (previews in Python)"
                        ) from error
        finally:
            self.pipe.unload_lora(name)

    def are_in(self, folder: Path, step: int) -> bool:
        """Whether all previews of a step were saved in a run's folder."""
        return all(path_of(folder, step, i).exists() for i in range(len(self.prompts)))

    def _request(self, index: int) -> GenerateRequest:
        return GenerateRequest(self.prompts[index], self.side, self.side, seed=index)

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
