"""What the failures of a GPU mean, and what to do about each: one table for everything that computes.

MLX raises RuntimeError with the words of Metal or CUDA (Metal's: "[METAL] Command buffer execution failed: ..."), at
the next evaluation after the one that failed. What was computed in between may be anything; see `Networks.guarded`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .errors import DeviceError, MemoryBudgetError, ZImageError

SLOW_DISK = (
    "if the model is on a slow disk (network, USB), copy it to the internal one; if not, generate smaller images"
)
LESS_MEMORY = "give it less with --memory (memory= in Python), generate smaller images, or close other programs"
TOO_LONG = (
    "macOS stopped work that kept the GPU from the display. Let the display sleep while images are generated, or "
    "generate smaller images. AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment turns this limit off on most Macs, "
    "at the cost of a display that stutters or freezes for seconds"
)
# (what the message says, what is raised, what it means and what to do), the first that fits
FAILURES: tuple[tuple[str, type[ZImageError], str], ...] = (
    (r"Impacting ?Interactivity", DeviceError, TOO_LONG),
    (
        r"GPU Timeout|ErrorTimeout|GPU Hang|ErrorHang",
        DeviceError,
        f"macOS stopped work that took the GPU too long: {SLOW_DISK}",
    ),
    (
        r"Insufficient Memory|ErrorOutOfMemory|Unable to allocate|maximum allowed buffer size|Resource limit|"
        r"(?i:out of memory)",
        MemoryBudgetError,
        f"there was no memory left for this work: {LESS_MEMORY}",
    ),
    (
        r"No Metal device available",
        DeviceError,
        "macOS gives this session no GPU, as in headless, sandboxed or virtual ones: run it as a user who is logged in "
        "at the Mac itself",
    ),
    (
        r"SubmissionsIgnored|new command queue",
        DeviceError,
        "the GPU takes no more work from this process, and no pipeline in it can go on: start a new process",
    ),
    (r"InnocentVictim", DeviceError, "another program's work made the GPU fail, and this work with it: run it again"),
    (
        r"^\[METAL\]|^\[metal::|^(cu|CU)[A-Za-z]+.* failed:|CUDA error",
        DeviceError,
        "the GPU failed: run it again, and mlx-zimage doctor if it fails once more",
    ),
)


def explain(error: BaseException) -> ZImageError | None:
    """The error of ours that says what a GPU's failure means; None if it is anything else."""
    if not isinstance(error, RuntimeError) or isinstance(error, ZImageError):
        return None
    for pattern, kind, advice in FAILURES:
        if re.search(pattern, str(error)):
            return kind(f"{advice} (MLX says: {error})")
    return None


@contextmanager
def explained(undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Raise what `explain` makes of a failure within, after `undo`."""
    try:
        yield
    except RuntimeError as error:
        explanation = explain(error)
        if explanation is None:
            raise
        with suppress(RuntimeError):  # which would only be more of the same
            undo()
        raise explanation from error
