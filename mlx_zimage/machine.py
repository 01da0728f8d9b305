"""What this machine is, and the limits that this process is given on it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx

SHARE = 0.6  # of the memory, where the system does not recommend a share itself
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def backend() -> str:
    """What MLX computes on: "cpu", "cuda" or "metal"."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def default_dtype() -> str:
    """What suits this machine: float32 on a CPU; on a GPU bfloat16, or float16 on M1 and M2, which emulate bfloat16."""
    if mx.default_device() != mx.gpu:
        return "float32"
    emulates = re.match(r"Apple M[12]\b", str(mx.device_info().get("device_name")))
    return "float16" if emulates else "bfloat16"


def machine_budget() -> int:
    """What a process should use here: the working set that the GPU recommends, or a share of the memory."""
    device = mx.device_info()
    recommended = device.get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    total = device.get("total_memory") or device.get("memory_size")
    return int(SHARE * (total or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


@contextmanager
def wired(nbytes: int) -> Iterator[None]:
    """Have macOS keep nbytes of what Metal holds in memory, against other programs' demands; then as before.

    Only for weights that stay: with all of a process's memory wired, small Macs have been seen to freeze.
    """
    if not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(min(nbytes, mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()  # nothing may still be running on what is let go
        mx.set_wired_limit(before)


@cache
def keep_freed_memory() -> None:
    """Have glibc's malloc keep up to 2 GB of what this process frees, in one heap for all threads.

    MLX's CUDA build reads every tensor into memory of its own. By default that is given back to the system each time,
    and to touch new memory takes about as long as the reading.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
