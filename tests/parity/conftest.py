"""Comparison with diffusers itself. Skipped where torch, diffusers or transformers are missing."""

from __future__ import annotations

import os
import random
import sys

import pytest
import tiny

sys.path.insert(0, str(tiny.GOLDEN))

# A new seed for each run, the same in all its processes; set MLX_ZIMAGE_PARITY_SEED to repeat a failed run.
RUN = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))
SEED = int(os.environ.get("MLX_ZIMAGE_PARITY_SEED", RUN.randrange(10**6)))


@pytest.fixture(scope="session")
def reference():
    """The script that records the golden arrays: the functions that run diffusers."""
    for module in ("torch", "diffusers", "transformers"):
        pytest.importorskip(module, reason=f"{module} is not installed; pip install 'mlx-zimage[parity]'")
    import make_golden

    return make_golden


@pytest.fixture(scope="session", params=[SEED], ids=[f"seed{SEED}"])
def golden(request, reference, tmp_path_factory):
    """diffusers on fresh random weights, instead of recorded arrays."""
    folder = tiny.write_kinds(tmp_path_factory.mktemp("parity"), request.param)
    return tiny.Golden(request.param, folder, reference.record(request.param, folder))
