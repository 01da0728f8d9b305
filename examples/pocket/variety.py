"""Do seeds differ more if the first steps are disturbed? python examples/pocket/variety.py CHECKPOINT -n 2000 --jobs 16

Images of every prompt are generated with the same few seeds in each of several ways, in batches (a GPU takes minutes, a
CPU hours). A way is KIND:AMOUNT:STEPS, for the first STEPS steps:

- noise: normal noise on the prompt's embedding, of that many times each token's root mean square
- uniform: what InvokeAI adds: uniform noise of up to that many standard deviations, on half of the values
- empty: the velocity, moved that far towards the empty prompt's: 1 replaces the prompt; below 0 it is guidance
- low: the initial noise's low frequencies times 1 + amount, for any number of steps

The table compares each way with none, prompt by prompt, with 95 % intervals: the share of right images, by the judge;
and, over pairs of seeds that are right in both ways, the distance of the pixels (root mean square, from 0 to 1) and the
share of pairs in which an object is somewhere else. What a caption leaves open in this world is mostly the place, so
the last line compares this share with that of training images.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from evaluate import as_bytes
from judge import look
from scenes import GRID, Scene, held_out_scenes
from scores import one_thread_each

STEPS = 8
BATCH = 50  # prompts
LOW = 0.15  # cycles per latent pixel, in both directions
# The share of pairs of training images of a prompt in which the place differs: `scenes.py` samples 3 or 5 places.
MOVED = {"single": 4 / 5, "inside": 4 / 5, "pair": 2 / 3, "and": 2 / 3, "count": 2 / 3, "row": 2 / 3}


@dataclass(frozen=True)
class Way:
    kind: str
    amount: float = 0.0
    steps: int = 0

    @classmethod
    def of(cls, text: str) -> Way:
        kind, amount, steps = text.split(":")
        return cls(kind, float(amount), int(steps))

    def __str__(self) -> str:
        return f"{self.kind} {self.amount:g}, {self.steps} step{'s' * (self.steps > 1)}" if self.steps else self.kind


NONE = Way("none")
WAYS = ("noise:0.25:1", "noise:0.25:2", "noise:0.5:1", "noise:0.5:2", "uniform:1:2", "empty:-0.5:8", "low:0.25:1")


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt: how far apart, and whether an object is somewhere else; None unless both are right."""

    distance: float
    moved: bool | None


Row = tuple[list[bool], dict[tuple[int, int], Pair]]  # whether each image is right, and the pairs of images


class Batches:
    """Generates images of many prompts at once; prompts of a batch have one size, and captions one padded length."""

    def __init__(self, checkpoint: Path | str, dtype: str):
        from mlx_zimage import ZImagePipeline

        self.pipe = ZImagePipeline.from_pretrained(checkpoint, dtype=dtype)
        self.transformer = self.pipe.transformer
        self.features = cache(self._features)

    def _features(self, caption: str) -> np.ndarray:
        import mlx.core as mx

        return np.array(self.pipe.encode(caption).astype(mx.float32))

    def embedded(self, features: list[np.ndarray], h: int, w: int):
        """A `Caption` of embeddings (L, dim), one per image."""
        import mlx.core as mx

        from mlx_zimage.models.transformer import Caption, joined

        streams = [self.transformer.caption_stream(mx.array(own)) for own in features]
        (stream,) = self.transformer.run(self.transformer.config.refiners, [joined(*streams)])
        return Caption(stream.x, *self.transformer.rope(stream.x.shape[1], h, w))

    def images(self, scenes: list[tuple[int, Scene]], seeds: int, ways: list[Way]) -> dict[Way, list[np.ndarray]]:
        """For each way, the images of the first scene with all seeds, then of the next; each scene is given with its
        number."""
        import mlx.core as mx

        from mlx_zimage.models.layers import result
        from mlx_zimage.models.transformer import row
        from mlx_zimage.noise import initial_noise
        from mlx_zimage.request import GenerateRequest
        from mlx_zimage.scheduler import step, times

        first = scenes[0][1]
        size = first.height // 8, first.width // 8
        sigmas = self.pipe.sigmas(GenerateRequest("-", first.width, first.height, 0, STEPS))
        every = [(scene.caption, 100 * number + k) for number, scene in scenes for k in range(seeds)]
        noise = np.concatenate([np.array(initial_noise(seed, (1, 16, *size))) for _, seed in every])
        noise = noise.transpose(0, 2, 3, 1)
        own = [self.features(caption) for caption, _ in every]
        plain, empty = self.embedded(own, *size), self.embedded([self.features("")] * len(every), *size)
        modulations, final_scales = self.transformer.modulate(times(sigmas[:-1]))

        def velocity(latents, caption, i):
            return -self.transformer(latents, [caption], row(modulations, i), row(final_scales, i))[0]

        found = {}
        for way in ways:
            early, latents = plain, mx.array(low(noise, way.amount) if way.kind == "low" else noise)
            if way.kind in NOISES:
                noised = zip(own, every, strict=True)
                early = self.embedded([NOISES[way.kind](x, way.amount, seed) for x, (_, seed) in noised], *size)
            for i in range(STEPS):
                v = velocity(latents, early if i < way.steps else plain, i)
                if way.kind == "empty" and i < way.steps:
                    v = v + way.amount * (velocity(latents, empty, i) - v)
                latents = step(latents, v, sigmas[i], sigmas[i + 1])
                mx.eval(latents)
            decoded = [result(self.pipe.networks.vae.decode_steps(latents[j : j + 1])) for j in range(len(every))]
            found[way] = [as_bytes(np.array(one)[0] / 2 + 0.5) for one in decoded]
        return found


def noise(embedding: np.ndarray, amount: float, seed: int) -> np.ndarray:
    size = np.sqrt(np.square(embedding).mean(-1, keepdims=True))
    normal = np.random.default_rng([seed, 1]).standard_normal(embedding.shape)
    return (embedding + amount * size * normal).astype(np.float32)


def uniform(embedding: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """Source: InvokeAI, z_image_seed_variance_enhancer.py, with its default of half of the values."""
    rng = np.random.default_rng([seed, 1])
    change = amount * embedding.std() * rng.uniform(-1, 1, embedding.shape)
    return (embedding + change * (rng.random(embedding.shape) < 0.5)).astype(np.float32)


NOISES = {"noise": noise, "uniform": uniform}


def low(noise: np.ndarray, amount: float) -> np.ndarray:
    """Noise (B, h, w, C) with its low frequencies times 1 + amount."""
    _, h, w, _ = noise.shape
    is_low = (np.abs(np.fft.fftfreq(h))[:, None] < LOW) & (np.abs(np.fft.fftfreq(w)) < LOW)
    changed = np.fft.fft2(noise, axes=(1, 2)) * np.where(is_low, 1 + amount, 1.0)[..., None]
    return np.fft.ifft2(changed, axes=(1, 2)).real.astype(np.float32)


def compare(task: tuple[Scene, list[np.ndarray]]) -> Row:
    """The images of one prompt in one way."""
    scene, images = task
    looks = [look(image, scene) for image in images]
    right = [verdict.is_right for verdict, _ in looks]
    places = [
        [tuple(one.centers[thing.shape]) for one, thing in zip(seen, scene.things, strict=True)] if good else None
        for good, (_, seen) in zip(right, looks, strict=True)
    ]
    pairs = {}
    for a, b in itertools.combinations(range(len(images)), 2):
        distance = float(np.sqrt(np.square(images[a].astype(np.float32) - images[b]).mean()) / 255)
        moved = None
        if places[a] and places[b]:
            orders = itertools.permutations(places[b]) if scene.kind == "count" else [places[b]]
            moved = min(max(map(math.dist, places[a], order)) for order in orders) >= GRID / 2
        pairs[a, b] = Pair(distance, moved)
    return right, pairs


def with_interval(values: np.ndarray) -> str:
    """The mean in percent, with the half width of its 95 % interval."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{100 * values.mean():+.2f} ± {100 * half:.2f}"


def as_table(rows: list[dict[Way, Row]], ways: list[Way]) -> str:
    lines = [
        f"{len(rows)} prompts",
        "",
        "| way | right % | change | distance | change % | moved % | change |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in ways:
        right = np.array([(np.mean(row[NONE][0]), np.mean(row[way][0])) for row in rows])
        distances, moves = [], []
        for row in rows:
            pairs = [(own, row[way][1][key]) for key, own in row[NONE][1].items()]
            both = [(a, b) for a, b in pairs if a.moved is not None and b.moved is not None]
            if both:
                distances.append(np.mean([(a.distance, b.distance) for a, b in both], axis=0))
                moves.append(np.mean([(a.moved, b.moved) for a, b in both], axis=0))
        distance, moved = np.array(distances), np.array(moves)
        further = (distance[:, 1] - distance[:, 0]) / distance[:, 0].mean()
        lines.append(
            f"| {way} | {100 * right[:, 1].mean():.2f} | {with_interval(right[:, 1] - right[:, 0])} | "
            f"{distance[:, 1].mean():.4f} | {with_interval(further)} | "
            f"{100 * moved[:, 1].mean():.1f} | {with_interval(moved[:, 1] - moved[:, 0])} |"
        )
    return "\n".join(lines)


def by_kind(scenes: list[Scene], rows: list[dict[Way, Row]]) -> str:
    """How often an object is in another place with another seed if nothing is disturbed, by kind of scene, compared
    with training images."""
    moves = defaultdict(list)
    for scene, row in zip(scenes, rows, strict=True):
        if scene.position is None:
            moves[scene.kind] += [pair.moved for pair in row[NONE][1].values() if pair.moved is not None]
    shown = [f"{kind} {100 * np.mean(own):.0f} ({100 * MOVED[kind]:.0f})" for kind, own in moves.items() if own]
    return f"moved % without a change, by kind (of training images): {', '.join(shown)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("-n", "--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=2028, help="seed of the prompts and of the first image")
    parser.add_argument("--seeds", type=int, default=4, help="images of each prompt")
    parser.add_argument("--way", action="append", help=f"KIND:AMOUNT:STEPS; by default {', '.join(WAYS)}")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--jobs", type=int, default=1, help="processes that judge")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time, with fewer prompts")
    options = parser.parse_args()
    one_thread_each()
    ways = [NONE, *map(Way.of, options.way or WAYS)]
    scenes, batches = held_out_scenes(options.count, options.seed), Batches(options.checkpoint, options.dtype)
    groups = defaultdict(list)
    for i, scene in enumerate(scenes):
        length = -(-len(batches.features(scene.caption)) // 32)
        groups[scene.width, scene.height, length].append(i)
    parts = [own[j : j + BATCH] for own in groups.values() for j in range(0, len(own), BATCH)]
    np.random.default_rng(0).shuffle(parts)
    began, pending = time.monotonic(), []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for part in parts:
            if time.monotonic() - began > options.seconds:
                break
            numbered = [(i + 10 * options.seed, scenes[i]) for i in part]
            for way, images in batches.images(numbered, options.seeds, ways).items():
                for j, i in enumerate(part):
                    task = scenes[i], images[j * options.seeds : (j + 1) * options.seeds]
                    pending.append((i, way, pool.apply_async(compare, (task,))))
            print(f"{len(pending) // len(ways)} of {options.count} prompts generated", file=sys.stderr, flush=True)
        rows: dict[int, dict[Way, Row]] = defaultdict(dict)
        for i, way, row in pending:
            rows[i][way] = row.get()
    print(as_table([rows[i] for i in sorted(rows)], ways))
    print(f"\n{by_kind([scenes[i] for i in sorted(rows)], [rows[i] for i in sorted(rows)])}")


if __name__ == "__main__":
    main()
