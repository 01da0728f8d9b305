"""Initial noise from a seed: the same numbers as PyTorch's CPU generator (default), or MLX's own.

With PyTorch's, a seed gives the same image here, in diffusers and in ComfyUI.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def initial_noise(seed: int, shape: tuple[int, int, int, int], rng: str = "torch") -> mx.array:
    """Standard normal noise (B, C, h, w), float32. All images of a batch come from the one generator of the seed."""
    if rng == "mlx":
        return mx.random.normal(shape, key=mx.random.key(seed))
    return mx.array(torch_randn(seed, shape))


def torch_randn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """torch.randn(shape, generator=torch.Generator().manual_seed(seed)) on the CPU, float32, without torch.

    The integers and uniforms are exact; the normals differ from torch's by at most 2e-6, since logarithms round
    differently, as they do between torch's own x86 and ARM builds.
    Source: ATen/native/cpu/DistributionTemplates.h (normal_fill), ATen/core/MT19937RNGEngine.h.
    """
    size = int(np.prod(shape))
    if size < 16:
        raise ValueError(f"expected at least 16 normals, since torch generates fewer differently; {shape} has {size}")
    # torch seeds its Mersenne Twister with the seed's low 32 bits, in the same way as NumPy's legacy seeding
    twister = np.random.RandomState(seed % 2**32)._bit_generator
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
