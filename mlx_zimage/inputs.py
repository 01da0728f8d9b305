"""The arrays that a request uses. They are passed alongside it, and it refers to them by digest."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from PIL import Image

from .errors import RequestError
from .images.masks import canvas, canvas_mask, fit_mask, read_mask, values
from .images.source import cover, digest, over_white, read_image
from .noise import initial_noise, noises
from .request import LATENT_PIXELS, MAX_TOKENS, SIZE_MULTIPLE, Outpaint
from .untrusted import open_regular

MAX_NPY = 70 * 10**6  # bytes; float32 latents of the largest image take 67 MB
NPY_MAGIC, NPY_HEADER = b"\x93NUMPY", 256  # bytes within which a header of four axes ends


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arrays passed alongside a request; None for those it does not use.

    They hold real numbers, in NumPy, MLX or torch. latents (B, 16, height / 8, width / 8) replace the seed's noise;
    prompt_embeds and negative_prompt_embeds (L, cap_feat_dim), as from a pipeline's `encode`, replace the prompts.
    image is what image to image starts from, as `images.source.read_image` takes it: a file, a PIL image or an array;
    mask_image, of the same size or that of the request, is white where inpainting regenerates it.
    posterior_noise (1, 16, height / 8, width / 8) replaces the seed's noise for sample_posterior. control_images are
    those of the request's controls, in any order, and as `images.source.read_image` takes them.
    """

    latents: Any = None
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    image: Any = None
    posterior_noise: Any = None
    mask_image: Any = None
    control_images: Sequence[Any] = ()

    @classmethod
    def of(cls, value: Any, latents: Any = None) -> Inputs:
        """Wrap value in Inputs unless it already is: an array becomes the latents. latents= is the deprecated name."""
        if latents is not None:
            warnings.warn(
                "latents= is now inputs=, which also accepts an array; latents= will be removed in the next release",
                DeprecationWarning,
                stacklevel=4,
            )
            value = latents
        return value if isinstance(value, Inputs) else cls(latents=value)

    @cached_property
    def digests(self) -> dict[str, Any]:
        """The SHA-256 of each array as float32, and of the image's pixels, by the request's field that refers to it."""
        images = {"image": self.source, "mask_image": self.mask}
        others = {*images, "control_images"}
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in others}
        return {
            **{name: _digest(value, name) for name, value in given.items() if value is not None},
            **{name: digest(image) for name, image in images.items() if image is not None},
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of them as arrays by name, for another process: see `from_arrays`."""
        names = "latents", "prompt_embeds", "negative_prompt_embeds", "posterior_noise"
        given = {name: getattr(self, name) for name in names}
        images = {"image": self.source, "mask_image": self.mask, **self.controls}
        return {
            **{name: _real(value, name, "any shape") for name, value in given.items() if value is not None},
            **{name: np.asarray(image) for name, image in images.items() if image is not None},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Inputs:
        """The inverse of `to_arrays`."""
        names = {field.name for field in fields(cls)}
        given: dict[str, Any] = {name: array for name, array in arrays.items() if name in names}
        for name in ("image", "mask_image"):
            if name in given:
                given[name] = Image.fromarray(given[name])
        return cls(**given, control_images=[x for name, x in arrays.items() if name not in names])

    def check_named(self, arrays: Mapping[str, str | None]) -> None:
        """Refuse a request whose digests name arrays other than these."""
        for name, wanted in arrays.items():
            found = self.digests.get(name)
            if wanted not in (None, found):
                what = {"image": "an image", "mask_image": "a mask"}.get(name, name)
                raise RequestError(f"the request expects {what} with SHA-256 {wanted}, but got {found or 'none'}")

    @cached_property
    def controls(self) -> dict[str, Image.Image]:
        """The control images by digest, upright and in sRGB, transparent parts on white."""
        read = [read_image(image) for image in self.control_images]
        return {digest(image): over_white(image) for image in read}

    def check_controls(self, digests: Iterable[str], width: int, height: int) -> None:
        """Refuse control images that are not given, or do not have the proportions of the image to generate."""
        for wanted in digests:
            if wanted not in self.controls:
                raise RequestError(f"the request expects a control image with SHA-256 {wanted}; give that file")
            image = self.controls[wanted]
            scale = max(width / image.width, height / image.height)
            lost = max(image.width * scale - width, image.height * scale - height)
            if lost > SIZE_MULTIPLE:
                use_its_own = "" if self.source else ", or leave out the size to use its own"
                raise RequestError(
                    f"the control image of {image.width}x{image.height} pixels would be cropped by {lost:.0f} pixels "
                    f"to fit {width}x{height}; crop it to that aspect ratio{use_its_own}"
                )

    def control(self, wanted: str, width: int, height: int) -> np.ndarray:
        """A control image at a size: (height, width, 3) uint8."""
        return np.asarray(cover(self.controls[wanted], width, height))

    def noise(
        self, shape: tuple[int, int, int, int], seed: int, rng: str, posterior: bool = False
    ) -> tuple[mx.array, mx.array | None]:
        """The initial noise of a request, (B, C, h, w) float32: the latents if given, otherwise from the seed.

        With `posterior`, the second value is the noise (1, C, h, w) that samples an image's latents. As in diffusers,
        the seed's generator makes it before the initial noise.
        """
        given = None if self.latents is None else mx.array(check_latents(self.latents, shape))
        if not posterior:
            return initial_noise(seed, shape, rng) if given is None else given, None
        one = (1, *shape[1:])
        sample, noise = noises(seed, [one, shape], rng)
        if self.posterior_noise is not None:
            sample = mx.array(check_latents(self.posterior_noise, one, "posterior_noise"))
        return noise if given is None else given, sample

    @cached_property
    def source(self) -> Image.Image | None:
        """The image, upright and in sRGB."""
        return None if self.image is None else read_image(self.image)

    @cached_property
    def mask(self) -> Image.Image | None:
        """The mask, 8-bit grey."""
        return None if self.mask_image is None else read_mask(self.mask_image)

    def pixels(self, width: int, height: int, outpaint: Outpaint | None = None) -> np.ndarray | None:
        """The image scaled and cropped to a size, transparent parts on white: (height, width, 3) uint8.

        For outpainting, it is on a canvas of that size.
        """
        if self.source is None:
            return None
        image = over_white(self.source)
        if outpaint is not None:
            return canvas(image, outpaint, width, height)
        return np.asarray(cover(image, width, height))

    def regenerated(
        self, width: int, height: int, outpaint: Outpaint | None = None, grow: int = 0, soft: bool = False
    ) -> np.ndarray | None:
        """Which of these pixels are regenerated: (height, width) float32, see `images.masks.values`; None means all of
        them."""
        if outpaint is not None:
            return canvas_mask(outpaint, width, height)
        if self.mask is None or self.source is None:
            return None
        return values(fit_mask(self.mask, self.source.size, width, height), grow, soft)

    def prompts(self, width: int) -> list[mx.array | None]:
        """The embeddings (L, width) float32 that replace the prompt and the negative prompt; None if not given."""
        given = {"prompt_embeds": self.prompt_embeds, "negative_prompt_embeds": self.negative_prompt_embeds}
        return [None if x is None else mx.array(check_embeddings(x, name, width)) for name, x in given.items()]


NONE = Inputs()  # for a request that uses none


def check_latents(latents: Any, shape: tuple[int, ...], name: str = "latents") -> np.ndarray:
    """A caller's initial latents as float32; RequestError unless they are finite numbers of `shape` (B, C, h, w)."""
    array = _real(latents, name, f"shape {shape}")
    if array.shape != shape:
        raise RequestError(
            f"{name} must have shape {shape}: (images, channels, height / 8, width / 8), got {array.shape}"
        )
    return _finite(array, name)


def check_embeddings(embeddings: Any, name: str, width: int) -> np.ndarray:
    """A caller's embeddings of a prompt as float32; RequestError unless they are finite numbers of (L, width)."""
    array = _real(embeddings, name, f"shape (tokens, {width})")
    if array.ndim != 2 or array.shape[1] != width or not 1 <= len(array) <= MAX_TOKENS:
        raise RequestError(f"{name} must have shape (tokens, {width}) with 1 to {MAX_TOKENS} tokens, got {array.shape}")
    return _finite(array, name)


def _digest(value: Any, name: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(_real(value, name, "any shape"), "<f4").data).hexdigest()


def _real(value: Any, name: str, shape: str) -> np.ndarray:
    try:
        if isinstance(value, mx.array):
            value = value.astype(mx.float32)
        elif hasattr(value, "is_floating_point") and value.is_floating_point():  # torch's, perhaps bfloat16
            value = value.detach().cpu().double()
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} must be an array of {shape}, got {type(value).__name__} ({error})") from None
    if array.dtype.kind not in "fiu":
        raise RequestError(f"{name} must be real numbers, got {array.dtype}")
    return array


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise RequestError(f"{name} must be finite, got NaN or infinity")
    return array


def read_latents(path: Path) -> np.ndarray:
    """Initial latents from a .npy file: (B, 16, height / 8, width / 8) numbers. Never unpickles."""
    try:
        with open_regular(path) as stream:
            latents = _read_npy(stream)
    except FileNotFoundError:
        raise RequestError(f"no latents file at {path}; numpy.save writes one") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is not a .npy file of numbers ({error}); numpy.save writes one") from error
    if latents.dtype.kind not in "fiu" or latents.ndim != 4 or not latents.size:
        raise RequestError(
            f"{path} contains {latents.dtype} of shape {latents.shape}; expected numbers of shape "
            f"(images, channels, height / 8, width / 8)"
        )
    return latents


def _read_npy(stream: BinaryIO) -> np.ndarray:
    """The array of a .npy file, whose header is checked before NumPy evaluates it and allocates what it says."""
    size = os.fstat(stream.fileno()).st_size
    if size > MAX_NPY:
        raise ValueError(f"{size:,} bytes, expected at most {MAX_NPY:,}")
    start = stream.read(NPY_HEADER)
    header = re.search(rb"'shape': \(([0-9, ]*)\)", start)
    if not start.startswith(NPY_MAGIC) or not header:
        raise ValueError("it has no NumPy header")
    if prod(int(length) for length in header[1].split(b",") if length.strip()) > size:
        raise ValueError(f"its header declares shape ({header[1].decode():.80}), but the file has only {size:,} bytes")
    stream.seek(0)
    try:
        return np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header as a Python expression
        raise ValueError(f"{type(error).__name__} in its header") from error


def check_latents_size(path: Path, latents: np.ndarray, width: int, height: int) -> None:
    """Refuse latents (B, C, h, w) from a file if they do not match the requested size in pixels."""
    h, w = latents.shape[2:]
    if (w * LATENT_PIXELS, h * LATENT_PIXELS) != (width, height):
        raise RequestError(
            f"{path} contains latents of shape {latents.shape}, for an image of {w * LATENT_PIXELS}x"
            f"{h * LATENT_PIXELS} pixels, but the requested size is {width}x{height}"
        )
