"""How the tests compare arrays, and catch refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_zimage import CheckpointError
from mlx_zimage.weights.checkpoint import open_checkpoint

# What float32 leaves between two orders of the same sums through a whole tiny network, five times over: the largest
# error measured against diffusers is 2e-5 of the tensor's largest value.
TOLERANCE = 1e-4


def relative_error(ours, wanted) -> float:
    """The largest difference over the largest value wanted. Shapes must agree: nothing is broadcast."""
    ours, wanted = (np.asarray(x).astype(np.float64) for x in (ours, wanted))
    assert ours.shape == wanted.shape, f"{ours.shape} is not {wanted.shape}"
    return float(np.abs(ours - wanted).max() / np.abs(wanted).max())


def refusal(folder: Path) -> str:
    """The message that opening the folder raises."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)
