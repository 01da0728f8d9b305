"""Overlapping tiles of latents: a network sees a large image in parts of a size that it knows.

The velocities of all tiles are blended in every step (MultiDiffusion, Bar-Tal et al. 2023), so that tiles agree where
they overlap and leave no seam. All tiles are one batch: each block's weights are read once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import mlx.core as mx
import numpy as np

from .request import LATENT_PIXELS, SIZE_MULTIPLE

OVERLAP = 8  # a tile overlaps the next by its length divided by this


@dataclass(frozen=True)
class Tiles:
    """Tiles of h x w latents that start at these rows and columns."""

    h: int
    w: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, width: int, height: int, most: int) -> Tiles:
        """As few tiles as possible, of at most `most` pixels per side, for an image of width x height pixels."""
        h, rows = spread(height, most)
        w, columns = spread(width, most)
        return cls(h, w, rows, columns)

    @classmethod
    def if_several(cls, width: int, height: int, most: int) -> Tiles | None:
        """The tiles for an image of width x height pixels; None if one is enough."""
        tiles = cls.of(width, height, most)
        return tiles if tiles.count > 1 else None

    @property
    def count(self) -> int:
        return len(self.rows) * len(self.columns)

    def cut(self, latents: mx.array) -> mx.array:
        """Latents (B, H, W, C) as tiles (B count, h, w, C)."""
        cut = [latents[:, row : row + self.h, at : at + self.w] for row in self.rows for at in self.columns]
        return mx.concatenate(cut)

    def join(self, tiles: mx.array, shape: tuple[int, ...]) -> mx.array:
        """Tiles (B count, h, w, C) as latents of a shape (B, H, W, C): their weighted mean where they overlap."""
        weights = mx.array(ramp(self.h)[:, None, None] * ramp(self.w)[:, None])
        total, joined = mx.zeros((*shape[1:3], 1)), mx.zeros(shape)
        places = [(row, column) for row in self.rows for column in self.columns]
        for (row, column), tile in zip(places, mx.split(tiles, self.count), strict=True):
            at = (slice(row, row + self.h), slice(column, column + self.w))
            total[at] = total[at] + weights
            joined[:, *at] = joined[:, *at] + weights * tile
        return joined / total


def tiled(velocities: Callable[..., Sequence[mx.array]], tiles: Tiles) -> Callable[..., list[mx.array]]:
    """Velocities of whole latents, from a function that takes tiles of them: see `Transformer.velocities`."""

    def whole(latents: mx.array, i: int, count: int | None = None) -> list[mx.array]:
        return [tiles.join(x, latents.shape) for x in velocities(tiles.cut(latents), i, count)]

    return whole


def spread(length: int, most: int) -> tuple[int, tuple[int, ...]]:
    """The length of each tile along a side of `length` pixels, and where they start, in latent pixels; all are
    multiples of a token's side."""
    tokens, most = length // SIZE_MULTIPLE, max(most // SIZE_MULTIPLE, 2)
    overlap = ceil(most / OVERLAP)
    count = 1 if tokens <= most else ceil((tokens - overlap) / (most - overlap))
    tile = ceil((tokens + (count - 1) * overlap) / count)
    scale = SIZE_MULTIPLE // LATENT_PIXELS
    starts = np.linspace(0, tokens - tile, count).round().astype(int) * scale
    return tile * scale, tuple(starts.tolist())


def ramp(length: int) -> np.ndarray:
    """The weights (length,) of a tile's rows or columns: they rise to 1 over its overlap, and fall at the other end."""
    reach = max(1, length // OVERLAP)
    rise = np.minimum((np.arange(length) + 0.5) / reach, 1)
    return np.minimum(rise, rise[::-1]).astype(np.float32)
