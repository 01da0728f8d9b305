"""GenerateRequest: a validated description of an image to generate. All checks of a caller's values are here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from numbers import Integral, Real
from typing import Any

from .errors import RequestError
from .untrusted import brief, is_sha256
from .variants import TURBO

LATENT_PIXELS = 8  # image pixels per latent pixel, along one side
SIZE_MULTIPLE = 16  # latent pixels are 8 wide, tokens 2 latent pixels
MAX_SIZE = 8192  # the reference's position tables end at 512 tokens per side
MAX_SEED = 2**64 - 1
MAX_PROMPT = 32_000  # characters; only 512 tokens are read, and megabytes would take seconds to tokenize
MAX_STEPS = 1000
TOKENS = 512  # of a prompt that are read by default, template included; the reference truncates on the right
MAX_TOKENS = 1504  # the reference's position tables end at 1536, and the image comes after the padded prompt
MAX_NUMBER = 1000  # for shift and guidance, which are usually from 1 to 10
RNGS = ("torch", "mlx")
MAX_UPSCALE = 8
REFINING = 0.2  # the strength that refines an enlarged image: two of Turbo's steps, from sigma 0.5
STRENGTH, MASKED_STRENGTH = 0.6, 1.0  # diffusers' defaults, without and with a mask
FEATHERS = 64  # a mask's feather is the shorter side divided by this: 16 pixels of 1024
RESAMPLE = 5  # times per step of inpainting: see examples/guided-images.md
MAX_RESAMPLE = 100
MAX_MARGIN = 1024  # pixels, of a mask's feather and growth
LORA_TAG = re.compile(r"<(?:lora|lyco):([^:<>]{1,200}):?([^:<>]{0,20})[^<>]{0,50}>", re.IGNORECASE)  # of A1111
ARRAYS = (
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "image",
    "posterior_noise",
    "mask_image",
)  # named by digest
# The kinds of control images made from a photo: images.controls makes the first four, detectors the others.
CONTROLS = ("canny", "gray", "scribble", "tile", "lines", "pose", "depth")
FINGERPRINT = re.compile(r"[0-9a-f]{10}")
REQUIRED: Any = object()  # default of a required field that follows optional ones


@dataclass(frozen=True)
class LoraUse:
    """A LoRA at a strength: 1 is as trained, 0 is off. sha256 is its file's; the name is for display."""

    name: str
    strength: float = 1.0
    sha256: str | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable() or len(self.name) > 200:
            raise RequestError(f"a LoRA's name must be up to 200 printable characters, got {brief(self.name)}")
        _check_number(f"the strength of LoRA {self.name}", self.strength, -MAX_NUMBER)
        object.__setattr__(self, "strength", float(self.strength))
        if self.sha256 is not None and not is_sha256(self.sha256):
            raise RequestError(
                f"the sha256 of LoRA {self.name} must be 64 hexadecimal digits, got {brief(self.sha256)}"
            )

    @classmethod
    def of(cls, value: Any) -> LoraUse:
        """A LoraUse unchanged, or one made from its dict."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict) or not {"name"} <= value.keys() <= {"name", "strength", "sha256"}:
            raise RequestError(f"a LoRA must be an object with name, strength and sha256, got {brief(value)}")
        return cls(**value)


@dataclass(frozen=True)
class ControlUse:
    """A control image, named by the SHA-256 of its pixels, that a ControlNet follows at a scale.

    prepare says what is made from it first (see CONTROLS), such as its edges; None if it is used as it is. Without an
    image, a ControlNet that reads a mask is only shown what inpainting keeps. scale is None for the ControlNet's own.
    It takes part after the fraction `start` of the steps that run, and up to the fraction `end`.
    """

    image: str | None = None
    prepare: str | None = None
    scale: float | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        _check_digest("control image", self.image)
        if self.prepare not in (None, *CONTROLS):
            raise RequestError(f"control: prepare must be one of {', '.join(CONTROLS)}, got {brief(self.prepare)}")
        if self.prepare and not self.image:
            raise RequestError(f"control: there is no image to prepare as {self.prepare}; give one")
        if self.scale is not None:
            _check_number("control scale", self.scale, 0.0)
            object.__setattr__(self, "scale", float(self.scale))
        for name in ("start", "end"):
            _check_number(f"control {name}", getattr(self, name), 0.0)
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.start < self.end <= 1:
            raise RequestError(
                f"control start must be below control end, and both from 0 to 1, got {self.start:g} and {self.end:g}"
            )

    def scales(self, steps: int) -> list[float]:
        """Its scale in each of the steps that run: 0 outside its part of them."""
        # Source: diffusers' controlnet_keep
        inside = [self.start <= i / steps and (i + 1) / steps <= self.end for i in range(steps)]
        return [(self.scale or 0.0) * active for active in inside]

    @classmethod
    def of(cls, value: Any) -> ControlUse:
        """A ControlUse unchanged, or one made from its dict."""
        if isinstance(value, cls):
            return value
        known = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or not {*value} <= {*known}:
            raise RequestError(f"a control must be an object with keys from {', '.join(known)}, got {brief(value)}")
        return cls(**value)


@dataclass(frozen=True)
class Outpaint:
    """By how many pixels an image is extended on each side: multiples of 16."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __post_init__(self):
        for side, pixels in asdict(self).items():
            _check_int(f"outpaint: {side}", pixels, 0, MAX_SIZE)
            if pixels % SIZE_MULTIPLE:
                lower = pixels - pixels % SIZE_MULTIPLE
                raise RequestError(
                    f"outpaint: {side} must be a multiple of {SIZE_MULTIPLE} pixels, got {pixels}; the nearest are "
                    f"{lower} and {lower + SIZE_MULTIPLE}"
                )
        if not any(asdict(self).values()):
            raise RequestError("outpaint: expected at least one side to extend, such as left=256")

    @classmethod
    def of(cls, value: Any) -> Outpaint:
        """An Outpaint unchanged, or one made from its dict or from text such as "left=256,top=128"."""
        if isinstance(value, cls):
            return value
        if isinstance(value, dict) and {*value} <= {field.name for field in fields(cls)}:
            return cls(**value)
        sides = re.findall(r"(left|top|right|bottom)=(\d{1,9})", value) if isinstance(value, str) else []
        if not sides or value != ",".join(map("=".join, sides)) or len(dict(sides)) < len(sides):
            raise RequestError(
                f"outpaint must be sides (left, top, right, bottom), each at most once, with a number of pixels, such "
                f"as left=256,top=128, got {brief(value)}"
            )
        return cls(**{side: int(pixels) for side, pixels in sides})


@dataclass(frozen=True)
class GenerateRequest:
    """Everything that an image depends on, except the model. Invalid values raise RequestError on creation.

    prompt and negative_prompt are truncated after max_sequence_length tokens. width and height are in pixels, multiples
    of 16 up to 8192. seed is from 0 to 2**64 - 1; rng is the random number generator for the noise, "torch" or "mlx".
    steps, 1 to 1000, is the number of denoising steps. shift is the timestep shift, where higher spends more steps at
    high noise; None uses the model's own. sigmas, one per step and falling from at most 1, replace the evenly spaced
    ones before the shift. num_images are generated at once from one seed.

    guidance_scale follows diffusers' convention; 0 is off. cfg_normalization limits the length of a guided velocity to
    that many times the prompt's own; 0 is no limit. Steps whose time, from 0 (noise) to 1, is above cfg_truncation are
    not guided.

    image starts the steps from an image, scaled and cropped to the size. strength, above 0 and at most 1, is the
    fraction of the steps that then run: 1 ignores the image, and a small one hardly changes it. sample_posterior
    samples the image's latents from the distribution that the VAE gives, as diffusers does, instead of its mean.

    mask_image says which part of the image is regenerated (white); the pixels outside it are unchanged. The
    new part covers the old one gradually, over mask_feather pixels inside the mask, by default a 64th of the shorter
    side. mask_resample, by default 5, is how many times the latents are sampled again before each step. mask_grow moves
    the mask's edges outwards by that many pixels. With mask_soft, grey parts are regenerated in the later steps only,
    the darker the fewer; otherwise the mask is thresholded at half.

    outpaint extends the image on the given sides instead; width and height are those of the whole.

    upscale enlarges the image, or the one generated first, by this factor, and refines it, with strength 0.2 unless
    another is given; width and height are those before it is enlarged. The steps run on tiles of at most `tile` pixels
    per side, by default the model's own size; 0 is the whole image at once. The result still shows the image; only
    detail that is too fine for the image's size is new.

    image, mask_image, latents, prompt_embeds, negative_prompt_embeds and posterior_noise are the SHA-256 of arrays: see
    `mlx_zimage.inputs`. latents and the embeddings replace the seed's noise and the prompts; posterior_noise replaces
    the seed's noise for sample_posterior. latents have the size at which steps begin: with image and upscale, that of
    the enlarged image. loras are applied to the model for this request. A ControlNet, whose fingerprint is in
    controlnet, follows the controls. width, height, steps, guidance_scale, strength, loras and controlnet may be None;
    a pipeline's `complete` fills in its own.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    seed: int = REQUIRED
    steps: int | None = None
    guidance_scale: float | None = None  # g here is "cfg g + 1" in other programs
    negative_prompt: str = ""
    shift: float | None = None  # None: from the model's scheduler config
    num_images: int = 1
    rng: str = "torch"
    latents: str | None = None
    sigmas: tuple[float, ...] | None = None
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    max_sequence_length: int = TOKENS
    prompt_embeds: str | None = None
    negative_prompt_embeds: str | None = None
    loras: tuple[LoraUse, ...] | None = None
    image: str | None = None
    strength: float | None = None  # image to image; mflux's --image-strength is 1 minus this
    sample_posterior: bool = False
    posterior_noise: str | None = None
    mask_image: str | None = None
    mask_feather: int | None = None
    mask_grow: int = 0
    mask_soft: bool = False
    mask_resample: int | None = None
    outpaint: Outpaint | None = None
    upscale: float | None = None
    tile: int | None = None
    controls: tuple[ControlUse, ...] = ()
    controlnet: str | None = None

    def __post_init__(self):
        if self.seed is REQUIRED:
            raise TypeError("GenerateRequest.__init__() missing 1 required positional argument: 'seed'")
        check_prompt_and_seed(self.prompt, self.seed, self.prompt_embeds is not None)
        check_prompt(self.negative_prompt, "negative prompt")
        if self.width is not None:
            check_size("width", self.width)
        if self.height is not None:
            check_size("height", self.height)
        if self.steps is not None:
            _check_int("steps", self.steps, 1, MAX_STEPS)
        _check_int("num_images", self.num_images, 1, 1000)
        if self.guidance_scale is not None:
            _check_number("guidance_scale", self.guidance_scale, 0.0)
        _check_number("cfg_normalization", self.cfg_normalization, 0.0)
        _check_number("cfg_truncation", self.cfg_truncation, 0.0)
        check_tokens(self.max_sequence_length)
        if self.shift is not None:
            _check_number("shift", self.shift, 0.01)
        if self.rng not in RNGS:
            raise RequestError(f"rng must be one of {', '.join(RNGS)}, got {brief(self.rng)}")
        for name, digest in self.arrays.items():
            _check_digest(name, digest)
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", _falling(self.sigmas))
            if self.steps is None:
                object.__setattr__(self, "steps", len(self.sigmas))
            if self.steps != len(self.sigmas):
                raise RequestError(
                    f"sigmas must have one value per step: expected {self.steps} but got {len(self.sigmas)}"
                )

        if self.strength is not None:
            _check_strength(self.strength, self.steps)
        for name in ("sample_posterior", "mask_soft"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {brief(getattr(self, name))}")
        for name, most in (("mask_feather", MAX_MARGIN), ("mask_grow", MAX_MARGIN), ("mask_resample", MAX_RESAMPLE)):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, most)

        if self.outpaint is not None:
            object.__setattr__(self, "outpaint", Outpaint.of(self.outpaint))
        if self.upscale is not None:
            _check_number("upscale", self.upscale, 1.0, MAX_UPSCALE)
            if self.upscale == 1:
                raise RequestError("upscale 1 would not enlarge the image; give a factor above 1, such as 2")
            if self.num_images > 1:
                raise RequestError(f"upscale takes one image per seed, got {self.num_images}; use several seeds")
        if self.tile is not None:
            _check_int("tile", self.tile, 0, MAX_SIZE)

        if self.loras is not None:
            if not isinstance(self.loras, (list, tuple)):
                raise RequestError(f"loras must be a list, got {brief(self.loras)}")
            object.__setattr__(self, "loras", tuple(map(LoraUse.of, self.loras)))

        if not isinstance(self.controls, (list, tuple)):
            raise RequestError(f"controls must be a list, got {brief(self.controls)}")
        object.__setattr__(self, "controls", tuple(map(ControlUse.of, self.controls)))
        if self.controlnet is not None and not FINGERPRINT.fullmatch(str(self.controlnet)):
            raise RequestError(f"controlnet must be ten lowercase hexadecimal digits, got {brief(self.controlnet)}")

        for field in fields(self):  # NumPy numbers become Python's, so that a request always converts to JSON
            value = getattr(self, field.name)
            if isinstance(value, Real) and type(value) not in (int, float, bool):
                object.__setattr__(self, field.name, int(value) if isinstance(value, Integral) else float(value))

    @property
    def extent(self) -> tuple[int, int, int]:
        """Width, height and steps; RequestError if one of them is None."""
        if self.width is None or self.height is None or self.steps is None:
            raise RequestError("the request has no size or steps yet; a pipeline's `complete` fills in the model's own")
        return self.width, self.height, self.steps

    @property
    def arrays(self) -> dict[str, str | None]:
        """The digests of the arrays that it uses, by their names in `Inputs`; None for those it does not."""
        return {name: getattr(self, name) for name in ARRAYS}

    @property
    def first_step(self) -> int:
        """The step at which it begins, counted from 0: those before it have more noise than an image is given."""
        if self.image is None or self.strength is None or self.steps is None:
            return 0
        # Source: diffusers' get_timesteps, with its roundings
        return int(max(self.steps - min(self.steps * self.strength, self.steps), 0))

    def check_image(self) -> None:
        """Refuse what is for image to image only, in a request without an image."""
        needs = ("mask_image", "outpaint", "strength", "sample_posterior", "tile")
        for name in needs[:2] if self.upscale else needs:
            if self.image is None and getattr(self, name) not in (None, False):
                raise RequestError(f"{name} is for image to image, but there is no image to start from; give one")
        parts = [name for name in ("mask_image", "outpaint", "upscale") if getattr(self, name) is not None]
        if len(parts) > 1:
            raise RequestError(f"{parts[0]} and {parts[1]} were both given; give one, then run the other on its result")
        if self.posterior_noise is not None and not self.sample_posterior:
            raise RequestError("posterior_noise is given, but not used: it is for sample_posterior")
        of_mask = {"mask_feather": None, "mask_resample": None, "mask_grow": 0, "mask_soft": False}
        for name, unused in of_mask.items():
            used = self.inpaints if unused is None else self.mask_image is not None
            if not used and getattr(self, name) != unused:
                if self.outpaint is not None:
                    raise RequestError(f"{name} is for a mask of your own, but outpaint makes one; leave it out")
                raise RequestError(f"{name} is for inpainting, but there is no mask; give one")

    def check_controls(self) -> None:
        """Refuse controls that would change nothing, in a complete request."""
        steps = self.extent[2] - self.first_step
        for use in self.controls:
            if use.scale and not any(use.scales(steps)):
                raise RequestError(
                    f"none of the steps to run ({steps}) lies between control start {use.start:g} and control end "
                    f"{use.end:g}; move them apart"
                )
            if use.image is None and not self.inpaints:
                raise RequestError("a control without an image needs a mask; give a mask, or a control image")

    @property
    def control_images(self) -> list[str]:
        """The digests of its control images."""
        return [use.image for use in self.controls if use.image is not None]

    @property
    def inpaints(self) -> bool:
        """Whether only a part of its image is generated."""
        return self.mask_image is not None or self.outpaint is not None

    @property
    def refinement(self) -> GenerateRequest | None:
        """Image to image on the enlarged image, which is its second part; None without upscale."""
        if self.upscale is None:
            return None
        width, height = (round(side * self.upscale / SIZE_MULTIPLE) * SIZE_MULTIPLE for side in self.extent[:2])
        image = self.image or "0" * 64  # of the one that is generated first, not known yet
        latents = self.latents if self.image else None  # otherwise they are the noise of the image
        return replace(self, width=width, height=height, image=image, latents=latents, upscale=None)

    @property
    def parts(self) -> list[GenerateRequest]:
        """What a complete request runs in turn: with upscale, its image unless given, and its refinement."""
        if self.refinement is None:
            return [self]
        if self.image is not None:
            return [self.refinement]
        first = replace(self, strength=None, sample_posterior=False, posterior_noise=None, upscale=None, tile=None)
        return [first, self.refinement]

    @property
    def guided(self) -> bool:
        """Whether its steps also use the negative prompt."""
        return bool(self.guidance_scale)

    def with_loras(self, loaded: Mapping[str, str], strengths: Mapping[str, float]) -> GenerateRequest:
        """The request with its LoRAs found among the loaded ones (SHA-256 by name); strengths are used if it has None.

        A LoRA is found by its SHA-256 if it has one, otherwise by name. Those of strength 0 are left out.
        """
        given = [LoraUse(*use) for use in strengths.items()] if self.loras is None else self.loras
        names = {sha256: name for name, sha256 in loaded.items()}
        found: dict[str, LoraUse] = {}
        for use in given:
            name = use.name if use.sha256 is None else names.get(use.sha256, "")
            if name not in loaded:
                which = f"{use.name!r} (SHA-256 {use.sha256})" if use.sha256 else repr(use.name)
                raise RequestError(
                    f"the request uses LoRA {which}, which is not loaded; load that file first "
                    f"(loaded: {', '.join(map(repr, loaded)) or 'none'})"
                )
            if name in found:
                raise RequestError(f"the request uses LoRA {name!r} twice; give its strength once")
            found[name] = LoraUse(name, use.strength, loaded[name])
        return replace(self, loras=tuple(use for use in found.values() if use.strength))

    @property
    def lora_strengths(self) -> dict[str, float]:
        """The strength of each LoRA, by its SHA-256."""
        return {str(use.sha256): use.strength for use in self.loras or ()}

    def to_dict(self) -> dict:
        """The fields as a dict for JSON."""
        return asdict(self) | {"controls": [asdict(use) for use in self.controls]}

    @classmethod
    def from_dict(cls, values: dict) -> GenerateRequest:
        """The inverse of to_dict; fields with defaults may be missing, unknown fields raise RequestError."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise RequestError(f"a request has no field {unknown[0]!r}")
        try:
            return cls(**values)
        except TypeError as error:
            raise RequestError(f"incomplete request: {error}") from error


def check_prompt(text: str, name: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"the {name} must be text, got {type(text).__name__}")
    if tag := LORA_TAG.search(text):
        raise RequestError(
            f"the {name} contains {tag[0]}, which the text encoder would read as words; remove it and use "
            f"--lora {tag[1]}.safetensors {tag[2] or 1} (load_lora in Python)"
        )
    if len(text) > MAX_PROMPT:
        raise RequestError(f"the {name} has {len(text)} characters; at most {MAX_PROMPT} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the {name} is not valid Unicode at character {error.start}; pass UTF-8") from None


def check_prompt_and_seed(prompt: str, seed: int, has_embeds: bool) -> None:
    """Check what differs in many requests that are otherwise the same; embeddings may stand in for the prompt."""
    check_prompt(prompt, "prompt")
    if not prompt.strip() and not has_embeds:
        raise RequestError("the prompt is empty; describe the image in a few words")
    _check_int("seed", seed, 0, MAX_SEED, "2**64 - 1")


def check_tokens(max_sequence_length: int) -> None:
    _check_int("max_sequence_length", max_sequence_length, 1, MAX_TOKENS)


def check_size(name: str, value: int) -> None:
    _check_int(name, value)
    if value % SIZE_MULTIPLE or not SIZE_MULTIPLE <= value <= MAX_SIZE:
        lower = value - value % SIZE_MULTIPLE
        nearest = {min(max(size, SIZE_MULTIPLE), MAX_SIZE) for size in (lower, lower + SIZE_MULTIPLE)}
        shown = " and ".join(map(str, sorted(nearest)))
        raise RequestError(
            f"{name} must be a multiple of {SIZE_MULTIPLE} pixels from {SIZE_MULTIPLE} to {MAX_SIZE}, "
            f"got {brief(value)}; the nearest {'are' if len(nearest) > 1 else 'is'} {shown}"
        )


def _falling(sigmas: Any) -> tuple[float, ...]:
    """A caller's sigmas as Python floats."""
    try:
        values = tuple(float(sigma) for sigma in sigmas)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"sigmas must be a list of numbers, got {brief(sigmas)}") from None
    if not 1 <= len(values) <= MAX_STEPS:
        raise RequestError(f"sigmas must be 1 to {MAX_STEPS} numbers, got {len(values)}")
    if not all(a > b for a, b in zip(values, (*values[1:], 0.0), strict=True)) or values[0] > 1:
        raise RequestError(
            f"sigmas must fall from at most 1 to above 0, got {list(values)}; the final 0 is added automatically"
        )
    return values


def _check_digest(name: str, value: str | None) -> None:
    if value is not None and not is_sha256(value):
        raise RequestError(f"{name} must be the SHA-256 of an array in hexadecimal, got {brief(value)}")


def _check_strength(strength: float, steps: int | None) -> None:
    _check_number("strength", strength, 0.0, 1)
    if int((steps or 1) - (steps or 1) * strength) == (steps or 1):
        one = (
            f"{1 / steps:.3g} runs one step of {steps}"
            if steps
            else f"a strength of 1 / steps ({1 / TURBO.steps:g} for {TURBO.steps} steps) runs one"
        )
        raise RequestError(f"strength {strength:g} leaves no step to run: the image would not change; {one}")


def _check_int(name: str, value: int, low: float = -inf, high: float = inf, high_text: str = "") -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise RequestError(f"{name} must be a whole number, got {brief(value)}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high_text or high}, got {brief(value)}")


def _check_number(name: str, value: float, low: float, high: float = MAX_NUMBER) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} must be a number, got {brief(value)}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low:g} to {high:g}, got {brief(value)}")
