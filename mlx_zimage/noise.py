"""Initial noise from a seed: the same numbers as PyTorch's CPU generator (default), or MLX's own.

With PyTorch's, a seed gives the same noise here, in diffusers and in ComfyUI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import RequestError


def initial_noise(seed: int, shape: tuple[int, ...], rng: str = "torch") -> mx.array:
    """Standard normal noise (B, C, h, w), float32. All images of a batch come from the one generator of the seed."""
    return noises(seed, [shape], rng)[0]


def noises(seed: int, shapes: Sequence[tuple[int, ...]], rng: str = "torch") -> list[mx.array]:
    """Standard normal noise of each shape, float32, generated in this order by the one generator of the seed."""
    if rng == "mlx":
        key = mx.random.key(seed)
        keys = [key] if len(shapes) == 1 else mx.random.split(key, len(shapes))
        return [mx.random.normal(shape, key=key) for key, shape in zip(keys, shapes, strict=True)]
    twister = seeded(seed)
    return [mx.array(_randn(twister, shape)) for shape in shapes]


def torch_randn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """torch.randn(shape, generator=torch.Generator().manual_seed(seed)) on the CPU, float32, without torch.

    The integers and uniforms are exact; the normals differ from torch's by at most 2e-6, since logarithms round
    differently, as they do between torch's own x86 and ARM builds.
    Source: ATen/native/cpu/DistributionTemplates.h (normal_fill), ATen/core/MT19937RNGEngine.h.
    """
    return _randn(seeded(seed), shape)


def seeded(seed: int) -> Any:
    """A Mersenne Twister seeded as torch does: with the seed's low 32 bits, like NumPy's legacy seeding."""
    return np.random.RandomState(seed % 2**32)._bit_generator


def _randn(twister, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    if size < 16:
        raise ValueError(
            f"expected at least 16 normally distributed values, since torch generates smaller arrays differently; "
            f"{shape} has {size}"
        )
    uniform = _uniform(twister, size)
    normal = np.empty(size, dtype=np.float32)
    whole = size - size % 16
    normal[:whole] = _box_muller(uniform[:whole])
    if whole < size:  # torch generates the last 16 anew, overwriting some of the previous ones
        normal[-16:] = _box_muller(_uniform(twister, 16))
    return normal.reshape(shape)


def _uniform(twister, size: int) -> np.ndarray:
    """The low 24 bits of each integer as a float32 in [0, 1)."""
    return (twister.random_raw(size) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Groups of 16 uniforms to normals: a group's first eight give the radii, its last eight the angles."""
    groups = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - groups[:, 0]))
    angle = np.float32(2 * np.pi) * groups[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


# ---- torch's own generator

TWISTER = np.dtype([("seed", "u8"), ("left", "i4"), ("seeded", "i4"), ("next", "u8"), ("key", "u8", 624)])
STATE_BYTES = 5056  # of CPUGeneratorImplState: a TWISTER, then what is left over from normals generated one by one


def generator_randn(generator: Any, shape: tuple[int, ...]) -> np.ndarray:
    """torch.randn(shape, generator=generator) for torch's CPU generator, which advances as it does there.

    torch is not imported: the generator's state is read and written as the bytes of get_state and set_state.
    Source: ATen/CPUGeneratorImpl.cpp (set_state), ATen/core/MT19937RNGEngine.h.
    """
    state = generator.get_state()
    found = np.asarray(state)[: TWISTER.itemsize].view(TWISTER)  # not a copy
    twister = np.random.MT19937()
    # when `left` is 1, torch has used up its block of 624 integers
    position = 624 if found["left"][0] == 1 else int(found["next"][0])
    twister.state = {"bit_generator": "MT19937", "state": {"key": found["key"][0].astype(np.uint32), "pos": position}}
    normal = _randn(twister, shape)
    moved = twister.state["state"]
    found["key"], found["next"], found["left"] = moved["key"], moved["pos"], 625 - moved["pos"]
    generator.set_state(state)
    return normal


def check_generator(generator: Any) -> None:
    """Refuse anything but a torch generator on the CPU."""
    if not hasattr(generator, "initial_seed") or not hasattr(generator, "get_state"):
        raise RequestError(f"generator must be a torch.Generator, got {type(generator).__name__}; or use seed=N")
    device = getattr(getattr(generator, "device", None), "type", "cpu")
    if device != "cpu" or np.asarray(generator.get_state()).nbytes != STATE_BYTES:
        raise RequestError(
            f"generator must be on the CPU, got one on {device}, whose noise cannot be reproduced here; use "
            f"torch.Generator('cpu').manual_seed(N), or seed=N"
        )
