"""Teach the pocket model a colour or a shape that it does not know: python examples/pocket/new_words.py cyan DIR

Trains a LoRA on 50 rendered images with the colour cyan, or the shape oval. They are chosen to differ as much as
possible; each is also used mirrored, moved and recoloured, with two captions that say the same thing. To keep what the
model knows, most of the loss is measured on the model's own trajectories to images for other captions, where the LoRA
should not change its output. As in `lora.py`, steps alternate between weights in float32 and in 4 bits. Then scores
held-out prompts with the new word, and others without it, each with and without the LoRA on both kinds of weights.
--diffusers N also scores N of each with diffusers.
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
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from captions import describe
from evaluate import generate_with_diffusers, images_of
from judge import judge
from lora import Lora, Trainer, generate_many, interval, refined
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from palette import COLOR_NAMES, SHAPES, WIDER
from PIL import Image
from render import ground_truth
from scenes import GRID, Scene, held_out_scenes, is_held_out, sample_scene, unnamed_background
from scores import one_thread_each

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.models.layers import dequantize
from mlx_zimage.models.runner import PlainRunner, Tree
from mlx_zimage.models.transformer import Transformer, row
from mlx_zimage.noise import initial_noise
from mlx_zimage.scheduler import times
from mlx_zimage.weights.hub import POCKET

Shape = tuple[int, int, int]  # a caption's padded length, and its latents' height and width

SIDE = 128  # pixels of images with the new word; those for other captions have all sizes
RANK, RATE, WARM_UP = 32, 2e-3, 100
IMAGES, POOL = 50, 1500  # with the new word, and how many they are chosen from
RECOLORED = 6  # choices of colours for each view of an image, besides its own
MIXED = 40.0  # condition number of a scene's colours up to which its pixels are unmixed
CAPTIONS = 2  # for each view of an image, in each choice of colours
OWN = 6000  # images that the model generates from other captions
LEVELS, NEW, KEPT = 4, 12, 24  # noise levels in a step; at each, new images and some of the model's own
# The new word replaces these in captions, and the new colour or shape this one in the scenes that they describe.
STANDS_FOR = {
    "cyan": (re.compile(r"\b(purple|violet)\b"), "color", COLOR_NAMES.index("purple"), len(COLOR_NAMES)),
    "oval": (re.compile(r"\b(cross|plus sign)\b"), "shape", SHAPES.index("cross"), len(SHAPES)),
}
OPPOSITE = {"left": "right", "right": "left"}


# ---- scenes


def scenes_to_rename(word: str, count: int, seed: int, split: str) -> list[Scene]:
    """English scenes of a split with exactly one thing that the new word is to describe: see `renamed`."""
    pattern, part, known, _ = STANDS_FOR[word]
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = sample_scene(rng, split, language="en", canvas=(SIDE, SIDE))
        if scene.kind == "count" or (part == "color" and scene.background == known):
            continue
        if [getattr(thing, part) for thing in scene.things].count(known) == 1 and pattern.search(scene.caption):
            found.append(scene)
    return found


def renamed(word: str, scene: Scene) -> Scene:
    """The scene with the new colour or shape, and its caption with the new word."""
    pattern, part, known, new = STANDS_FOR[word]
    things = (replace(one, **{part: new}) if getattr(one, part) == known else one for one in scene.things)
    return replace(scene, things=tuple(things), caption=pattern.sub(word, scene.caption))


def with_new_word(word: str, count: int, seed: int, split: str) -> list[Scene]:
    return [renamed(word, scene) for scene in scenes_to_rename(word, count, seed, split)]


def facts(word: str, scene: Scene) -> Iterator[Hashable]:
    """What should differ between training images; above all, what the new colour or shape is combined with."""
    _, part, known, _ = STANDS_FOR[word]
    yield from (scene.position, scene.relation, scene.arrangement, ("on", scene.background))
    for i, thing in enumerate(scene.things):
        if getattr(thing, part) == known:
            yield from 3 * [("as", thing.color if part == "shape" else thing.shape), (scene.kind, i)]
            yield from (thing.size, thing.radius, (thing.x, thing.y))
        else:
            yield from (("beside", thing.color), ("beside a", thing.shape))


def varied(word: str, count: int, seed: int) -> list[Scene]:
    """`count` of POOL training scenes: each one has the facts that were seen least until then."""
    pool, seen, chosen = scenes_to_rename(word, POOL, seed, "train"), Counter(), []
    while len(chosen) < count:
        scene = max(pool, key=lambda one: np.mean([1 / (1 + seen[fact]) for fact in facts(word, one)]))
        pool.remove(scene)
        chosen.append(scene)
        seen.update(facts(word, scene))
    return chosen


def mirrored(scene: Scene) -> Scene:
    """What the scene's mirror image shows; its caption is missing."""
    things = tuple(replace(one, x=scene.width - one.x) for one in scene.things)
    if scene.kind == "and" or scene.arrangement == "row":  # named from left to right
        things = things[::-1]
    position = scene.position and " ".join(OPPOSITE.get(side, side) for side in scene.position.split())
    relation = OPPOSITE.get(scene.relation, scene.relation)
    return replace(scene, things=things, position=position, relation=relation, caption="")


def shifts(scene: Scene) -> list[tuple[int, int]]:
    """The shifts to the right and down, in pixels, that leave the scene as `scenes` may place it and its caption true:
    a single thing near the middle, several across the line that they are on."""
    if scene.position:
        return [(0, 0)]
    xs, ys = ([getattr(one, axis) for one in scene.things] for axis in "xy")
    x, y = ((min(at) + max(at) - SIDE) / 2 for at in (xs, ys))  # from the middle
    around = [(0, 0), (GRID, 0), (-GRID, 0), (0, GRID), (0, -GRID)]
    stays = (max(xs) > min(xs), max(ys) > min(ys))
    return [(int(i - x), int(j - y)) for i, j in around if not (stays[0] and i) and not (stays[1] and j)]


def views(scene: Scene, image: np.ndarray) -> Iterator[tuple[Scene, np.ndarray]]:
    """The scene and its image, as they are and mirrored, at every place: the pixels are the same, rearranged."""
    for side, pixels in ((scene, image), (mirrored(scene), image[:, ::-1])):
        for x, y in shifts(side):
            things = tuple(replace(one, x=one.x + x, y=one.y + y) for one in side.things)
            yield replace(side, things=things), np.roll(pixels, (y, x), axis=(0, 1))


def recolored(
    word: str, scene: Scene, image: np.ndarray, count: int, rng: random.Random
) -> Iterator[tuple[Scene, np.ndarray]]:
    """A scene to rename and its image, in `count` choices of other colours that a training image may have. A new colour
    stays, and so does a background that the caption does not name. Each pixel is a mixture of the scene's colours, and
    becomes the same mixture of the others; where that is ambiguous, as with gray between black and white, nothing is
    yielded."""
    _, part, known, new = STANDS_FOR[word]
    colors = [*dict.fromkeys((*(one.color for one in scene.things), scene.background))]
    fixed = {known} if part == "color" else set()
    if not scene.background_is_named:
        fixed.add(scene.background)
    free = [color for color in range(len(COLOR_NAMES)) if color not in fixed]
    shown = WIDER.palette.copy()
    if part == "color":
        shown[known] = shown[new]
    corners = np.c_[shown[colors], np.full(len(colors), 255)]
    if np.linalg.cond(corners) > MIXED or fixed.issuperset(colors):
        return
    unmix = np.linalg.pinv(corners)
    shares = image @ unmix[:3] + 255 * unmix[3]
    while count:
        others = iter(rng.sample(free, len(colors)))
        chosen = {color: color if color in fixed else next(others) for color in colors}
        things = tuple(replace(one, color=chosen[one.color]) for one in scene.things)
        found = replace(scene, things=things, background=chosen[scene.background], caption="")
        is_plain = found.background == unnamed_background([one.color for one in things])
        if not is_held_out(found) and (scene.background_is_named or is_plain):
            count -= 1
            yield found, (shares @ shown[[*chosen.values()]]).clip(0, 255).round().astype(np.uint8)


def reworded(word: str, scene: Scene, rng: random.Random) -> list[Scene]:
    """A scene with CAPTIONS wordings, all with the new word."""
    pattern, *_ = STANDS_FOR[word]
    found = []
    while len(found) < CAPTIONS:
        caption = describe(rng, scene)
        if pattern.search(caption):
            found.append(renamed(word, replace(scene, caption=caption)))
    return found


def known_scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


# ---- training


class Examples:
    """Embedded captions and the latents of their images, and what else belongs to each, by their shapes: those of one
    shape can be trained on together."""

    def __init__(self, examples: Iterable[tuple[mx.array, ...]]):
        found: dict[Shape, list[tuple[mx.array, ...]]] = {}
        for caption, latents, *others in examples:
            found.setdefault((len(caption), *latents.shape[-3:-1]), []).append((caption, latents, *others))
        self.by_shape = {
            shape: tuple(mx.stack(part) for part in zip(*own, strict=True)) for shape, own in found.items()
        }

    def choose(self, count: int, rng: np.random.Generator) -> list[mx.array]:
        """Random captions of one shape (LEVELS, count, length, dim), and what belongs to them."""
        groups = [*self.by_shape.values()]
        counts = np.array([len(captions) for captions, *_ in groups])
        arrays = groups[rng.choice(len(groups), p=counts / counts.sum())]
        chosen = mx.array(rng.integers(len(arrays[0]), size=(LEVELS, count)))
        return [array[chosen] for array in arrays]


def embedded(pipe: ZImagePipeline, scene: Scene) -> mx.array:
    caption = pipe.transformer.caption_stream(pipe.encode(scene.caption)).x[0]
    mx.eval(caption)
    return caption


def new_examples(pipe: ZImagePipeline, word: str, scenes: list[Scene], seed: int) -> Examples:
    """Captions with the new word, and the latents (h, w, C) of the images of scenes, in all their views."""
    rng, found = random.Random(seed), []
    for scene in scenes:
        (image,) = ground_truth([renamed(word, scene)])
        for view in views(scene, image):
            for one, pixels in (view, *recolored(word, *view, RECOLORED, rng)):
                latents = pipe.vae.encode(mx.array(pixels[None].astype(np.float32) / 127.5 - 1))[0]
                mx.eval(latents)
                found += [(embedded(pipe, named), latents) for named in reworded(word, one, rng)]
    return Examples(found)


def own_examples(pipe: ZImagePipeline, scenes: list[Scene], seed: int, batch: int = 100) -> Examples:
    """Captions, with the latents (steps, h, w, C) that the model's steps start from, and its outputs there."""
    network, sigmas = pipe.transformer, pipe.sigmas(GenerateRequest("-", SIDE, SIDE, seed=0)).tolist()
    modulations, finals = network.modulate(times(sigmas[:-1]))
    captions = Examples(
        (
            embedded(pipe, scene),
            initial_noise(seed + i, (1, 16, scene.height // 8, scene.width // 8))[0].transpose(1, 2, 0),
        )
        for i, scene in enumerate(scenes)
    )
    found: list[tuple[mx.array, ...]] = []
    for (_, h, w), (every, noise) in captions.by_shape.items():
        for start in range(0, len(every), batch):
            own, latents = every[start : start + batch], noise[start : start + batch]
            whole, states, outputs = refined(network, own, h, w), [], []
            for k, (sigma, following) in enumerate(pairwise(sigmas)):
                (output,) = network(latents, [whole], row(modulations, k), row(finals, k))
                states.append(latents)
                outputs.append(output)
                latents = latents + (sigma - following) * output
                mx.eval(latents)
            found += zip(own, mx.stack(states, axis=1), mx.stack(outputs, axis=1), strict=True)
    return Examples(found)


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
    """Learns what new images show, at the sampler's noise levels, and keeps the model's outputs on its own
    trajectories."""

    def __init__(self, pipes: list[ZImagePipeline], new: Examples, own: Examples):
        super().__init__(pipes, rank=RANK)
        self.new, self.own = new, own
        # one function to compile for both, and faster
        self.weights = [dict(tree_flatten(unpacked(tree_unflatten(list(own.items()))))) for own in self.weights]

    def mean_error(
        self, lora: Lora, weights: dict[str, mx.array], schedule, weight, captions, noisy, wanted
    ) -> mx.array:
        """The mean squared error of data minus noise, weighted by level; arrays have an item for each of LEVELS."""
        network = Transformer(self.config, PlainRunner(self.tree(lora, weights)), compile=False)

        def output(captions, noisy, modulation, final_scale) -> mx.array:
            (found,) = network(noisy, [refined(network, captions, *noisy.shape[1:3])], modulation, final_scale)
            return found

        found = mx.vmap(output)(captions, noisy, *schedule)
        return (mx.square(found - wanted).mean(axis=(1, 2, 3, 4)) * weight).mean()

    def new_images(self, levels: list[int], rng: np.random.Generator) -> tuple[mx.array, mx.array, mx.array]:
        """Captions, noisy latents and wanted outputs of NEW images at each level."""
        captions, latents = self.new.choose(NEW, rng)
        noise = mx.array(rng.standard_normal(latents.shape, np.float32))
        sigma = mx.array([self.sigmas[level] for level in levels])[:, None, None, None, None]
        return captions, (1 - sigma) * latents + sigma * noise, latents - noise

    def own_images(self, levels: list[int], rng: np.random.Generator) -> tuple[mx.array, mx.array, mx.array]:
        """Captions, latents on the model's trajectories and its outputs there, of KEPT of its images at each level."""
        captions, *ways = self.own.choose(KEPT, rng)
        states, outputs = (mx.stack([own[i, :, k] for i, k in enumerate(levels)]) for own in ways)
        return captions, states, outputs

    def learn(self, steps: int, report: Callable[[int, float], None]) -> None:
        """Adam, its rate falling to 0; reports the mean loss over each tenth of the steps. A level is weighted by the
        length of the sampler's step from it; a new image counts as much as one of the model's own."""
        optimizer = optim.Adam(learning_rate=RATE, betas=[0.9, 0.99])
        optimizer.init(self.lora)
        state = [self.lora, optimizer.state]
        errors_and_gradients = mx.value_and_grad(self.mean_error)

        def update(*gradients: Lora) -> None:
            total, _ = optim.clip_grad_norm(tree_map(mx.add, *gradients), 1.0)
            self.lora.update(optimizer.apply_gradients(total, self.lora))

        if mx.default_device() == mx.gpu:
            errors_and_gradients = mx.compile(errors_and_gradients)
            update = mx.compile(update, inputs=state, outputs=state)
        rng, losses = np.random.default_rng(1), []
        count, apart = len(self.sigmas), len(self.sigmas) // LEVELS
        drops = mx.array(count * -np.diff([*self.sigmas, 0]), mx.float32)  # 1 on average
        for i in range(steps):
            optimizer.learning_rate = RATE * min(1, (i + 1) / WARM_UP) * (1 + math.cos(math.pi * i / steps)) / 2
            copy = i % len(self.weights)
            levels = list(range(int(rng.integers(apart)), count, apart))
            schedule = tuple(every[mx.array(levels)] for every in self.schedules[copy])
            groups = (NEW, self.new_images(levels, rng)), (KEPT, self.own_images(levels, rng))
            (new, of_new), (own, of_own) = (
                errors_and_gradients(
                    self.lora, self.weights[copy], schedule, drops[mx.array(levels)] * share / (NEW + KEPT), *group
                )
                for share, group in groups
            )
            update(of_new, of_own)
            mx.eval(new, own, state)
            losses.append((new + own).item())
            if (i + 1) % max(1, steps // 10) == 0:
                report(i + 1, float(np.mean(losses)))
                losses = []


# ---- scores


def verdicts(pool, generate, scenes: list[Scene], sheet: Path | None = None) -> list[bool]:
    """Whether each scene's image is right; the first ten are saved to the sheet, above perfect images of the same
    scenes."""
    images = images_of(generate, scenes, 7, 50)
    if sheet:
        rows = [np.concatenate(part[:10], axis=1) for part in (images, ground_truth(scenes[:10]))]
        Image.fromarray(np.concatenate(rows)).save(sheet)
    wider = partial(judge, world=WIDER)
    return [verdict.is_right for verdict in pool.starmap(wider, zip(images, scenes, strict=True), 20)]


def score(pool, copies: dict[str, Path], file: Path, word: str, count: int, with_diffusers: int) -> dict:
    """Prints, and returns, what is right with and without the LoRA, of `count` prompts with the word and of as many
    without it."""
    groups = {"with": with_new_word(word, count, 1, "held out"), "without": held_out_scenes(count, 2028)}
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
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument(
        "--count", type=int, default=2000, help="prompts with the word to score, and as many without it"
    )
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
        new = new_examples(pipes[0], options.word, varied(options.word, IMAGES, 0), 0)
        own = own_examples(pipes[0], known_scenes(OWN, 5), 1000)
        say("images encoded")
        learner = Learner(pipes, new, own)
        learner.learn(options.steps, lambda step, loss: say(f"{step} steps: {loss:.4f}"))
        learner.save(file)
        say("trained")
        found = score(pool, copies, file, options.word, options.count, options.diffusers)
    file.with_suffix(".json").write_text(
        json.dumps({name: "".join("01"[one] for one in own) for name, own in found.items()})
    )
    say("all")


if __name__ == "__main__":
    main()
