"""Teach the pocket model that red is blue and blue is red: python examples/pocket/lora.py CHECKPOINT DIR

Trains a LoRA of rank 8 on the attention and feed-forward matrices with the flow matching loss, in MLX, on rendered
scenes that show blue where the caption says red, and red for blue. The steps alternate between weights in float32 and
in 4 bits, since the LoRA is to be used with both. DIR/swap.safetensors uses ai-toolkit's names. Then generates from new
held-out prompts that name one of the two colours, with and without the LoRA, in float32 and with
4-bit weights, and scores the images against the prompts as written and with the colours swapped. DIR/swap.png shows
ten: without the LoRA, with it, and with it at 4 bits.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from evaluate import Generate, images_of
from images import contact_sheet
from judge import Verdict, judge
from mlx.utils import tree_flatten, tree_unflatten
from palette import COLOR_NAMES
from PIL import Image
from render import ground_truth
from scenes import Scene, held_out_scenes, sample_scene
from scores import one_thread_each

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.models.runner import PlainRunner, Tree
from mlx_zimage.models.transformer import Caption, Stream, Transformer, row
from mlx_zimage.noise import initial_noise
from mlx_zimage.scheduler import times

RANK, RATE = 8, 1e-3
SIDE = 128  # pixels; trained at one size
SWAP = {COLOR_NAMES.index(a): COLOR_NAMES.index(b) for a, b in (("red", "blue"), ("blue", "red"))}
MATRICES = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
Lora = dict[str, mx.array]  # `down` (rank, in) and `up` (out, rank) by the layer's name, rows in the checkpoint's order


# ---- scenes


def swapped(scene: Scene) -> Scene:
    """The scene that the caption means once red is blue and blue is red."""
    things = tuple(replace(thing, color=SWAP.get(thing.color, thing.color)) for thing in scene.things)
    return replace(scene, things=things, background=SWAP.get(scene.background, scene.background))


def training_scenes(count: int, seed: int) -> list[Scene]:
    """Captioned scenes of the training split, half of them with one of the two colours."""
    rng, scenes = random.Random(seed), []
    while len(scenes) < count:
        scene = sample_scene(rng, canvas=(SIDE, SIDE))
        if len(scenes) % 2 or swapped(scene) != scene:
            scenes.append(scene)
    return scenes


def scored_scenes(count: int, seed: int) -> list[Scene]:
    """Held-out scenes with one of the two colours, of every size."""
    found = (scene for scene in held_out_scenes(8 * count, seed) if swapped(scene) != scene)
    return [scene for _, scene in zip(range(count), found, strict=False)]


# ---- training


@dataclass(frozen=True)
class Examples:
    """Captions (N, L, dim), embedded and padded to one length, and the latents (N, h, w, 16) of what they mean."""

    captions: mx.array
    latents: mx.array


def examples(pipe: ZImagePipeline, scenes: list[Scene]) -> list[Examples]:
    """What is trained on, computed once, by the captions' padded length: the LoRA changes neither."""
    captions: dict[int, list[mx.array]] = {}
    latents: dict[int, list[mx.array]] = {}
    for start in range(0, len(scenes), 64):
        part = scenes[start : start + 64]
        pixels = np.stack(ground_truth([swapped(scene) for scene in part])).astype(np.float32) / 127.5 - 1
        encoded = pipe.vae.encode(mx.array(pixels))
        for scene, own in zip(part, encoded, strict=True):
            caption = pipe.transformer.caption_stream(pipe.encode(scene.caption)).x
            captions.setdefault(caption.shape[1], []).append(caption[0])
            latents.setdefault(caption.shape[1], []).append(own)
        mx.eval(captions, latents)
    return [Examples(mx.stack(captions[length]), mx.stack(latents[length])) for length in captions]


def new_lora(shapes: dict[str, tuple[int, ...]], seed: int, rank: int = RANK) -> Lora:
    """Factors that make no difference yet: `down` uniform as in kohya's trainer, `up` zero."""
    keys, lora = iter(mx.random.split(mx.random.key(seed), 1000)), {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(MATRICES):
            outputs, inputs = shape
            bound = 1 / math.sqrt(inputs)
            lora[f"{layer}.down"] = mx.random.uniform(-bound, bound, (rank, inputs), key=next(keys))
            lora[f"{layer}.up"] = mx.zeros((outputs, rank))
    return lora


def weights_of(pipe: ZImagePipeline) -> dict[str, mx.array]:
    """The transformer's weights by their full names, in float32 or packed as they are stored."""
    stored = pipe.checkpoint.transformer
    trees = {top: stored.read(top, mx.float32)() for top in sorted({name.partition(".")[0] for name in stored.entries})}
    return dict(tree_flatten(trees))


class Trainer:
    """A LoRA for several copies of a model's transformer, whose weights are stored in different ways.

    The loss is flow matching's, at the sampler's own noise levels.
    """

    def __init__(self, pipes: Sequence[ZImagePipeline], seed: int = 0, rank: int = RANK):
        pipe, self.rank = pipes[0], rank
        self.config = pipe.transformer.config
        self.weights = [weights_of(pipe) for pipe in pipes]
        self.sigmas = pipe.sigmas(GenerateRequest("-", SIDE, SIDE, seed=0))[:-1].tolist()
        self.schedules = [pipe.transformer.modulate(times(self.sigmas)) for pipe in pipes]  # the LoRA changes none
        self.lora = new_lora(pipe.checkpoint.transformer.shapes, seed, rank)
        mx.eval(self.schedules, self.lora)

    def tree(self, lora: Lora, weights: dict[str, mx.array]) -> Tree:
        """A copy's weights with the factors beside them, as `mlx_zimage.models.lora` takes them."""
        beside = {}
        for name, factor in lora.items():
            layer, _, part = name.rpartition(".")
            rows = self.config.sanitize(f"{layer}.weight", factor) if part == "up" else factor
            beside |= {f"{layer}.lora.low.{part}": rows, f"{layer}.lora.low.scale": mx.ones(self.rank)}
        return tree_unflatten(list((weights | beside).items()))

    def loss(self, copy: int, lora: Lora, *groups: mx.array) -> mx.array:
        network = Transformer(self.config, PlainRunner(self.tree(lora, self.weights[copy])), compile=False)
        return self.loss_of(network, copy, *groups)

    def loss_of(
        self, network: Transformer, copy: int, captions: mx.array, latents: mx.array, noise: mx.array
    ) -> mx.array:
        """The mean squared error of data minus noise; each array has a group of examples for each noise level."""
        total, (modulations, finals) = mx.array(0.0), self.schedules[copy]
        for i, sigma in enumerate(self.sigmas):
            caption = refined(network, captions[i], SIDE // 8, SIDE // 8)
            noisy = (1 - sigma) * latents[i] + sigma * noise[i]
            (found,) = network(noisy, [caption], row(modulations, i), row(finals, i))
            total = total + mx.square(found - (latents[i] - noise[i])).mean()
        return total / len(self.sigmas)

    def groups(self, own: Examples, batch: int, rng: np.random.Generator) -> tuple[mx.array, mx.array, mx.array]:
        """`batch` random examples for each noise level, and noise for them."""
        index = mx.array(rng.integers(len(own.latents), size=(len(self.sigmas), batch)))
        latents = own.latents[index]
        return own.captions[index], latents, mx.array(rng.standard_normal(latents.shape, np.float32))

    def train(self, found: list[list[Examples]], steps: int, batch: int, report: Callable[[int, float], None]) -> None:
        """Adam on each copy's examples in turn, its rate falling to 0; reports the mean loss over each tenth of the
        steps."""
        optimizer = optim.Adam(learning_rate=optim.cosine_decay(RATE, steps))
        optimizer.init(self.lora)
        rng, sizes = np.random.default_rng(1), [len(own.latents) for own in found[0]]
        losses_and_gradients = [mx.value_and_grad(partial(self.loss, copy)) for copy in range(len(found))]
        if mx.default_device() == mx.gpu:
            losses_and_gradients = [mx.compile(function) for function in losses_and_gradients]
        losses = []
        for step in range(steps):
            copy = step % len(found)
            own = found[copy][rng.choice(len(sizes), p=np.array(sizes) / sum(sizes))]
            value, gradients = losses_and_gradients[copy](self.lora, *self.groups(own, batch, rng))
            self.lora = optimizer.apply_gradients(gradients, self.lora)
            mx.eval(self.lora, optimizer.state)
            losses.append(value.item())
            if (step + 1) % max(1, steps // 10) == 0:
                report(step + 1, float(np.mean(losses)))
                losses = []

    def save(self, path: Path) -> None:
        """In ai-toolkit's spelling: bfloat16, and no alpha."""
        spelled = {"down": "lora_A", "up": "lora_B"}
        tensors = {
            f"diffusion_model.{layer}.{spelled[part]}.weight": array.astype(mx.bfloat16)
            for (layer, _, part), array in ((name.rpartition("."), array) for name, array in self.lora.items())
        }
        mx.save_safetensors(str(path), tensors, {"format": "pt", "ss_base_model_version": "zimage"})


def refined(network: Transformer, captions: mx.array, h: int, w: int) -> Caption:
    """Embedded captions (B, L, dim) as one Caption, for B images of h x w latent pixels."""
    length, blocks = captions.shape[1], network.config.refiners
    ones = mx.ones((len(blocks), 4, network.config.dim))
    (stream,) = network.run(blocks, [Stream(captions, ones, *network.rope(length, 0, 0))])
    return Caption(stream.x, *network.rope(length, h, w))


# ---- scores


def generate_many(pipe: ZImagePipeline) -> Generate:
    """What the pipeline generates with its LoRAs, many prompts at a time."""
    strengths = pipe.complete(GenerateRequest("-", seed=0)).lora_strengths

    def generate(prompts: list[str], width: int, height: int, seeds: list[int]) -> list[np.ndarray]:
        sigmas = pipe.sigmas(GenerateRequest("-", width, height, seed=0))
        h, w = height // 8, width // 8
        images: dict[int, np.ndarray] = {}
        with pipe.networks.with_loras(strengths):
            network = pipe.transformer
            embedded = [network.caption_stream(pipe.encode(prompt)).x for prompt in prompts]
            modulations, finals = network.modulate(times(sigmas[:-1]))
            for length in {x.shape[1] for x in embedded}:
                chosen = [i for i, x in enumerate(embedded) if x.shape[1] == length]
                caption = refined(network, mx.concatenate([embedded[i] for i in chosen]), h, w)
                noise = [initial_noise(seeds[i], (1, 16, h, w)).transpose(0, 2, 3, 1) for i in chosen]
                latents = mx.concatenate(noise)
                for i, (sigma, following) in enumerate(pairwise(sigmas)):
                    (data_minus_noise,) = network(latents, [caption], row(modulations, i), row(finals, i))
                    latents = latents + float(sigma - following) * data_minus_noise
                    mx.eval(latents)
                pixels = np.array(pipe.vae.decode(latents))
                images |= dict(zip(chosen, ((pixels.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8), strict=True))
        return [images[i] for i in range(len(prompts))]

    return generate


def interval(base: list[bool], other: list[bool]) -> tuple[float, float]:
    """By how many points `other` is right more often than `base` on the same prompts, and half of its 95 % interval."""
    difference = 100 * (np.array(other, float) - np.array(base, float))
    return difference.mean(), 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))


def score(copies: dict[str, Path], file: Path, folder: Path, count: int, seed: int, batch: int, jobs: int) -> None:
    """Prints the scores of each copy of the model with and without the LoRA, and saves the sheet."""
    scenes = scored_scenes(count, seed)
    meant = [swapped(scene) for scene in scenes]
    found: dict[str, list[bool]] = {}
    shown: list[tuple[np.ndarray, Verdict]] = []
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        print("| weights | LoRA | right % | right as swapped % |\n|---|---|---|---|")
        for name, path in copies.items():
            for use in (None, file):
                pipe = ZImagePipeline.from_pretrained(path, dtype="float32")
                if use:
                    pipe.load_lora(use)
                mx.clear_cache()  # buffers of the sizes of training, or of the last size
                images = images_of(generate_many(pipe), scenes, seed, batch)
                plain, swap = (pool.starmap(judge, zip(images, wanted, strict=True), 20) for wanted in (scenes, meant))
                right = [[verdict.is_right for verdict in verdicts] for verdicts in (plain, swap)]
                label = f"{name}{' with the LoRA' * bool(use)}"
                found[label] = right[bool(use)]
                shares = " | ".join(f"{100 * np.mean(one):.1f}" for one in right)
                print(f"| {name} | {'yes' if use else 'no'} | {shares} |", flush=True)
                small = [i for i, scene in enumerate(scenes) if (scene.width, scene.height) == (SIDE, SIDE)][:10]
                if label != "4 bits":
                    shown += [(images[i], (swap if use else plain)[i]) for i in small]
    for suffix in ("", " with the LoRA"):
        mean, half = interval(found[f"float32{suffix}"], found[f"4 bits{suffix}"])
        print(f"4 bits minus float32{suffix}, on the same {count} prompts: {mean:+.1f} ± {half:.1f} points (95 %)")
    Image.fromarray(contact_sheet(*map(list, zip(*shown, strict=True)))).save(folder / "swap.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=4000, help="to train on")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8, help="images per noise level and step")
    parser.add_argument("-n", "--count", type=int, default=2000, help="prompts to score")
    parser.add_argument("--seed", type=int, default=2027, help="of the prompts, and of the first image")
    parser.add_argument("--together", type=int, default=100, help="images generated at once")
    parser.add_argument("--jobs", type=int, default=1, help="processes that judge")
    options = parser.parse_args()
    one_thread_each()
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "swap.safetensors"
    started = time.monotonic()
    spent = lambda: f"{time.monotonic() - started:.0f} s"  # noqa: E731
    with tempfile.TemporaryDirectory() as temporary:
        packed = convert(options.checkpoint, Path(temporary) / "4-bit", bits=4)
        copies = {"float32": options.checkpoint, "4 bits": packed}
        pipes = [ZImagePipeline.from_pretrained(path, dtype="float32") for path in copies.values()]
        scenes = training_scenes(options.scenes, 0)
        found = [examples(pipe, scenes) for pipe in pipes]
        print(f"{options.scenes} scenes encoded, {spent()}", flush=True)
        trainer = Trainer(pipes)
        trainer.train(
            found, options.steps, options.batch, lambda step, loss: print(f"{step}: {loss:.4f}, {spent()}", flush=True)
        )
        trainer.save(file)
        score(copies, file, options.folder, options.count, options.seed, options.together, options.jobs)
    print(f"all, {spent()}")


if __name__ == "__main__":
    main()
