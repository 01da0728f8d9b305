"""Training of the transformer and the text encoder: flow matching, then guidance distillation.

With sigma in (0, 1] the model sees (1 - sigma) x0 + sigma noise at t = 1 - sigma and learns
x0 - noise. A tenth of the captions are emptied, so that the result can be guided. In the
distillation a guided many-step teacher generates an image for each noise, and the model learns
the straight path between the two: then eight unguided steps are enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from model import TEXT_ENCODER, Blocks, encode_text, predict, sample, sigmas
from optim import Clock, Optimizer, Recorded, shared_memory
from palette import COLORS, SHAPES
from pool import Bucket
from scenes import MAX_OBJECTS
from torch import Tensor, nn

EMPTY_SHARE = 0.1
FACTS_WEIGHT = 0.03
TEACHER_STEPS, TEACHER_GUIDANCE = 12, 1.5


class FactsHead(nn.Linear):
    """Reads the caption's facts off its last token; in training only.

    It teaches the text encoder what a caption says long before the images could.
    """

    PARTS = (MAX_OBJECTS * (len(SHAPES) + 1), (MAX_OBJECTS + 1) * len(COLORS), 3 * MAX_OBJECTS)

    def __init__(self):
        super().__init__(TEXT_ENCODER["hidden_size"], sum(self.PARTS))

    def loss(self, features: Tensor, lengths: Tensor, facts: Facts, is_kept: Tensor) -> Tensor:
        """features (B, L, 128); is_kept (B,) is 0 for emptied captions."""
        is_last = torch.arange(features.shape[1], device=features.device) == lengths[:, None] - 1
        last = (features.float() * is_last[..., None]).sum(1)
        shapes, colors, circles = self(last).float().split(self.PARTS, 1)
        exists = facts.shapes >= 0
        shape_loss = F.cross_entropy(
            shapes.view(-1, MAX_OBJECTS, len(SHAPES) + 1).transpose(1, 2), facts.shapes + 1, reduction="none"
        ).mean(1)
        color_loss = F.cross_entropy(
            colors.view(-1, MAX_OBJECTS + 1, len(COLORS)).transpose(1, 2), facts.colors, reduction="none"
        )
        counts = torch.cat([exists, torch.ones_like(exists[:, :1])], 1)  # the background always exists
        color_loss = (color_loss * counts).sum(1) / counts.sum(1)
        circle_error = (circles.view(-1, MAX_OBJECTS, 3) - facts.circles).pow(2).mean(-1)
        circle_loss = (circle_error * exists).sum(1)
        return ((shape_loss + color_loss + 0.5 * circle_loss) * is_kept).mean()


@dataclass
class Facts:
    """shapes (B, 3), -1 for none; colors (B, 4), the background's last; circles (B, 3, 3) in units of 32 pixels."""

    shapes: Tensor
    colors: Tensor
    circles: Tensor

    @classmethod
    def of(cls, bucket: Bucket, index: Tensor) -> Facts:
        colors = torch.cat([bucket.colors[index], bucket.backgrounds[index][:, None]], 1).long()
        return cls(bucket.shapes[index].long(), colors, (bucket.circles[index] - 64) / 32)


@dataclass
class Model:
    """What is trained together. empty_tokens (1, 32) and empty_length (1,) are the empty prompt's."""

    encoder: nn.Module
    transformer: nn.Module
    facts_head: FactsHead
    empty_tokens: Tensor
    empty_length: Tensor
    blocks: Blocks

    def named_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Without the text encoder's last layer and norm, which nothing reads."""
        last = f"layers.{len(self.encoder.layers) - 1}."
        text = [
            (name, weight) for name, weight in self.encoder.named_parameters() if not name.startswith((last, "norm."))
        ]
        return [*text, *self.transformer.named_parameters(), *self.facts_head.named_parameters()]

    def empty(self, length: int) -> tuple[Tensor, Tensor]:
        pad = self.empty_tokens[0, -1].item()
        return F.pad(self.empty_tokens, (0, length - self.empty_tokens.shape[1]), value=pad), self.empty_length


def train_flow(
    model: Model,
    buckets: list[Bucket],
    clock: Clock,
    batch: int,
    rate: float,
    device: str,
    log: Callable,
    name: str = "flow",
    schedule_share: float = 0.0,
    keep: Callable[[float], None] | None = None,
) -> None:
    """schedule_share of the noise levels are those of the sampler's schedule, the rest continuous.

    Leaves the averaged weights in the model. `keep(progress)` is called from time to time with
    the averaged weights in place.
    """
    optimizer = Optimizer(model.named_weights(), rate, uses_muon=True)
    losses = torch.zeros(2, device=device)
    half = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")

    def train_on(bucket: Bucket) -> None:
        index = torch.randint(0, len(bucket), (batch,), device=device)
        tokens, lengths, x0 = bucket.tokens[index].long(), bucket.lengths[index].long(), bucket.latents[index].float()
        empties = empty_prompts[bucket.tokens.shape[1]]
        is_empty = (torch.rand(batch, device=device) < EMPTY_SHARE) & (bucket.noise is None)
        tokens = torch.where(is_empty[:, None], empties[0], tokens)
        lengths = torch.where(is_empty, empties[1], lengths)
        noise = torch.randn_like(x0) if bucket.noise is None else bucket.noise[index].float()
        sigma = _noise_levels(batch, schedule_share, grid)
        level = sigma[:, None, None, None]
        with half:
            features = encode_text(model.encoder, tokens, model.blocks)
            out = predict(
                model.transformer, (1 - level) * x0 + level * noise, 1 - sigma, features, lengths, model.blocks
            )
            facts_loss = model.facts_head.loss(features, lengths, Facts.of(bucket, index), (~is_empty).float())
        loss = F.mse_loss(out.float(), x0 - noise)
        (loss + FACTS_WEIGHT * facts_loss).backward()
        optimizer.apply()
        losses.copy_(torch.stack([loss, facts_loss]).detach())

    grid = sigmas(len(sigmas(8)) - 1)[:-1].to(device)
    empty_prompts = {length: model.empty(length) for length in {bucket.tokens.shape[1] for bucket in buckets}}
    memory = shared_memory(device)
    recorded = [Recorded(lambda bucket=bucket: train_on(bucket), device, memory) for bucket in buckets]
    rng = random.Random(clock.step)
    sizes, reported = [len(bucket) for bucket in buckets], -1.0
    for step, progress in clock:
        optimizer.schedule(step, progress)
        rng.choices(recorded, sizes)[0]()
        if progress - reported >= 0.05:
            loss, facts_loss = losses.tolist()
            log(f"{name} {progress:.0%}, step {step}: squared error {loss:.4f}, facts {facts_loss:.3f}")
            if keep and reported >= 0:
                with _averaged(optimizer):
                    keep(progress)
            reported = progress
    log(f"{name}: {clock.step} steps")
    optimizer.take_average()


class _averaged:
    """Within the context, the averaged weights are in place."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer

    def __enter__(self):
        self.current = [weight.detach().clone() for weight in self.optimizer.weights]
        self.optimizer.take_average()

    @torch.no_grad()
    def __exit__(self, *_):
        for weight, current in zip(self.optimizer.weights, self.current, strict=True):
            weight.copy_(current)


def _noise_levels(batch: int, schedule_share: float, grid: Tensor) -> Tensor:
    u = torch.rand(batch, device=grid.device)
    sigma = torch.where(torch.rand_like(u) < 0.85, 3 * u / (1 + 2 * u), u)
    if schedule_share:
        scheduled = grid[torch.randint(0, len(grid), (batch,), device=grid.device)]
        sigma = torch.where(torch.rand_like(u) < schedule_share, scheduled, sigma)
    return sigma


@torch.no_grad()
def generate_pairs(
    model: Model, buckets: list[Bucket], count: int, batch: int, device: str, log: Callable
) -> list[Bucket]:
    """Buckets of about `count` noises in all, with the latents that the guided teacher turns them into."""
    total = sum(len(bucket) for bucket in buckets)
    half = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")
    pairs, recorded, memory = [], [], shared_memory(device)
    for bucket in buckets:
        rounds = max(1, round(count * len(bucket) / total / batch))
        noise = torch.empty(batch, *bucket.latents.shape[1:], device=device)
        generated, index = torch.empty_like(noise), torch.empty(batch, dtype=torch.long, device=device)
        empties, lengths = model.empty(bucket.tokens.shape[1])
        empties, lengths = empties.expand(batch, -1).contiguous(), lengths.expand(batch).contiguous()

        def generate_batch(bucket=bucket, noise=noise, generated=generated, index=index, empty=(empties, lengths)):
            index.copy_(torch.randint(0, len(bucket), (batch,), device=device))
            noise.normal_()
            # with gradients on, though none are needed: the blocks are compiled that way
            with torch.enable_grad(), half:
                generated.copy_(
                    sample(
                        model.encoder,
                        model.transformer,
                        noise,
                        bucket.tokens[index].long(),
                        bucket.lengths[index].long(),
                        TEACHER_STEPS,
                        TEACHER_GUIDANCE,
                        empty,
                        model.blocks,
                    ).detach()
                )

        recorded.append(Recorded(generate_batch, device, memory))
        noises, latents, indices = [], [], []
        for _ in range(rounds):
            recorded[-1]()
            noises.append(noise.to(bucket.latents.dtype))
            latents.append(generated.to(bucket.latents.dtype))
            indices.append(index.clone())
        chosen = torch.cat(indices)
        rest = {
            name: getattr(bucket, name)[chosen]
            for name in ("tokens", "lengths", "shapes", "colors", "circles", "backgrounds")
        }
        pairs.append(replace(bucket, latents=torch.cat(latents), noise=torch.cat(noises), **rest))
        log(f"pairs {bucket.name}: {len(chosen)}")
    return pairs
