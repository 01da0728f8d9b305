"""Whether `mlx.launch` started this process, and its rank; without importing MLX, so that commands start quickly."""

from __future__ import annotations

import os

# What mlx.launch sets, by backend: ring, nccl and jaccl.
SIGNS = ("MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR")


def is_launched() -> bool:
    """Whether mlx.launch started this process."""
    return "MLX_RANK" in os.environ and any(os.environ.get(name) for name in SIGNS)


def launched_rank() -> int:
    """This process's rank; 0 if mlx.launch did not start it."""
    rank = os.environ.get("MLX_RANK", "")
    return int(rank) if is_launched() and rank.isdecimal() else 0
