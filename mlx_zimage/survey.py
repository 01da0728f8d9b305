"""What a group of machines consists of, how fast they communicate, and how fast they are together, measured before any
image.

The prediction is a measurement of a few blocks with random weights: alone on each machine, and shared by all. Every
block of the model takes equally long.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx

from .bench import ARCHITECTURES
from .distributed import Group
from .doctor import facts
from .groups import share_rows
from .launched import backend_name
from .models.transformer import PATCH
from .networks import Networks
from .sizes import size
from .weights.checkpoint import Checkpoint
from .weights.library import embeddings_folder
from .weights.random import random_model
from .weights.store import checksum

DEPTHS = 1, 5  # numbers of layers to time: the difference is what four of them take
ROUNDS = 50  # exchanges of a single number
REPEAT = 5
CAPTION = 96  # tokens


@dataclass(frozen=True)
class Survey:
    """machines has each rank's facts, with alone_s, the seconds that a step takes on it alone, and speed, the part of
    the rows that it has in an image, relative to the others.

    latency_s is what the smallest exchange takes, rate the bytes of keys and values that a rank receives per second,
    and step_s what a step takes on all machines together.
    """

    backend: str
    machines: list[dict[str, Any]]
    latency_s: float
    rate: float
    step_s: float

    @property
    def alone_s(self) -> float:
        """Seconds of a step on the fastest machine alone."""
        return min(machine["alone_s"] for machine in self.machines)

    @property
    def speed_up(self) -> float:
        return self.alone_s / self.step_s


def survey(
    group: Group, width: int, height: int, model: Checkpoint | None = None, architecture: str = "full"
) -> Survey:
    """Compare the machines of a group, and time them for images of width x height; on all ranks at once.

    GroupError if they differ in version, in dtype or, if there is a model, in its weights, which are all read.
    """
    own = facts() | {"host": platform.node()}
    shown = {"version of mlx-zimage": own["mlx_zimage"], "version of MLX": own["mlx"], "default dtype": own["dtype"]}
    weights = {}
    if model is not None:
        with TemporaryDirectory() as temporary:  # if checksums are not cached
            folder = embeddings_folder() or Path(temporary)
            weights["model"] = own["weights"] = [checksum(network, folder) for network in model.components]
    group.check_same(shown, **weights)
    machines = group.exchange(own)
    timer = Timer(group, width, height, architecture)
    alone = group.exchange(timer.step(None))
    share_rows(group, timer.config, timer.dtype)
    machines = [
        machine | {"alone_s": seconds, "speed": speed}
        for machine, seconds, speed in zip(machines, alone, group.speeds, strict=True)
    ]
    return Survey(backend_name(), machines, timer.latency(), timer.rate(), timer.step(group))


class Timer:
    """Times an architecture's transformer for images of one size in a group."""

    def __init__(self, group: Group, width: int, height: int, architecture: str):
        self.group = group
        self.networks = ARCHITECTURES[architecture]
        self.config = self.networks[0]
        scale = self.networks[2].scale
        self.h, self.w = height // scale, width // scale
        own = facts()
        self.dtype, self.budget = getattr(mx, own["dtype"]), own["memory_budget"]

    def step(self, group: Group | None) -> float:
        """Seconds of a step, on this machine alone or in a group."""
        few, many = (self._step(depth, group) for depth in DEPTHS)
        block = (many - few) / (DEPTHS[1] - DEPTHS[0])
        others = self.config.n_layers - DEPTHS[0] + self.config.n_refiner_layers - 1
        return few + others * block

    def _step(self, depth: int, group: Group | None) -> float:
        config = replace(self.config, n_layers=depth, n_refiner_layers=1)
        configs = dict(zip(("transformer", "text_encoder", "vae"), (config, *self.networks[1:]), strict=True))
        networks = Networks(random_model(configs, None), self.dtype, self.budget, group=group)
        caption = mx.zeros((CAPTION, config.cap_feat_dim), self.dtype)
        velocity = networks.transformer.velocity(caption, [1.0], self.h, self.w)
        noise = mx.random.normal((1, self.h, self.w, config.in_channels))
        seconds = self._median(lambda: velocity(noise, 0), REPEAT)
        networks.release()
        return seconds

    def latency(self) -> float:
        """Seconds of the smallest exchange."""
        return self._median(lambda: self.group.from_first(mx.array(0)), ROUNDS)

    def rate(self) -> float:
        """Bytes per second that a rank receives, in pieces as large as a block's keys and values."""
        rows = (self.h // PATCH) * (self.w // PATCH) // self.group.size
        piece = mx.zeros((1, rows, 2 * self.config.dim), mx.bfloat16)
        shares = (rows,) * self.group.size
        return piece.nbytes * (self.group.size - 1) / self._median(lambda: self.group.gather(piece, shares), REPEAT)

    def _median(self, compute: Callable[[], mx.array], repeat: int) -> float:
        """Median of the seconds that all ranks take, after a warm-up."""
        times = []
        for _ in range(repeat + 1):
            with self.group.computing():
                mx.eval(self.group.from_first(mx.array(0)))  # all begin together
                start = time.perf_counter()
                mx.eval(compute())
                times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


def survey_table(found: Survey, width: int, height: int) -> str:
    """The survey as text."""
    lines = [f"{'rank':6}{'machine':24}{'chip':28}{'budget':>10}{'speed':>8}"]
    for rank, machine in enumerate(found.machines):
        speed = found.alone_s / machine["alone_s"]
        budget = size(machine["memory_budget"])
        lines.append(f"{rank:<6}{machine['host'][:22]:24}{str(machine['device'])[:26]:28}{budget:>10}{speed:>8.2f}")
    first = found.machines[0]
    lines += [
        f"the same on all: mlx-zimage {first['mlx_zimage']}, MLX {first['mlx']}, {first['dtype']}"
        + (", weights" if "weights" in first else ""),
        f"{found.backend}: an exchange takes at least {found.latency_s * 1e3:.2f} ms; each machine receives "
        f"{found.rate / 1e9:.2f} GB/s",
        f"{width}x{height}: predicted {found.step_s:.3g} s per step together, {found.alone_s:.3g} s on the fastest "
        f"machine alone: {found.speed_up:.2f} times as fast",
    ]
    speeds = [machine["speed"] for machine in found.machines]
    if len({*speeds}) > 1:
        split = " : ".join(f"{speed:g}" for speed in speeds)
        lines.append(f"rows are split {split} between the machines, by how fast each computes matrix products")
    if found.speed_up < 1:
        lines.append("at this size, one machine alone is faster")
    return "\n".join(lines)
