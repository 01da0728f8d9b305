"""The colours and shapes of the pocket world, in the order that everything indexes them by."""

from dataclasses import dataclass

import numpy as np

# name, (red, green, blue) in 0..255
COLORS = (
    ("red", (222, 38, 42)),
    ("orange", (247, 140, 22)),
    ("yellow", (250, 220, 40)),
    ("green", (36, 160, 72)),
    ("blue", (38, 88, 222)),
    ("purple", (128, 52, 176)),
    ("pink", (250, 150, 196)),
    ("black", (18, 18, 20)),
    ("white", (248, 248, 248)),
    ("gray", (138, 138, 140)),
)
COLOR_NAMES = tuple(name for name, _ in COLORS)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")


@dataclass(frozen=True)
class World:
    """The colours and shapes that may be in an image."""

    colors: tuple[tuple[str, tuple[int, int, int]], ...]
    shapes: tuple[str, ...]

    @property
    def palette(self) -> np.ndarray:
        """(colours, 3) float32, 0..255"""
        return np.array([rgb for _, rgb in self.colors], np.float32)


KNOWN = World(COLORS, SHAPES)  # what the pocket models are trained on
PALETTE = KNOWN.palette
# What LoRAs teach, too: see `new_words.py`.
WIDER = World((*COLORS, ("cyan", (50, 215, 230))), (*SHAPES, "oval"))
