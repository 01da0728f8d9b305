"""Enlarge an image, and keep what it shows when a model has refined it."""

from __future__ import annotations

import numpy as np
from PIL import Image

TURNS = 2  # each leaves about half of the difference that the one before left: reducing does not quite undo enlarging


def resized(array: np.ndarray, width: int, height: int) -> np.ndarray:
    """(H, W) float32, any numbers, or (H, W, 3) uint8 at another size, by Lanczos."""
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS))


def back_projected(refined: np.ndarray, original: np.ndarray) -> np.ndarray:
    """A refined image (H, W, 3) float32 in [0, 1], changed so that it shows the original (h, w, 3) uint8 when reduced.

    Only detail that is too fine for the original's size stays as refined. Source: Irani and Peleg 1991, "Improving
    resolution by image registration".
    """
    (height, width), (h, w) = refined.shape[:2], original.shape[:2]
    found = refined.copy()
    for channel in range(3):
        wanted = original[:, :, channel].astype(np.float32) / 255
        for _ in range(TURNS):
            missing = wanted - resized(found[:, :, channel].copy(), w, h)
            found[:, :, channel] = np.clip(found[:, :, channel] + resized(missing, width, height), 0, 1)
    return found
