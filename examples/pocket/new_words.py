"""Teach the pocket model a colour or a shape that it does not know: python examples/pocket/new_words.py teal DIR

Trains a LoRA on 50 rendered images with the colour teal, or the shape arrow or hexagon. To keep what the model knows, a
step also has images that the model generated from other captions, on which the LoRA should not change its output. As in
`lora.py`, steps alternate between weights in float32 and in 4 bits. Then scores held-out prompts with the new word, and
others without it, each with and without the LoRA on both kinds of weights. --diffusers N also scores N of each with
diffusers.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from evaluate import generate_with_diffusers, images_of
from judge import judge
from lora import Lora, Trainer, generate_many, interval, refined
from mlx.utils import tree_flatten, tree_unflatten
from palette import COLOR_NAMES, SHAPES, WIDER
from PIL import Image
from render import ground_truth
from scenes import Scene, held_out_scenes, sample_scene
from scores import one_thread_each

from mlx_zimage import ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.models.layers import dequantize
from mlx_zimage.models.runner import PlainRunner, Tree
from mlx_zimage.models.transformer import Transformer, row
from mlx_zimage.weights.hub import POCKET

SIDE = 128  # pixels; trained at one size
RANK, RATE = 32, 2e-3
IMAGES, OWN = 50, 400  # with the new word, and generated from other captions
LEVELS = 2  # noise levels in a step
TEAL = len(COLOR_NAMES)  # after the known colours
CROSS = re.compile(r"\b(cross|plus sign)\b"), "shape", SHAPES.index("cross")
# The new word replaces these in captions, and the new colour or shape this one in the scenes that they describe.
STANDS_FOR = {
    "teal": (re.compile(r"\b(purple|violet)\b"), "color", COLOR_NAMES.index("purple"), TEAL),
    "arrow": (*CROSS, WIDER.shapes.index("arrow")),
    "hexagon": (*CROSS, WIDER.shapes.index("hexagon")),
}

# ---- scenes


def with_new_word(word: str, count: int, seed: int, split: str) -> list[Scene]:
    """English scenes of a split in which the new word describes exactly one thing."""
    pattern, part, known, new = STANDS_FOR[word]
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = sample_scene(rng, split, language="en", canvas=(SIDE, SIDE))
        if scene.kind == "count" or (part == "color" and scene.background == known):
            continue
        if [getattr(thing, part) for thing in scene.things].count(known) == 1 and pattern.search(scene.caption):
            things = (replace(one, **{part: new}) if getattr(one, part) == known else one for one in scene.things)
            found.append(replace(scene, things=tuple(things), caption=pattern.sub(word, scene.caption)))
    return found


def known_scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, canvas=(SIDE, SIDE)) for _ in range(count)]


# ---- training


class Images:
    """Embedded captions, by their padded length, with the latents of their images."""

    def __init__(self, pipe: ZImagePipeline, scenes: list[Scene], images: list[np.ndarray]):
        found: dict[int, list[tuple[mx.array, mx.array]]] = {}
        for scene, image in zip(scenes, images, strict=True):
            caption = pipe.transformer.caption_stream(pipe.encode(scene.caption)).x[0]
            latents = pipe.vae.encode(mx.array(image[None].astype(np.float32) / 127.5 - 1))[0]
            mx.eval(caption, latents)
            found.setdefault(len(caption), []).append((caption, latents))
        self.counts = {length: len(own) for length, own in found.items()}
        self.by_length = {
            length: tuple(mx.stack(part) for part in zip(*own, strict=True)) for length, own in found.items()
        }

    def sample(self, length: int, count: int, rng: np.random.Generator) -> tuple[mx.array, mx.array]:
        """Random captions of a length (LEVELS, count, length, dim) and their latents."""
        captions, latents = self.by_length[length]
        chosen = mx.array(rng.integers(len(captions), size=(LEVELS, count)))
        return captions[chosen], latents[chosen]


def unpacked(weights: Tree) -> Tree:
    """A tree of weights with quantized ones as the float32 that they stand for."""
    if isinstance(weights, list):
        return [unpacked(part) for part in weights]
    if not isinstance(weights, dict):
        return weights
    if "packing" in weights:
        return {"weight": dequantize(weights, mx.float32), **({"bias": weights["bias"]} if "bias" in weights else {})}
    return {name: unpacked(part) for name, part in weights.items()}


class Learner(Trainer):
    """Learns what new images show, at the sampler's noise levels, and what the model says of its own images."""

    def __init__(self, pipes: list[ZImagePipeline], new: Images, own: Images):
        super().__init__(pipes, rank=RANK)
        self.new, self.own = new, own
        # one function to compile for both, and faster
        self.weights = [dict(tree_flatten(unpacked(tree_unflatten(list(own.items()))))) for own in self.weights]

    def outputs(self, tree: Tree, schedule, captions: mx.array, noisy: mx.array) -> mx.array:
        """Data minus noise, as weights predict them, for a group of images at each of LEVELS noise levels."""
        network, found = Transformer(self.config, PlainRunner(tree), compile=False), []
        for i in range(LEVELS):
            caption = refined(network, captions[i], SIDE // 8, SIDE // 8)
            found += network(noisy[i], [caption], row(schedule[0], i), row(schedule[1], i))
        return mx.stack(found)

    def learn(self, seconds: float, batch: int, report: Callable[[int, float], None]) -> None:
        """Adam until the time is over, its rate falling to 0; reports each tenth of the time.

        A step has `batch` new images and twice as many of the model's own at each noise level.
        """
        optimizer = optim.Adam(learning_rate=RATE)
        optimizer.init(self.lora)
        state = [self.lora, optimizer.state]

        def loss_of(lora: Lora, weights: dict[str, mx.array], *given) -> mx.array:
            *given, wanted = given
            return mx.square(self.outputs(self.tree(lora, weights), *given) - wanted).mean()

        def step(*given) -> mx.array:
            loss, gradients = mx.value_and_grad(loss_of)(self.lora, *given)
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            self.lora.update(optimizer.apply_gradients(gradients, self.lora))
            return loss

        known = partial(self.outputs, self.tree({}, self.weights[0]))
        if mx.default_device() == mx.gpu:
            step, known = mx.compile(step, inputs=state, outputs=state), mx.compile(known)
        rng, losses, begin, count, reported = np.random.default_rng(1), [], time.monotonic(), 0, 0.0
        lengths = [length for length in self.new.counts if length in self.own.counts]
        shares = np.array([self.new.counts[length] for length in lengths], float)
        shares /= shares.sum()
        while (part := (time.monotonic() - begin) / seconds) < 1:
            optimizer.learning_rate = RATE * min(1, (count + 1) / 50) * (1 + math.cos(math.pi * part)) / 2
            copy, first = count % len(self.weights), int(rng.integers(len(self.sigmas) // LEVELS))
            levels = [first + i * len(self.sigmas) // LEVELS for i in range(LEVELS)]  # a high one and a low one
            schedules = [tuple(every[mx.array(levels)] for every in own) for own in self.schedules]
            length = int(rng.choice(lengths, p=shares))
            both = self.new.sample(length, batch, rng), self.own.sample(length, 2 * batch, rng)
            captions, latents = (mx.concatenate(parts, axis=1) for parts in zip(*both, strict=True))
            noise = mx.array(rng.standard_normal(latents.shape, np.float32))
            sigma = mx.array([self.sigmas[i] for i in levels])[:, None, None, None, None]
            noisy = (1 - sigma) * latents + sigma * noise
            kept = known(schedules[0], captions[:, batch:], noisy[:, batch:])
            wanted = mx.concatenate([(latents - noise)[:, :batch], kept], axis=1)
            loss = step(self.weights[copy], schedules[copy], captions, noisy, wanted)
            mx.eval(loss, state)
            losses.append(loss.item())
            count += 1
            if part >= reported:
                report(count, float(np.mean(losses)))
                losses, reported = [], reported + 0.1


# ---- scores


def verdicts(pool, generate, scenes: list[Scene], sheet: Path | None = None) -> list[bool]:
    """Whether each scene's image is right; the first ten are saved above those that are."""
    images = images_of(generate, scenes, 7, 100)
    if sheet:
        rows = [np.concatenate(part[:10], axis=1) for part in (images, ground_truth(scenes[:10]))]
        Image.fromarray(np.concatenate(rows)).save(sheet)
    wider = partial(judge, world=WIDER)
    return [verdict.is_right for verdict in pool.starmap(wider, zip(images, scenes, strict=True), 20)]


def score(pool, copies: dict[str, Path], file: Path, word: str, count: int, with_diffusers: int) -> dict:
    """Prints, and returns, what is right with and without the LoRA; count prompts without the word, a tenth with it."""
    groups = {"with": with_new_word(word, count // 10, 1, "held out"), "without": held_out_scenes(count, 2028)}
    found: dict[str, list[bool]] = {}
    print("| weights | LoRA | prompts with the word: right % | prompts without it: right % |\n|---|---|---|---|")

    def show(name: str, use: bool, generate, groups: dict[str, list[Scene]]) -> None:
        for group, scenes in groups.items():
            sheet = file.with_suffix(".png") if group == "with" and use and name == "float32" else None
            found[f"{name}, {'' if use else 'no '}LoRA, {group}"] = verdicts(pool, generate, scenes, sheet)
        shares = " | ".join(f"{100 * np.mean(one):.1f} of {len(one)}" for one in list(found.values())[-len(groups) :])
        print(f"| {name} | {'yes' if use else 'no'} | {shares} |", flush=True)

    for name, path in copies.items():
        for use in (False, True):
            pipe = ZImagePipeline.from_pretrained(path, dtype="float32")
            if use:
                pipe.load_lora(file)
            mx.clear_cache()
            show(name, use, generate_many(pipe), groups)
    if with_diffusers:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        few = {group: scenes[:with_diffusers] for group, scenes in groups.items()}
        for use in (False, True):
            show(
                "float32, in diffusers",
                use,
                generate_with_diffusers(POCKET, device=device, lora=file if use else None),
                few,
            )
    for name in copies:
        mean, half = interval(found[f"{name}, no LoRA, without"], found[f"{name}, LoRA, without"])
        print(f"{name}: the LoRA changes prompts without the word by {mean:+.1f} ± {half:.1f} points (95 %)")
    for group in groups:
        mean, half = interval(*(found[f"{name}, LoRA, {group}"] for name in copies))
        print(f"4 bits minus float32, with the LoRA, prompts {group} the word: {mean:+.1f} ± {half:.1f} points (95 %)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", choices=list(STANDS_FOR))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=100, help="of training")
    parser.add_argument("--batch", type=int, default=16, help="new images for each noise level of a step")
    parser.add_argument("--own", type=int, default=OWN, help="images that the model generates")
    parser.add_argument("--count", type=int, default=2000, help="prompts without the word; a tenth as many with it")
    parser.add_argument("--diffusers", type=int, default=0, metavar="N", help="score N of each in diffusers, too")
    parser.add_argument("--jobs", type=int, default=1, help="processes that judge")
    options = parser.parse_args()
    one_thread_each()
    options.folder.mkdir(parents=True, exist_ok=True)
    file, started = options.folder / f"{options.word}.safetensors", time.monotonic()
    say = lambda text: print(f"{text}, {time.monotonic() - started:.0f} s", flush=True)  # noqa: E731
    with tempfile.TemporaryDirectory() as temporary, multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        packed = convert(POCKET, Path(temporary) / "4-bit", bits=4)
        copies = {"float32": POCKET, "4 bits": packed}
        pipes = [ZImagePipeline.from_pretrained(path, dtype="float32") for path in copies.values()]
        scenes, own = with_new_word(options.word, IMAGES, 0, "train"), known_scenes(options.own, 5)
        generated = images_of(generate_many(pipes[0]), own, 1000, 50)
        learner = Learner(pipes, Images(pipes[0], scenes, ground_truth(scenes)), Images(pipes[0], own, generated))
        say("images encoded")
        learner.learn(options.seconds, options.batch, lambda step, loss: say(f"{step} steps: {loss:.4f}"))
        learner.save(file)
        say("trained")
        found = score(pool, copies, file, options.word, options.count, options.diffusers)
    file.with_suffix(".json").write_text(
        json.dumps({name: "".join("01"[one] for one in own) for name, own in found.items()})
    )
    say("all")


if __name__ == "__main__":
    main()
