"""What every training stage shares: its clock, the optimizer with its schedule and average, recorded steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM_UP = 200  # steps
LOOK = 16  # steps between two readings of the clock
AVERAGE = 0.999  # of the exponential moving average of the weights


class Clock:
    """How far a stage is, from 0 to 1: by its steps or by its seconds, whichever is further.

    `done` is how far it was when an earlier run was interrupted.
    """

    def __init__(self, steps: int, seconds: float, device: str, done: float = 0.0):
        self.steps, self.seconds, self.device = steps, seconds, device
        self.started = time.monotonic() - done * seconds
        self.step, self.progress = int(done * steps), done

    def __iter__(self):
        """Yields (step, progress) until the steps or the seconds run out."""
        while self.progress < 1:
            yield self.step, self.progress
            self.step += 1
            if self.step % LOOK == 0 or self.step >= self.steps:
                if self.device == "cuda":
                    torch.cuda.synchronize()  # or the clock would measure when steps are queued
                elapsed = (time.monotonic() - self.started) / self.seconds
                self.progress = max(self.step / self.steps, elapsed)


class Optimizer:
    """AdamW, and Muon for the inner matrices if asked; gradient clipping; averaged weights.

    Everything it changes stays where it is in memory, the learning rate too, so that a step
    can be recorded in a CUDA graph.
    """

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], peak_rate: float, uses_muon: bool = False, decay: float = 0.02
    ):
        self.weights = [weight for _, weight in named]
        device = self.weights[0].device
        inner = [weight for name, weight in named if uses_muon and _is_inner_matrix(name, weight)]
        others = [weight for weight in self.weights if not any(weight is one for one in inner)]
        self.adam = torch.optim.AdamW(
            [
                {"params": [w for w in others if w.ndim >= 2], "weight_decay": decay},
                {"params": [w for w in others if w.ndim < 2], "weight_decay": 0.0},
            ],
            lr=torch.zeros((), device=device),
            betas=(0.9, 0.98),
            fused=True,
            capturable=device.type == "cuda",
        )
        self.muon = Muon(inner, decay)
        self.peak_rate = peak_rate
        self.rate = torch.zeros((), device=device)
        self.fresh = torch.ones((), device=device)  # share of the new weights in the average
        self.average = [weight.detach().clone() for weight in self.weights]

    def schedule(self, step: int, progress: float) -> None:
        """Linear warm-up, then a cosine to nearly zero."""
        rate = self.peak_rate * min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * progress))
        self.rate.fill_(rate + 1e-3 * self.peak_rate)
        for group in self.adam.param_groups:
            group["lr"].fill_(rate + 1e-3 * self.peak_rate)
        self.fresh.fill_(1 - min(AVERAGE, (step + 1) / (step + 10)))

    @torch.no_grad()
    def apply(self) -> None:
        """Take a step along the gradients, and drop them."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.adam.step()
        self.muon.step(self.rate)
        change = torch._foreach_sub([weight.detach() for weight in self.weights], self.average)
        torch._foreach_mul_(change, self.fresh)
        torch._foreach_add_(self.average, change)
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def take_average(self) -> None:
        for weight, average in zip(self.weights, self.average, strict=True):
            weight.copy_(average)


def _is_inner_matrix(name: str, weight: Tensor) -> bool:
    """The matrices of the blocks, which Muon is made for; embeddings and outer layers use AdamW."""
    is_inner = any(part in name for part in ("layers.", "refiner.", "cap_embedder"))
    return weight.ndim == 2 and min(weight.shape) >= 32 and is_inner


class Muon:
    """Momentum, orthogonalized by five Newton-Schulz steps; matrices of one shape go together.

    Source: Keller Jordan's Muon, with his quintic's coefficients; the factor
    0.2 sqrt(longer side) lets it share AdamW's learning rate.
    """

    def __init__(self, weights: list[nn.Parameter], decay: float):
        by_shape: dict[tuple, list] = {}
        for weight in weights:
            by_shape.setdefault(tuple(weight.shape), []).append(weight)
        self.groups = [
            (same, torch.zeros(len(same), *shape, device=same[0].device)) for shape, same in by_shape.items()
        ]
        self.decay = decay

    def step(self, rate: Tensor) -> None:
        for weights, momentum in self.groups:
            gradients = torch.stack([weight.grad for weight in weights])
            momentum.lerp_(gradients, 0.05)
            update = orthogonalized(gradients.lerp(momentum, 0.95))
            update = update * (-0.2 * max(update.shape[1:]) ** 0.5 * rate)
            torch._foreach_mul_(weights, 1 - self.decay * rate)
            torch._foreach_add_(weights, list(update.unbind(0)))


def orthogonalized(matrices: Tensor) -> Tensor:
    """(n, rows, columns), each with singular values near 1; float32, computed in bfloat16 on a GPU."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return (x.mT if is_tall else x).float()


class Recorded:
    """A function of no arguments that runs the same work each time on the same memory.

    On a GPU the first three calls run plainly, the fourth records a CUDA graph, and from then
    on the graph is replayed: launching the small kernels of a step one by one takes longer
    than running them.
    """

    def __init__(self, function: Callable[[], None], device: str, memory=None):
        self.function, self.is_plain, self.memory = function, device != "cuda", memory
        self.calls, self.graph = 0, None

    def __call__(self) -> None:
        self.calls += 1
        if self.is_plain:
            self.function()
        elif self.calls <= 3:
            # a graph needs its warm-up on a separate stream
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, pool=self.memory):
                    self.function()
            self.graph.replay()


def shared_memory(device: str):
    """A memory pool for steps that never run at the same time; valid while any of them exists."""
    return torch.cuda.graph_pool_handle() if device == "cuda" else None
