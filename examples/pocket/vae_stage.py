"""The autoencoder's training: first both halves, then the decoder alone on noisy latents.

Between the two, the latents' mean and deviation are set, channel by channel, to what the
official shift and scaling factors expect; the first decoder layer undoes the change.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from model import LATENT_CHANNELS, SCALING, SHIFT, build_vae
from optim import Clock, Optimizer, Recorded
from palette import PALETTE, SHAPES
from render import ground_truth, paint
from scenes import held_out_scenes, pack, sample_scene
from torch import Tensor

SIDE = 128
BOTH_SHARE = 0.85  # of the steps and seconds; the decoder alone gets the rest
KL_WEIGHT = 1e-4
NOISE = 0.25  # largest standard deviation of the noise added to the latents, relative to theirs


def train_vae(
    steps: int,
    seconds: float,
    images: int,
    batch: int,
    rate: float,
    device: str,
    log: Callable,
    is_compiled: bool,
):
    """Train for at most this many steps and seconds."""
    started = time.monotonic()
    vae = build_vae().to(device, memory_format=torch.channels_last)
    encoder, decoder = vae.encoder, vae.decoder
    if is_compiled:
        encoder, decoder = (torch.compile(half, dynamic=False) for half in (encoder, decoder))
    album = _album(images, device)
    log(f"{len(album)} images painted")
    losses = torch.zeros(3, device=device)

    def draw() -> Tensor:
        chosen = album[torch.randint(0, len(album), (batch,), device=device)]
        return (chosen.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def both_step(optimizer):
        x = draw()
        with _half_precision(device):
            mean, log_variance = encoder(x).float().chunk(2, 1)
            log_variance = log_variance.clamp(-30, 20)
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            y = decoder(z).float()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = _image_loss(y, x) + KL_WEIGHT * divergence
        loss.backward()
        optimizer.apply()
        losses.copy_(torch.stack([loss, (y - x).pow(2).mean(), divergence]).detach())

    def decoder_step(optimizer):
        x = draw()
        with _half_precision(device):
            # not under no_grad, which would compile the encoder a second time
            z = encoder(x).float().chunk(2, 1)[0].detach()
            level = NOISE / SCALING * torch.rand(len(z), 1, 1, 1, device=device)
            y = decoder((z + level * torch.randn_like(z)).requires_grad_()).float()
        loss = _image_loss(y, x)
        loss.backward()
        optimizer.apply()
        losses.copy_(torch.stack([loss, (y - x).pow(2).mean(), losses[2]]).detach())

    both = int(BOTH_SHARE * steps)
    clock = Clock(both, BOTH_SHARE * seconds - (time.monotonic() - started), device)
    _run(both_step, list(vae.named_parameters()), clock, rate, device, log, losses, "vae")
    _set_latent_statistics(vae, torch.cat([_means(vae, draw()) for _ in range(16)]))
    clock = Clock(steps - both, seconds - (time.monotonic() - started), device)
    _run(decoder_step, list(vae.decoder.named_parameters()), clock, 0.5 * rate, device, log, losses, "vae decoder")
    return vae.eval().requires_grad_(False)


def _run(step_function, named, clock, rate, device, log, losses, name) -> None:
    optimizer = Optimizer(named, rate, decay=1e-4)
    step_once = Recorded(lambda: step_function(optimizer), device)
    reported = -1.0
    for step, progress in clock:
        optimizer.schedule(step, progress)
        step_once()
        if progress - reported >= 0.05:
            reported = progress
            total, square, divergence = losses.tolist()
            log(
                f"{name} {progress:.0%}, step {step}: loss {total:.4f}, "
                f"squared error {square:.5f}, divergence {divergence:.2f} nats"
            )
    log(f"{name}: {clock.step} steps")
    optimizer.take_average()


def _half_precision(device: str):
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def _image_loss(y: Tensor, x: Tensor) -> Tensor:
    """Absolute, squared and gradient error; outlines count more, and those of low contrast most."""
    contrast = (F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)).sum(1, keepdim=True)  # 0 to 6
    weight = torch.where(contrast < 0.02, 1.0, 1 + 2 * (1.5 / contrast.clamp(min=0.02)).clamp(1, 4))
    error = y - x
    slopes = error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()
    return (weight * (error.abs() + 2 * error.pow(2))).mean() + 0.5 * slopes


@torch.no_grad()
def _means(vae, x: Tensor) -> Tensor:
    with _half_precision(x.device.type):
        return vae.encoder(x).float().chunk(2, 1)[0]


@torch.no_grad()
def _set_latent_statistics(vae, z: Tensor) -> None:
    """Fold an affine map into the encoder's last and the decoder's first layer: afterwards
    every channel has mean SHIFT and deviation 1 / SCALING. (The decoder's map is exact but for
    the zero padding at the rim, which the decoder's own training corrects.)"""
    mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3)).clamp(min=1e-3)
    gain = 1 / SCALING / deviation
    offset = SHIFT - gain * mean
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    last.weight[:LATENT_CHANNELS] *= gain[:, None, None, None]
    last.bias[:LATENT_CHANNELS] = last.bias[:LATENT_CHANNELS] * gain + offset
    last.bias[LATENT_CHANNELS:] += 2 * gain.log()
    first.bias -= (first.weight.sum((2, 3)) * (offset / gain)).sum(1)
    first.weight /= gain[:, None, None]


def _album(count: int, device: str) -> Tensor:
    """Training images, (count, 3, SIDE, SIDE) uint8: half scenes, half richer and less regular ones."""
    rng = random.Random(17)
    parts, chunk = [], 500
    for _ in range(0, count // 2, chunk):
        size = min(chunk, count // 2)
        parts.append(_scenes_painted(rng, size, device))
        parts.append(_medley(size, device))
    return torch.cat(parts)


def _scenes_painted(rng: random.Random, count: int, device: str) -> Tensor:
    world = pack([sample_scene(rng, canvas=(SIDE, SIDE)) for _ in range(count)])
    return paint_batch(world, SIDE, SIDE, device)


def paint_batch(world: dict[str, np.ndarray], width: int, height: int, device: str) -> Tensor:
    """Packed scenes as (n, 3, height, width) uint8."""
    palette = torch.from_numpy(PALETTE).to(device)
    world = {name: torch.from_numpy(array).to(device) for name, array in world.items()}
    image = paint(
        world["shapes"],
        world["circles"],
        palette[world["colors"].long()],
        palette[world["backgrounds"].long()],
        width,
        height,
        torch,
        device=device,
    )
    return image.round().byte()


def _medley(count: int, device: str) -> Tensor:
    """Up to five shapes anywhere, off the grid and overlapping, in the palette's colours or others,
    some on a gradient: more than the captions describe, so that the autoencoder is more general."""

    def uniform(*shape):
        return torch.rand(*shape, device=device)

    palette = torch.from_numpy(PALETTE).to(device)

    def colors(*shape):
        named = palette[(uniform(*shape) * len(palette)).long()]
        return torch.where(uniform(*shape, 1) < 0.3, 255 * uniform(*shape, 3), named)

    shapes = (uniform(count, 5) * len(SHAPES)).long()
    shapes = torch.where(torch.arange(5, device=device) <= 5 * uniform(count, 1), shapes, -1)
    radii = 8 + 34 * uniform(count, 5) ** 1.5
    circles = torch.stack([SIDE * uniform(count, 5), SIDE * uniform(count, 5), radii], -1)
    near = colors(count)
    far = torch.where(uniform(count, 1) < 0.15, colors(count), near)
    ramp = torch.linspace(0, 1, SIDE, device=device).expand(SIDE, SIDE)
    ramp = torch.where(uniform(count, 1, 1) < 0.5, ramp, ramp.T)[:, None]
    ground = near[:, :, None, None] * (1 - ramp) + far[:, :, None, None] * ramp
    return paint(shapes, circles, colors(count, 5), ground, SIDE, SIDE, torch, device=device).round().byte()


@torch.no_grad()
def reconstructions(vae, count: int, seed: int, device: str) -> tuple[list, list[np.ndarray], tuple[float, float]]:
    """Held-out scenes, their images through the autoencoder, and mean and deviation of the scaled latents."""
    scenes, images, latents = held_out_scenes(count, seed), [], []
    for image in ground_truth(scenes):
        x = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
        z = vae.encode(x).latent_dist.mean
        latents.append(((z - SHIFT) * SCALING).flatten())
        images.append(as_images(vae.decode(z).sample)[0])
    flat = torch.cat(latents)
    return scenes, images, (flat.mean().item(), flat.std().item())


def as_images(x: Tensor) -> list[np.ndarray]:
    """(n, 3, H, W) in [-1, 1] to n arrays (H, W, 3) uint8."""
    return list(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
