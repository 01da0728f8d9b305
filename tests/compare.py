"""Comparing arrays, and catching refusals, in tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_zimage import CheckpointError
from mlx_zimage.weights.checkpoint import open_checkpoint

# Five times the largest error that summing in another order causes in float32 through a whole tiny network: measured
# against diffusers, 2e-5 of the tensor's largest value.
TOLERANCE = 1e-4


def relative_error(ours, expected) -> float:
    """The largest difference divided by the largest expected value. Shapes must match: nothing is broadcast."""
    ours, expected = (np.asarray(x).astype(np.float64) for x in (ours, expected))
    assert ours.shape == expected.shape, f"{ours.shape} is not {expected.shape}"
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def refusal(folder: Path) -> str:
    """The message of the CheckpointError that opening the folder raises."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)
