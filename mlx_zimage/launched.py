"""Whether `mlx.launch` started this process, and its rank; without importing MLX, so that commands start quickly."""

from __future__ import annotations

import os

# What mlx.launch sets, and the backend it sets it for; MLX prefers the first.
SIGNS = {"MLX_WORLD_SIZE": "nccl", "MLX_HOSTFILE": "ring", "MLX_IBV_DEVICES": "jaccl", "MLX_JACCL_COORDINATOR": "jaccl"}


def is_launched() -> bool:
    """Whether mlx.launch started this process."""
    return "MLX_RANK" in os.environ and any(os.environ.get(name) for name in SIGNS)


def launched_rank() -> int:
    """This process's rank; 0 if mlx.launch did not start it."""
    rank = os.environ.get("MLX_RANK", "")
    return int(rank) if is_launched() and rank.isdecimal() else 0


def backend_name() -> str:
    """How this process communicates with the others that mlx.launch started: "nccl", "ring" or "jaccl"."""
    return next(backend for name, backend in SIGNS.items() if os.environ.get(name))


def uses_nccl() -> bool:
    """Whether mlx.launch started this process and others, to communicate through NCCL."""
    return is_launched() and backend_name() == "nccl"
