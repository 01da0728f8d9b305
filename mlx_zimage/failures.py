"""GPU failures: what each one means, and what to do about it, in one table.

MLX raises RuntimeError with Metal's or CUDA's message (Metal's: "[METAL] Command buffer execution failed: ..."), at the
next evaluation after the one that failed. Anything computed in between may be wrong; see `Networks.guarded`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .errors import DeviceError, GroupError, MemoryBudgetError, ZImageError

SLOW_DISK = (
    "if the model is on a slow disk (network, USB), copy it to the internal one; if not, generate smaller images"
)
LESS_MEMORY = "lower the budget with --memory (memory= in Python), generate smaller images, or close other programs"
TOO_LONG = (
    "macOS stopped work that was keeping the display from using the GPU. Let the display sleep while images are "
    "generated, or generate smaller images. AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment turns this limit off "
    "on most Macs, at the cost of a display that stutters, or freezes for seconds at a time"
)
LOST = "the connection to another machine was lost: see what it printed, then start the whole group again"
# (pattern of the message, error to raise, what it means and what to do); the first match applies
FAILURES: tuple[tuple[str, type[ZImageError], str], ...] = (
    (r"Impacting ?Interactivity", DeviceError, TOO_LONG),
    (
        r"GPU Timeout|ErrorTimeout|GPU Hang|ErrorHang",
        DeviceError,
        f"macOS stopped GPU work that took too long: {SLOW_DISK}",
    ),
    (
        r"Insufficient Memory|ErrorOutOfMemory|Unable to allocate|maximum allowed buffer size|Resource limit|"
        r"(?i:out of memory)",
        MemoryBudgetError,
        f"the GPU ran out of memory: {LESS_MEMORY}",
    ),
    (
        r"No Metal device available",
        DeviceError,
        "macOS gives this session no GPU, as happens in headless, sandboxed or virtual sessions: run mlx-zimage as "
        "a user who is logged in at the Mac itself",
    ),
    (
        r"SubmissionsIgnored|new command queue",
        DeviceError,
        "the GPU accepts no more work from this process, so none of its pipelines can continue: start a new process",
    ),
    (r"^\[(ring|jaccl|nccl)\]|ncclResult|NCCL", GroupError, LOST),
    (r"InnocentVictim", DeviceError, "the GPU failed because of another program, and this work was lost: try again"),
    (
        r"^\[METAL\]|^\[metal::|^(cu|CU)[A-Za-z]+.* failed:|CUDA error",
        DeviceError,
        "the GPU failed: try again; if that fails too, run mlx-zimage doctor",
    ),
)


def explain(error: BaseException) -> ZImageError | None:
    """The ZImageError that explains a GPU failure; None for any other error."""
    if not isinstance(error, RuntimeError) or isinstance(error, ZImageError):
        return None
    for pattern, kind, advice in FAILURES:
        if re.search(pattern, str(error)):
            return kind(f"{advice} (MLX says: {error})")
    return None


@contextmanager
def explained(undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within the block, replace a GPU failure with its explanation, after calling `undo`."""
    try:
        yield
    except RuntimeError as error:
        explanation = explain(error)
        if explanation is None:
            raise
        with suppress(RuntimeError):  # it would only report the same failure again
            undo()
        raise explanation from error
