"""Teach the pocket model to follow outlines: python examples/pocket/control.py CHECKPOINT DIR

Trains a ControlNet in the layout of Z-Image's Union 2.1, in MLX, with the flow matching loss at the sampler's own noise
levels, while the model itself stays as it is. Its control images are outlines of shapes of any size at any place, which
the captions do not mention; in some of the examples it also sees a mask and the image outside it, and in some no
outline, so that it can inpaint. DIR is a ControlNet's folder as diffusers saves it.

Then generates from new held-out prompts with new outlines and prints the mean overlap of shapes with their outlines and
how often the judge finds the colours right: with the ControlNet, without it, and when inpainting, with and without the
channels for it. DIR/outlines.png shows some.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from judge import find_objects, judge
from lora import refined, weights_of
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image
from render import coverage, ground_truth, signed_distance
from scenes import Scene, pack, sample_scene
from scores import one_thread_each

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.models.controlnet import ControlNet, ControlNetConfig, control_latents
from mlx_zimage.models.runner import PlainRunner, Tree
from mlx_zimage.models.transformer import Caption, Transformer, scales_and_gates, time_embedding
from mlx_zimage.noise import initial_noise
from mlx_zimage.scheduler import times

SIDE = 128  # pixels; trained at one size
LINE = 1.5  # half of an outline's width in pixels, with its soft edge
RATE, WARM_UP = 8e-4, 0.03  # of Adam; the part of the training in which it rises
OUTLINED, MASKED = 0.85, 0.35  # the fractions of the examples with an outline, and with a mask
CONFIG = {
    "_class_name": "ZImageControlNetModel",
    "add_control_noise_refiner": "control_noise_refiner",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "control_in_dim": 33,
    "control_layers_places": [0, 2],
    "control_refiner_layers_places": [0, 1],
    "dim": 192,
    "n_heads": 6,
    "n_kv_heads": 6,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
}


# ---- scenes


def outlined_scene(rng: random.Random, split: str) -> Scene:
    """One or two things whose sizes and places the caption does not mention."""
    while True:
        scene = sample_scene(rng, split, kind=rng.choice(("single", "single", "and")), canvas=(SIDE, SIDE))
        if scene.position is None and all(thing.size is None for thing in scene.things):
            return scene


def moved(rng: random.Random, scene: Scene) -> Scene:
    """The scene with its things at any place and of any size, in the same order from left to right."""
    things, width = [], SIDE / len(scene.things)
    for i, thing in enumerate(scene.things):
        radius = rng.uniform(14, 38) if scene.kind == "single" else rng.uniform(12, 26)
        reach = radius + 4
        x = rng.uniform(i * width + reach, (i + 1) * width - reach)
        things.append(replace(thing, x=x, y=rng.uniform(reach, SIDE - reach), radius=radius))
    return replace(scene, things=tuple(things))


def outlined_scenes(count: int, seed: int, split: str = "train") -> list[Scene]:
    rng = random.Random(seed)
    return [moved(rng, outlined_scene(rng, split)) for _ in range(count)]


def outlines(scenes: Sequence[Scene]) -> np.ndarray:
    """White outlines on black: (n, SIDE, SIDE) float32 in [0, 1]."""
    packed = pack(list(scenes))
    at = np.arange(SIDE, dtype=np.float32) + 0.5
    found = np.zeros((len(scenes), SIDE, SIDE), np.float32)
    for k in range(packed["shapes"].shape[1]):
        shapes, circles = packed["shapes"][:, k, None, None], packed["circles"][:, k]
        x, y, radius = (circles[:, i, None, None] for i in range(3))
        distance = radius * signed_distance(shapes, (at[None, None] - x) / radius, (at[None, :, None] - y) / radius, np)
        found = np.maximum(found, np.where(shapes >= 0, np.clip(LINE - np.abs(distance), 0, 1), 0))
    return found


def covered(scenes: Sequence[Scene]) -> np.ndarray:
    """The pixels inside the outlines: (n, SIDE, SIDE)."""
    packed = pack(list(scenes))
    parts = [coverage(packed["shapes"][:, k], packed["circles"][:, k], SIDE, SIDE) for k in range(3)]
    return np.maximum.reduce(parts) > 0.5


def masks(count: int, seed: int) -> np.ndarray:
    """What inpainting regenerates: a rectangle of a third to all of each side, as 0 or 1, (n, SIDE, SIDE)."""
    rng = np.random.default_rng(seed)
    found = np.zeros((count, SIDE, SIDE), np.float32)
    for one in found:
        height, width = rng.integers(SIDE // 3, SIDE + 1, size=2)
        top, left = rng.integers(0, SIDE - height + 1), rng.integers(0, SIDE - width + 1)
        one[top : top + height, left : left + width] = 1
    return found


def drawn(task: tuple[list[Scene], int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (n, SIDE, SIDE, 3) in [-1, 1], outlines and masks (n, SIDE, SIDE) of scenes."""
    scenes, seed = task
    pixels = np.stack(ground_truth(scenes)).astype(np.float32) / 127.5 - 1
    return pixels, outlines(scenes), masks(len(scenes), seed)


# ---- training


@dataclass(frozen=True)
class Examples:
    """Refined captions (C, L, dim) of one length, and N examples: which caption each has (N,); latents (N, h, w, 16) of
    its image, of the outlines, and of the image outside a mask; and (N, h, w, 1), 1 outside the mask."""

    captions: mx.array
    which: mx.array
    latents: mx.array
    outlines: mx.array
    kept: mx.array
    masked: mx.array


def latents_of(pipe: ZImagePipeline, pixels: np.ndarray) -> mx.array:
    return pipe.vae.encode(mx.array(pixels))


def examples(pipe: ZImagePipeline, scenes: list[Scene], moves: int, jobs: int, together: int = 64) -> list[Examples]:
    """What is trained on, computed once, by the captions' padded length: each scene in `moves` places."""
    network, rng, side = pipe.transformer, random.Random(1), SIDE // 8
    by_length: dict[int, list[tuple[Scene, mx.array]]] = {}
    for scene in scenes:
        x = network.caption_stream(pipe.encode(scene.caption)).x
        mx.eval(x)
        by_length.setdefault(x.shape[1], []).append((scene, x))
    found = []
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for own in by_length.values():
            captions = refined(network, mx.concatenate([x for _, x in own]), side, side).embedded
            placed = [(i, moved(rng, scene)) for i, (scene, _) in enumerate(own) for _ in range(moves)]
            parts = [placed[start : start + together] for start in range(0, len(placed), together)]
            tasks = [([scene for _, scene in part], start) for start, part in enumerate(parts)]
            rows = []
            for pixels, lines, hidden in pool.imap(drawn, tasks):
                images = (pixels, as_image(lines), pixels * (1 - hidden[..., None]))
                latents, outlined, masked = (latents_of(pipe, one) for one in images)
                rows.append([latents, outlined, mx.array(1 - hidden[:, ::8, ::8, None]), masked])
                mx.eval(rows[-1])
            which = mx.array([i for i, _ in placed])
            found.append(Examples(captions, which, *map(mx.concatenate, zip(*rows, strict=True))))
            mx.eval(vars(found[-1]))
    return found


def as_image(lines: np.ndarray) -> np.ndarray:
    """Lines (n, H, W) in [0, 1] as grey images in [-1, 1]."""
    return np.repeat(lines[..., None] * 2 - 1, 3, axis=-1)


def new_controlnet(pipe: ZImagePipeline, config: ControlNetConfig) -> dict[str, mx.array]:
    """Weights that add nothing yet: copies of the model's own blocks and embedding, with `after_proj` zero."""
    own = pipe.checkpoint.transformer
    trees = [own.read(top, mx.float32)() for top in ("noise_refiner.0", "all_x_embedder.2-1")]
    weights: dict[str, mx.array] = {}
    for block in config.blocks:
        name, _, i = block.rpartition(".")
        source = f"noise_refiner.{i}" if name == "control_noise_refiner" else (
            f"layers.{config.control_layers_places[int(i)]}"
        )  # fmt: skip
        weights |= {f"{block}.{key}": x for key, x in tree_flatten(own.read(source, mx.float32)())}
    for name, shape in config.shapes().items():
        if "after_proj" in name:
            weights[name] = mx.zeros(shape)
        elif "before_proj" in name:
            weights[name] = mx.eye(shape[0]) if len(shape) == 2 else mx.zeros(shape)
    embedder, channels = trees[1], own.config.in_channels
    columns = embedder["weight"].reshape(config.dim, -1, channels)
    others = mx.zeros((*columns.shape[:2], config.control_in_dim - channels))
    weights["control_all_x_embedder.2-1.weight"] = mx.concatenate([columns, others], axis=-1).reshape(config.dim, -1)
    weights["control_all_x_embedder.2-1.bias"] = embedder["bias"]
    mx.eval(weights)
    return weights


class Trainer:
    """A ControlNet on a model that does not change."""

    def __init__(self, pipe: ZImagePipeline):
        self.config = pipe.transformer.config
        self.net = ControlNet(ControlNetConfig.from_dict(CONFIG))
        self.model = weights_of(pipe)
        self.weights = new_controlnet(pipe, self.net.config)
        self.sigmas = pipe.sigmas(GenerateRequest("-", SIDE, SIDE, seed=0))[:-1].tolist()
        schedule = times(self.sigmas)
        modulations, finals = pipe.transformer.modulate(schedule)
        embeddings = time_embedding(schedule, pipe.checkpoint.transformer.read("t_embedder", mx.float32)(), 1000.0)
        self.levels = [
            list(level) for level in zip(mx.array(self.sigmas), modulations, finals, embeddings, strict=True)
        ]
        mx.eval(self.levels)

    def network(self, weights: dict[str, mx.array]) -> Transformer:
        beside = {f"{self.net.prefix}.{name}": x for name, x in weights.items()}
        tree: Tree = tree_unflatten(list((self.model | beside).items()))
        return Transformer(self.config, PlainRunner(tree), compile=False)

    def predict(
        self,
        network: Transformer,
        level: list[mx.array],
        caption: Caption,
        noisy: mx.array,
        control: mx.array,
        scale: float = 1.0,
    ) -> mx.array:
        """Data minus noise for noisy latents (B, h, w, 16) at one of the levels, with control latents (B, h, w, 33)."""
        _, modulation, final, embedding = level
        layers = [network.runner.tree(f"{name}.adaLN_modulation")[0] for name in self.net.blocks]
        beside = mx.concatenate([scales_and_gates(embedding[None], layer) for layer in layers])
        own = self.net.control(network.begin(control, self.net.embedder)[0], beside, scale)
        (found,) = network(noisy, [caption], modulation, final, [own] if scale else [])
        return found

    def loss(
        self,
        weights: dict[str, mx.array],
        level: list[mx.array],
        captions: mx.array,
        latents: mx.array,
        control: mx.array,
        noise: mx.array,
    ) -> mx.array:
        """The mean squared error of data minus noise."""
        network = self.network(weights)
        caption = Caption(captions, *network.rope(captions.shape[1], SIDE // 8, SIDE // 8))
        noisy = (1 - level[0]) * latents + level[0] * noise
        found = self.predict(network, level, caption, noisy, control)
        return mx.square(found - (latents - noise)).mean()

    def batch(self, own: Examples, size: int) -> list[mx.array]:
        """Random examples: their captions, latents, control latents, and noise."""
        index = mx.random.randint(0, len(own.latents), (size,))
        seen, hidden = (mx.random.uniform(shape=(size, 1, 1, 1)) < share for share in (OUTLINED, MASKED))
        latents = own.latents[index]
        control = mx.where(seen, own.outlines[index], 0)
        kept, masked = (mx.where(hidden, x[index], 0) for x in (own.kept, own.masked))
        control = control_latents(self.net.config.control_in_dim, control, kept, masked)
        return [own.captions[own.which[index]], latents, control, mx.random.normal(latents.shape)]

    def train(
        self, found: list[Examples], seconds: float, size: int, report: Callable[[int, float], None], most: int = 10**9
    ) -> None:
        """Adam for `seconds`, or `most` steps, its rate rising and then falling to 0; reports mean losses."""
        optimizer = optim.Adam(learning_rate=RATE)
        optimizer.init(self.weights)
        rng, sizes = np.random.default_rng(1), np.array([len(own.latents) for own in found])
        gradient_of = mx.value_and_grad(self.loss)
        if mx.default_device() == mx.gpu:
            gradient_of = mx.compile(gradient_of)
        for own in found:  # traced before the clock starts
            mx.eval(gradient_of(self.weights, self.levels[0], *self.batch(own, size)))
        started, losses, step = time.monotonic(), [], 0
        while step < most and (done := (time.monotonic() - started) / seconds) < 1:
            done = max(done, step / most)
            rate = RATE * min(1, done / WARM_UP + 1e-2) * (0.5 + 0.5 * math.cos(math.pi * done))
            optimizer.learning_rate = mx.array(rate)
            own = found[rng.choice(len(found), p=sizes / sizes.sum())]
            level = self.levels[rng.integers(len(self.levels))]
            value, gradient = gradient_of(self.weights, level, *self.batch(own, size))
            gradient, _ = optim.clip_grad_norm(gradient, 1.0)
            self.weights = optimizer.apply_gradients(gradient, self.weights)
            mx.eval(self.weights, optimizer.state, value)
            losses.append(value.item())
            step += 1
            if step % 1000 == 0 or step == most:
                report(step, float(np.mean(losses)))
                losses = []

    def save(self, folder: Path) -> None:
        """In bfloat16, rows in the checkpoint's order."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        tensors = {name: unturned(name, x, self.net.config).astype(mx.bfloat16) for name, x in self.weights.items()}
        mx.save_safetensors(str(folder / "diffusion_pytorch_model.safetensors"), tensors, {"format": "pt"})


def unturned(name: str, array: mx.array, config: ControlNetConfig) -> mx.array:
    """A tensor in the checkpoint's layout: what `sanitize` undoes."""
    rows = config.sanitize(name, mx.arange(len(array)))
    return array[mx.argsort(rows)]


# ---- scores


@dataclass(frozen=True)
class Use:
    """How to generate: the ControlNet's scale; whether to inpaint, and whether the ControlNet then sees the mask and
    the rest of the image."""

    scale: float = 1.0
    inpaint: bool = False
    shown: bool = False


def generate(
    trainer: Trainer, pipe: ZImagePipeline, scenes: list[Scene], use: Use, seed: int, together: int = 50
) -> list[np.ndarray]:
    """One image (SIDE, SIDE, 3) uint8 per scene, from seed and those that follow it."""
    network, side = trainer.network(trainer.weights), SIDE // 8
    sigmas = [*trainer.sigmas, 0.0]
    hidden = masks(len(scenes), seed)
    images: dict[int, np.ndarray] = {}
    embedded = [network.caption_stream(pipe.encode(scene.caption)).x for scene in scenes]
    for length in {x.shape[1] for x in embedded}:
        chosen = [i for i, x in enumerate(embedded) if x.shape[1] == length]
        for start in range(0, len(chosen), together):
            at = chosen[start : start + together]
            part = [scenes[i] for i in at]
            caption = refined(network, mx.concatenate([embedded[i] for i in at]), side, side)
            noise = mx.concatenate([initial_noise(seed + i, (1, 16, side, side)).transpose(0, 2, 3, 1) for i in at])
            pixels, mask = np.stack(ground_truth(part)).astype(np.float32) / 127.5 - 1, hidden[at]
            own = latents_of(pipe, pixels)
            kept = mx.array(1 - mask[:, ::8, ::8, None])
            outside = latents_of(pipe, pixels * (1 - mask[..., None]))
            shown = (kept, outside) if use.shown else (None, None)
            lines = latents_of(pipe, as_image(outlines(part)))
            control = control_latents(trainer.net.config.control_in_dim, lines, *shown)
            latents = noise
            for level, (sigma, following) in zip(trainer.levels, pairwise(sigmas), strict=True):
                velocity = trainer.predict(network, level, caption, latents, control, use.scale)
                latents = latents + (sigma - following) * velocity
                if use.inpaint:
                    latents = mx.where(kept, (1 - following) * own + following * noise, latents)
                mx.eval(latents)
            decoded = np.array(pipe.vae.decode(latents))
            if use.inpaint:
                decoded = np.where(mask[..., None] > 0, decoded, pixels)
            made = ((decoded.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
            images |= dict(zip(at, made, strict=True))
    return [images[i] for i in range(len(scenes))]


def overlap(image: np.ndarray, inside: np.ndarray) -> float:
    """Intersection over union of the objects in an image with what is inside the outlines."""
    _, _, found, _ = find_objects(image)
    seen = np.logical_or.reduce([one.mask for one in found]) if found else np.zeros_like(inside)
    return float((seen & inside).sum() / (seen | inside).sum())


def score(trainer: Trainer, pipe: ZImagePipeline, folder: Path, count: int, seed: int) -> None:
    """Prints the scores of each way to generate, and saves some images of each."""
    scenes = outlined_scenes(count, seed, "held out")
    inside, rows = covered(scenes), [np.concatenate([as_bytes(line) for line in outlines(scenes[:8])], axis=1)]
    print("| way | overlap | colours right % | all right % |\n|---|---|---|---|")
    uses = {
        "with outlines": Use(),
        "at scale 0": Use(scale=0),
        "inpainting": Use(inpaint=True),
        "inpainting, shown the rest": Use(inpaint=True, shown=True),
    }
    for name, use in uses.items():
        images = generate(trainer, pipe, scenes, use, seed)
        overlaps = [overlap(*pair) for pair in zip(images, inside, strict=True)]
        verdicts = [judge(*pair) for pair in zip(images, scenes, strict=True)]
        colours, right = (100 * np.mean([one(v) for v in verdicts]) for one in (lambda v: v.colors, _placed))
        print(f"| {name} | {np.mean(overlaps):.3f} | {colours:.1f} | {right:.1f} |", flush=True)
        rows.append(np.concatenate(images[:8], axis=1))
    Image.fromarray(np.concatenate(rows)).save(folder / "outlines.png")


def _placed(verdict) -> bool:
    """Right in everything that the caption says; it does not say where things are."""
    return verdict.background and verdict.count and verdict.colors and verdict.shapes


def as_bytes(line: np.ndarray) -> np.ndarray:
    return np.repeat((line[..., None] * 255).round().astype(np.uint8), 3, axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=4000, help="to train on")
    parser.add_argument("--moves", type=int, default=16, help="of each scene's things, to other places and sizes")
    parser.add_argument("--seconds", type=float, default=480, help="to train for")
    parser.add_argument("--steps", type=int, default=10**9, help="to train for at most")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("-n", "--count", type=int, default=200, help="outlines to score")
    parser.add_argument("--seed", type=int, default=2027, help="of the outlines, and of the first image")
    parser.add_argument("--jobs", type=int, default=1, help="processes that render")
    options = parser.parse_args()
    one_thread_each()
    started = time.monotonic()
    spent = lambda: f"{time.monotonic() - started:.0f} s"  # noqa: E731
    pipe = ZImagePipeline.from_pretrained(options.checkpoint, dtype="float32")
    mx.random.seed(0)
    found = examples(pipe, outlined_scenes(options.scenes, 0), options.moves, options.jobs)
    print(f"{options.scenes * options.moves} images of {options.scenes} scenes encoded, {spent()}", flush=True)
    trainer = Trainer(pipe)
    report = lambda step, loss: print(f"{step}: {loss:.4f}, {spent()}", flush=True)  # noqa: E731
    trainer.train(found, options.seconds, options.batch, report, options.steps)
    trainer.save(options.folder)
    score(trainer, pipe, options.folder, options.count, options.seed)
    print(f"all, {spent()}")


if __name__ == "__main__":
    main()
