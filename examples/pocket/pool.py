"""Captioned latents to train on, made once: scenes and tokens by processes, latents by the encoder.

They are in buckets, one for each image size and padded caption length, so that a batch
has one shape.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from model import LATENT_CHANNELS, PAD_TO, SCALING, SHIFT
from scenes import CANVASES, pack, sample_scene
from tokenizer import encode
from tokenizers import Tokenizer
from torch import Tensor
from vae_stage import paint_batch

LONGEST = 2 * PAD_TO  # tokens; longer captions are left out of training


@dataclass(frozen=True)
class Bucket:
    """latents (n, 16, height / 8, width / 8), scaled; tokens (n, L), lengths (n,) of captions.

    The rest is what the caption says, for the auxiliary loss: shapes, colors (n, 3), circles
    (n, 3, 3), backgrounds (n,). noise is like latents if each latent was made from one, else None.
    """

    width: int
    height: int
    latents: Tensor
    tokens: Tensor
    lengths: Tensor
    shapes: Tensor
    colors: Tensor
    circles: Tensor
    backgrounds: Tensor
    noise: Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}, {self.tokens.shape[1]} tokens"

    def __len__(self) -> int:
        return len(self.latents)


def sample_captioned(seed: int, count: int, width: int, height: int, tokenizer_file: str) -> dict[str, np.ndarray]:
    """Packed training scenes with their captions' tokens and lengths; for a worker process."""
    rng, tokenizer = random.Random(seed), Tokenizer.from_file(tokenizer_file)
    scenes = [sample_scene(rng, canvas=(width, height)) for _ in range(count)]
    tokens, lengths = encode(tokenizer, [scene.caption for scene in scenes], 4 * LONGEST)
    fits = lengths <= LONGEST
    packed = pack(scenes) | {"tokens": tokens[:, :LONGEST], "lengths": lengths}
    return {name: array[fits] for name, array in packed.items()}


def order_scenes(workers, count: int, tokenizer_file: str, seed: int):
    """Have a process pool sample `count` scenes; returns what `make_buckets` collects."""
    orders, chunk = [], 5000
    for index, (width, height, share) in enumerate(CANVASES):
        left, part = int(share * count), 0
        while left > 0:
            order = (seed + 1000 * index + part, min(chunk, left), width, height, tokenizer_file)
            orders.append(((width, height), workers.apply_async(sample_captioned, order)))
            left, part = left - chunk, part + 1
    return orders


@torch.no_grad()
def make_buckets(orders, vae, device: str, log: Callable) -> list[Bucket]:
    # bfloat16 throughout: float32 group norms would take twice as long
    encoder = copy.deepcopy(vae.encoder)
    encoder = encoder.bfloat16() if device == "cuda" else encoder
    dtype = next(encoder.parameters()).dtype
    buckets = []
    for width, height, _ in CANVASES:
        packed = [result.get() for canvas, result in orders if canvas == (width, height)]
        packed = {name: np.concatenate([one[name] for one in packed]) for name in packed[0]}
        latents = torch.empty(
            len(packed["shapes"]), LATENT_CHANNELS, height // 8, width // 8, dtype=dtype, device=device
        )
        for start in range(0, len(latents), 512):
            part = slice(start, start + 512)
            world = {name: packed[name][part] for name in ("shapes", "colors", "circles", "backgrounds")}
            x = (paint_batch(world, width, height, device).float() / 127.5 - 1).to(dtype)
            mean = encoder(x.contiguous(memory_format=torch.channels_last)).float().chunk(2, 1)[0]
            latents[part] = ((mean - SHIFT) * SCALING).to(dtype)
        rest = {name: torch.from_numpy(array).to(device) for name, array in packed.items()}
        for low, high in ((0, PAD_TO), (PAD_TO, LONGEST)):
            chosen = ((rest["lengths"] > low) & (rest["lengths"] <= high)).nonzero()[:, 0]
            if len(chosen):
                fields = {name: tensor[chosen] for name, tensor in rest.items()}
                fields["tokens"] = fields["tokens"][:, :high].contiguous()
                buckets.append(Bucket(width, height, latents[chosen], **fields))
                log(f"bucket {buckets[-1].name}: {len(buckets[-1])} latents")
    return buckets
