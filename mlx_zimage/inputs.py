"""The arrays that a request uses. They are passed alongside it, and it refers to them by digest."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import RequestError
from .noise import initial_noise
from .request import LATENT_PIXELS


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arrays passed alongside a request; None for those it does not use.

    latents (B, 16, height / 8, width / 8), a NumPy or MLX array of real numbers, replace the initial noise of the seed.
    """

    latents: Any = None

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
    def digest(self) -> str | None:
        """The SHA-256 of the latents as float32, by which a request refers to them; None without latents."""
        if self.latents is None:
            return None
        return hashlib.sha256(_real(self.latents, "any shape").astype("<f4").tobytes()).hexdigest()

    def check_named(self, latents: str | None) -> None:
        """Refuse a request whose digest names latents other than these."""
        if latents not in (None, self.digest):
            found = "none were given" if self.latents is None else f"the given ones have {self.digest}"
            raise RequestError(f"the request expects latents with SHA-256 {latents}, but {found}")

    def noise(self, shape: tuple[int, int, int, int], seed: int, rng: str) -> mx.array:
        """The initial noise of a request, (B, C, h, w) float32: the latents if given, otherwise from the seed."""
        if self.latents is None:
            return initial_noise(seed, shape, rng)
        return mx.array(check_latents(self.latents, shape))


NONE = Inputs()  # for a request that uses none


def check_latents(latents: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A caller's initial latents as float32; RequestError unless they are finite numbers of `shape` (B, C, h, w)."""
    array = _real(latents, str(shape))
    if array.shape != shape:
        raise RequestError(
            f"latents have shape {array.shape}, expected {shape}: (images, channels, height / 8, width / 8)"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise RequestError("latents contain values that are not finite")
    return array


def _real(latents: Any, shape: str) -> np.ndarray:
    try:
        array = np.asarray(latents.astype(mx.float32) if isinstance(latents, mx.array) else latents)
    except (TypeError, ValueError) as error:
        raise RequestError(f"latents must be an array of {shape}, got {type(latents).__name__} ({error})") from None
    if array.dtype.kind not in "fiu":
        raise RequestError(f"latents must be real numbers, got {array.dtype}")
    return array


def read_latents(path: Path) -> np.ndarray:
    """Initial latents from a .npy file: (B, 16, height / 8, width / 8) numbers. Never unpickles."""
    try:
        with open(path, "rb") as stream:
            latents = np.lib.format.read_array(stream, allow_pickle=False)
    except FileNotFoundError:
        raise RequestError(f"no latents file at {path}; numpy.save writes one") from None
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise RequestError(f"{path} is not a .npy file of numbers ({error}); numpy.save writes one") from error
    if latents.dtype.kind not in "fiu" or latents.ndim != 4 or not latents.size:
        raise RequestError(
            f"{path} contains {latents.dtype} of shape {latents.shape}; expected numbers of shape "
            f"(images, channels, height / 8, width / 8)"
        )
    return latents


def check_latents_size(path: Path, latents: np.ndarray, width: int, height: int) -> None:
    """Refuse latents (B, C, h, w) from a file if they do not match the requested size in pixels."""
    h, w = latents.shape[2:]
    if (w * LATENT_PIXELS, h * LATENT_PIXELS) != (width, height):
        raise RequestError(
            f"{path} contains latents of shape {latents.shape}, for an image of {w * LATENT_PIXELS}x"
            f"{h * LATENT_PIXELS} pixels, but the requested size is {width}x{height}"
        )
