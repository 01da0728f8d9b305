"""The models of the family, a row each: what tells them apart, and what a request gets that leaves it open."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import RequestError


@dataclass(frozen=True)
class Variant:
    """One model: its repository, what it was made to be used with, and what it takes.

    steps, guidance_scale and size (pixels a side, where a folder does not say) are its defaults; shift is that of its
    scheduler. takes_guidance says whether guidance and negative prompts mean anything to it.
    """

    name: str
    repository: str
    steps: int
    guidance_scale: float
    shift: float
    takes_guidance: bool
    size: int = 1024


TURBO = Variant("turbo", "Tongyi-MAI/Z-Image-Turbo", steps=8, guidance_scale=0.0, shift=3.0, takes_guidance=False)
# 50 steps as in diffusers 0.42 and the official code; guidance 4, "cfg 5" elsewhere, is the most that its card advises.
BASE = Variant("base", "Tongyi-MAI/Z-Image", steps=50, guidance_scale=4.0, shift=6.0, takes_guidance=True)
VARIANTS = {variant.name: variant for variant in (TURBO, BASE)}


def named(name: str) -> Variant:
    """The variant of a name."""
    if name not in VARIANTS:
        raise RequestError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    return VARIANTS[name]


def recognize(shift: float, origins: list[str]) -> Variant:
    """Which variant a folder holds: by the origins that its conversion recorded, newest first, else by its shift.

    A folder of neither, such as of a model trained further, is used like Turbo.
    """
    by_repository = {variant.repository: variant for variant in VARIANTS.values()}
    by_shift = {variant.shift: variant for variant in VARIANTS.values()}
    known = [by_repository[origin] for origin in origins if origin in by_repository]
    return known[0] if known else by_shift.get(shift, TURBO)
