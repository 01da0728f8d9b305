"""GenerateRequest: one validated description of what to draw. All checks of a caller's values live here."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from math import inf
from numbers import Integral, Real
from typing import Any

from .errors import RequestError

LATENT_PIXELS = 8  # picture pixels per latent pixel
SIZE_MULTIPLE = 16  # latent pixels are 8 wide, tokens 2 latent pixels
MAX_SIZE = 8192  # the reference's position tables end at 512 tokens a side
MAX_SEED = 2**64 - 1
MAX_PROMPT = 32_000  # characters; 512 tokens are read; megabytes would take seconds to tokenize
MAX_STEPS = 1000
MAX_NUMBER = 1000  # of shift and guidance, which are of the order of 1 to 10
RNGS = ("torch", "mlx")
DIGEST = re.compile(r"[0-9a-f]{64}")
REQUIRED: Any = object()  # the default of a field that must be given, after others that need not


@dataclass(frozen=True)
class GenerateRequest:
    """What to draw: all that a picture depends on but for the model. Checked when it is made: RequestError.

    prompt and negative_prompt are cut after 512 tokens. width and height are pixels, multiples of 16 up to 8192. seed
    is from 0 to 2**64 - 1, and rng says whose noise it gives: "torch" or "mlx". steps, 1 to 1000, are calls of the
    transformer. guidance_scale counts as diffusers does, and 0 is off. shift bends the schedule towards noise; None is
    the model's own. num_images pictures are drawn at once from one seed. latents is the SHA-256 of the initial noise
    where it is not the seed's: see `mlx_zimage.inputs`. width, height and steps may be None until a model gives its
    own, as a pipeline's `complete` does.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    seed: int = REQUIRED
    steps: int | None = None
    guidance_scale: float = 0.0  # g here is "cfg g + 1" elsewhere
    negative_prompt: str = ""
    shift: float | None = None  # None: what the model's scheduler says
    num_images: int = 1
    rng: str = "torch"
    latents: str | None = None

    def __post_init__(self):
        if self.seed is REQUIRED:
            raise TypeError("GenerateRequest.__init__() missing 1 required positional argument: 'seed'")
        check_prompt(self.prompt, "prompt")
        if not self.prompt.strip():
            raise RequestError("the prompt is empty; describe the picture in a few words")
        check_prompt(self.negative_prompt, "negative prompt")
        if self.width is not None:
            check_size("width", self.width)
        if self.height is not None:
            check_size("height", self.height)
        _check_int("seed", self.seed, 0, MAX_SEED, "2**64 - 1")
        if self.steps is not None:
            _check_int("steps", self.steps, 1, MAX_STEPS)
        _check_int("num_images", self.num_images, 1, 1000)
        _check_number("guidance_scale", self.guidance_scale, 0.0)
        if self.shift is not None:
            _check_number("shift", self.shift, 0.01)
        if self.rng not in RNGS:
            raise RequestError(f"rng must be one of {', '.join(RNGS)}, got {self.rng!r}")
        if self.latents is not None and not (isinstance(self.latents, str) and DIGEST.fullmatch(self.latents)):
            raise RequestError(f"latents must be the SHA-256 of an array in hexadecimal, got {self.latents!r}")

        for field in fields(self):  # NumPy's numbers become Python's, so that a request is always JSON
            value = getattr(self, field.name)
            if isinstance(value, Real) and type(value) not in (int, float):
                object.__setattr__(self, field.name, int(value) if isinstance(value, Integral) else float(value))

    @property
    def extent(self) -> tuple[int, int, int]:
        """Width, height and steps; RequestError while one of them is unset."""
        if self.width is None or self.height is None or self.steps is None:
            raise RequestError("the request has no size or steps yet; a pipeline's `complete` gives the model's own")
        return self.width, self.height, self.steps

    def to_dict(self) -> dict:
        """Its fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> GenerateRequest:
        """The request of to_dict; fields with defaults may be missing, unknown ones raise RequestError."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise RequestError(f"a request has no field {unknown[0]!r}")
        try:
            return cls(**values)
        except TypeError as error:
            raise RequestError(f"not a whole request: {error}") from error


def check_prompt(text: str, name: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"the {name} must be text, got {type(text).__name__}")
    if len(text) > MAX_PROMPT:
        raise RequestError(f"the {name} has {len(text)} characters; at most {MAX_PROMPT} are taken")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the {name} is not valid Unicode at character {error.start}; pass UTF-8") from None


def check_size(name: str, value: int) -> None:
    _check_int(name, value)
    if value % SIZE_MULTIPLE or not SIZE_MULTIPLE <= value <= MAX_SIZE:
        lower = value - value % SIZE_MULTIPLE
        nearest = {min(max(size, SIZE_MULTIPLE), MAX_SIZE) for size in (lower, lower + SIZE_MULTIPLE)}
        told = " and ".join(map(str, sorted(nearest)))
        raise RequestError(
            f"{name} must be a multiple of {SIZE_MULTIPLE} pixels from {SIZE_MULTIPLE} to {MAX_SIZE}, got {value}; "
            f"the nearest {'are' if len(nearest) > 1 else 'is'} {told}"
        )


def _check_int(name: str, value: int, low: float = -inf, high: float = inf, high_text: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high_text or high}, got {value}")


def _check_number(name: str, value: float, low: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} must be a number, got {value!r}")
    if not low <= value <= MAX_NUMBER:
        raise RequestError(f"{name} must be from {low:g} to {MAX_NUMBER}, got {value}")
