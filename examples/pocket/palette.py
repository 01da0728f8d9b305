"""The colours and shapes of the pocket world, in the order that everything indexes them by."""

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
PALETTE = np.array([rgb for _, rgb in COLORS], np.float32)  # (10, 3), 0..255
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
