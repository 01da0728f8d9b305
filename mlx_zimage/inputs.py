"""The arrays that a request is made from. They travel beside it, and it names them by digest."""

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
    """Arrays beside a request; None where it needs none.

    latents (B, 16, height / 8, width / 8), NumPy's or MLX's real numbers, are the initial noise in place of the seed's.
    """

    latents: Any = None

    @classmethod
    def of(cls, value: Any, latents: Any = None) -> Inputs:
        """Inputs as they are, None as none, and an array as latents; latents are given by their older name."""
        if latents is not None:
            warnings.warn(
                "latents= is now inputs=, which takes latents as they are; the old name goes with the next release",
                DeprecationWarning,
                stacklevel=4,
            )
            value = latents
        return value if isinstance(value, Inputs) else cls(latents=value)

    @cached_property
    def digest(self) -> str | None:
        """The SHA-256 of the latents as float32, by which a request names them; None without."""
        if self.latents is None:
            return None
        return hashlib.sha256(_real(self.latents, "any shape").astype("<f4").tobytes()).hexdigest()

    def check_named(self, latents: str | None) -> None:
        """Refuse a request that names other latents than these by its digest."""
        if latents not in (None, self.digest):
            found = "none were given" if self.latents is None else f"those that were given have {self.digest}"
            raise RequestError(f"the request names latents of SHA-256 {latents}; {found}")

    def noise(self, shape: tuple[int, int, int, int], seed: int, rng: str) -> mx.array:
        """What a request begins with, (B, C, h, w) float32: the latents, or the noise of its seed."""
        if self.latents is None:
            return initial_noise(seed, shape, rng)
        return mx.array(check_latents(self.latents, shape))


NONE = Inputs()  # of a request that needs none


def check_latents(latents: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Initial latents from a caller, as float32, if they are numbers that fit (B, C, h, w) and are finite."""
    array = _real(latents, str(shape))
    if array.shape != shape:
        raise RequestError(
            f"latents have shape {array.shape}, wanted {shape}: pictures, channels, height / 8, width / 8"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise RequestError("latents hold values that are not finite")
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
        raise RequestError(f"there is no latents file {path}; numpy.save writes one") from None
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise RequestError(f"{path} is no .npy file of numbers ({error}); numpy.save writes one") from error
    if latents.dtype.kind not in "fiu" or latents.ndim != 4 or not latents.size:
        raise RequestError(
            f"{path} holds {latents.dtype} of shape {latents.shape}; wanted numbers of shape "
            f"(pictures, channels, height / 8, width / 8)"
        )
    return latents


def check_latents_size(path: Path, latents: np.ndarray, width: int, height: int) -> None:
    """Refuse a file's latents (B, C, h, w) that do not fit the size in pixels that was asked for."""
    h, w = latents.shape[2:]
    if (w * LATENT_PIXELS, h * LATENT_PIXELS) != (width, height):
        raise RequestError(
            f"{path} holds latents of shape {latents.shape}, which are for {w * LATENT_PIXELS}x{h * LATENT_PIXELS} "
            f"pixels, but {width}x{height} were asked for"
        )
