"""Everything about a run of training except its data: validated, and compared when a run is resumed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..errors import RequestError
from ..request import MAX_SEED, MAX_SIZE, SIZE_MULTIPLE
from ..untrusted import brief

OBJECTIVES = ("weighted", "logit-normal", "uniform")  # see `objective`
EXTRAS = ("adaln", "refiners")  # what may be trained besides the matrices of `layers`
RESOLUTION = 512  # by default, if the memory suffices
SAVE_EVERY = 250  # steps, by default
MOST = 2**31 - 1  # steps, images per step, and so on


@dataclass(frozen=True)
class Settings:
    """objective is one of OBJECTIVES; None is the model's default.

    No image is larger than resolution x resolution pixels. A step takes the mean gradient of `accumulate` images,
    clipped to the norm `clip`; the learning rate rises to `rate` over the first `warm_up` steps. dropout is the
    fraction of images trained with an empty caption. alpha None is the rank. extras are from EXTRAS.
    """

    steps: int = 3000
    rank: int = 16
    alpha: float | None = None
    rate: float = 1e-4
    decay: float = 1e-4
    clip: float = 1.0
    warm_up: int = 0
    accumulate: int = 1
    dropout: float = 0.05
    objective: str | None = None
    extras: tuple[str, ...] = ()
    resolution: int | None = None
    trigger: str | None = None
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("rank", 1), ("warm_up", 0), ("accumulate", 1)):
            check_count(name, getattr(self, name), least)
        check_count("seed", self.seed, 0, MAX_SEED)
        for name in ("rate", "clip", "alpha"):
            value = getattr(self, name)
            is_default = name == "alpha" and value is None
            if not is_default and not (_is_number(value) and 0 < value < math.inf):
                raise RequestError(f"{name} must be a positive number, got {brief(value)}")
        if not (_is_number(self.decay) and 0 <= self.decay < math.inf):
            raise RequestError(f"decay must be a number of at least 0, got {brief(self.decay)}")
        if not (_is_number(self.dropout) and 0 <= self.dropout <= 1):
            raise RequestError(f"dropout must be from 0 to 1, got {brief(self.dropout)}")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise RequestError(f"objective must be one of {', '.join(OBJECTIVES)}, got {brief(self.objective)}")
        if not isinstance(self.extras, (tuple, list)) or not all(extra in EXTRAS for extra in self.extras):
            raise RequestError(f"extras must be a list of {', '.join(EXTRAS)}, got {brief(self.extras)}")
        side = RESOLUTION if self.resolution is None else self.resolution
        if type(side) is not int or side % SIZE_MULTIPLE or not SIZE_MULTIPLE <= side <= MAX_SIZE:
            raise RequestError(
                f"resolution must be a multiple of {SIZE_MULTIPLE} from {SIZE_MULTIPLE} to {MAX_SIZE} pixels, got "
                f"{brief(self.resolution)}"
            )
        if self.trigger is not None and not isinstance(self.trigger, str):
            raise RequestError(f"trigger must be a word, got {brief(self.trigger)}")

    @property
    def scale(self) -> float:
        """The factor of up @ down."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def to_dict(self) -> dict:
        return asdict(self) | {"extras": list(self.extras)}


def check_count(name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """RequestError unless a value is a whole number from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} must be a whole number from {least} to {most}, got {brief(value)}")


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
