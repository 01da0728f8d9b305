"""The models of the family, one row each: how to recognize them, and the defaults they give a request."""

from __future__ import annotations

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


TURBO = Variant("turbo", "Tongyi-MAI/Z-Image-Turbo", steps=8, guidance_scale=0.0, shift=3.0, takes_guidance=False)
# 50 steps as in diffusers 0.42 and the official code; guidance 4 ("cfg 5" in other programs) is the highest its model
# card recommends.
BASE = Variant("base", "Tongyi-MAI/Z-Image", steps=50, guidance_scale=4.0, shift=6.0, takes_guidance=True)
VARIANTS = {variant.name: variant for variant in (TURBO, BASE)}
MEMORIES = (8, 16, 24, 32, 64)  # gigabytes of the Macs that README advises
# What a repository may be called for short.
ALIASES = {"z-image-turbo": TURBO.repository, "turbo": TURBO.repository, "z-image": BASE.repository}


def named(name: str) -> Variant:
    """The variant with this name."""
    if name not in VARIANTS:
        raise RequestError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    return VARIANTS[name]


def recognize(shift: float, origins: list[str]) -> Variant:
    """The variant in a folder: from the origins that its conversion recorded, newest first, otherwise from its shift.

    A folder that matches neither, such as a fine-tuned model, is used like Turbo.
    """
    by_repository = {variant.repository: variant for variant in VARIANTS.values()}
    by_shift = {variant.shift: variant for variant in VARIANTS.values()}
    known = [by_repository[origin] for origin in origins if origin in by_repository]
    return known[0] if known else by_shift.get(shift, TURBO)
