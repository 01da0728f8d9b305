"""The models of the family, one row each: how to recognize them, and the defaults they give a request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import RequestError


@dataclass(frozen=True)
class Variant:
    """One model: its repository, defaults and capabilities.

    steps, guidance_scale and size (pixels per side, if a folder does not say) are its defaults; shift is its
    scheduler's. takes_guidance says whether it supports guidance and negative prompts.
    """

    name: str
    repository: str
    steps: int
    guidance_scale: float
    shift: float
    takes_guidance: bool
    size: int = 1024

    def notes(
        self, guidance_scale: float, negative_prompt: str, cfg_normalization: float, cfg_truncation: float
    ) -> Iterator[str]:
        """Notes on guidance, or on settings that only guidance uses, where they change nothing or make images worse."""
        advice = f"; try a guidance of {self.guidance_scale:g}" if self.takes_guidance else ", as Turbo requires"
        unused = {
            "the negative prompt": negative_prompt,
            "cfg normalization": cfg_normalization,
            "cfg truncation": cfg_truncation < 1,
        }
        for name, is_given in unused.items():
            if is_given and not guidance_scale:
                yield f"{name} changes nothing, since guidance is 0{advice}"
        if guidance_scale and not self.takes_guidance:
            yield (
                f"guidance is {guidance_scale:g}, but Turbo was trained to work without it: steps take twice as long, "
                f"and images rarely improve"
            )


TURBO = Variant("turbo", "Tongyi-MAI/Z-Image-Turbo", steps=8, guidance_scale=0.0, shift=3.0, takes_guidance=False)
MOST_TURBO_STEPS = TURBO.steps + 1  # its model card recommends both numbers
# 50 steps as in diffusers 0.42 and the official code; guidance 4 ("cfg 5" in other programs) is the highest its model
# card recommends.
BASE = Variant("base", "Tongyi-MAI/Z-Image", steps=50, guidance_scale=4.0, shift=6.0, takes_guidance=True)
# Turbo trained further without its distillation; it is published as a file. Steps and guidance ("cfg 3") as in
# ai-toolkit, which is by the same author.
DE_TURBO = Variant("de-turbo", "ostris/Z-Image-De-Turbo", steps=25, guidance_scale=2.0, shift=3.0, takes_guidance=True)
VARIANTS = {variant.name: variant for variant in (TURBO, BASE, DE_TURBO)}
DE_TURBO_NAME = re.compile(r"z[-_ ]?image[-_ ]?de[-_ ]?turbo", re.IGNORECASE)  # in the name of its file
MEMORIES = (8, 16, 24, 32, 64)  # gigabytes of memory of the Macs that README has advice for
# What a repository may be called for short.
ALIASES = {"z-image-turbo": TURBO.repository, "turbo": TURBO.repository, "z-image": BASE.repository}


def repository_of(name: str) -> str:
    """The Hugging Face id that an alias stands for; any other name as it is."""
    return ALIASES.get(name, name)


def named(name: str) -> Variant:
    """The variant with this name."""
    if name not in VARIANTS:
        raise RequestError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    return VARIANTS[name]


def recognize(shift: float, origins: list[str]) -> Variant:
    """The variant of a transformer: judged by its origins, newest first, otherwise by the scheduler's shift.

    origins are files, repositories, and what conversions recorded. A folder that matches neither, such as a fine-tuned
    model, is used like Turbo.
    """
    by_repository = {variant.repository: variant for variant in VARIANTS.values()}
    for origin in origins:
        if DE_TURBO_NAME.search(origin):
            return DE_TURBO
        if origin in by_repository:
            return by_repository[origin]
    return BASE if shift == BASE.shift else TURBO
