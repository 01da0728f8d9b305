"""Small-scale tests of the ControlNet for outlines: python -m pytest examples/pocket/test_pocket_control.py"""

import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from control import Trainer, as_bytes, as_image, covered, examples, masks, moved, outlined_scenes, outlines, overlap
from PIL import Image
from render import ground_truth

from mlx_zimage.weights.controlnets import open_controlnet


@pytest.fixture(scope="module")
def found(pipe):
    return examples(pipe, outlined_scenes(2, seed=3), moves=2, jobs=1)


def test_captions_say_neither_place_nor_size():
    rng = random.Random(0)
    for scene in outlined_scenes(20, seed=1):
        assert scene.position is None and all(thing.size is None for thing in scene.things)
        assert moved(rng, scene).caption == scene.caption and moved(rng, scene) != scene


def test_a_perfect_image_overlaps_its_outline_and_another_does_not():
    scenes = outlined_scenes(8, seed=2)
    images, inside = ground_truth(scenes), covered(scenes)
    assert np.mean([overlap(*pair) for pair in zip(images, inside, strict=True)]) > 0.97
    assert np.mean([overlap(image, inside[i - 1]) for i, image in enumerate(images)]) < 0.5
    lines = outlines(scenes)
    assert 0 < lines.mean() < 0.1 and as_image(lines).shape == (8, 128, 128, 3)
    assert {*masks(3, seed=0).ravel()} == {0, 1}


def test_a_new_controlnet_changes_nothing_and_training_changes_the_loss(pipe, found):
    trainer, own = Trainer(pipe), found[0]
    captions, latents, control, noise = trainer.batch(own, 2)
    level = trainer.levels[3]
    new = trainer.loss(trainer.weights, level, captions, latents, control, noise)
    blank = trainer.loss(trainer.weights, level, captions, latents, mx.zeros_like(control), noise)
    assert new.item() == blank.item()
    trainer.train(found, 1000, 2, lambda step, loss: None, most=2)
    assert trainer.loss(trainer.weights, level, captions, latents, control, noise).item() != new.item()


def test_what_is_saved_is_what_was_trained(pipe, found, tmp_path):
    trainer = Trainer(pipe)
    trainer.train(found, 1000, 1, lambda step, loss: None, most=1)
    trainer.save(tmp_path / "outlines")
    opened = open_controlnet(tmp_path / "outlines", transformer=pipe.transformer.config).component
    for block in opened.config.blocks:
        stored = opened.read(block, mx.float32)()
        for name in ("to_q", "to_out"):
            layer = stored["attention"][name]
            array = layer[0]["weight"] if name == "to_out" else layer["weight"]
            key = f"{block}.attention.{name}{'.0' if name == 'to_out' else ''}.weight"
            assert mx.array_equal(array, trainer.weights[key].astype(mx.bfloat16).astype(mx.float32))
    assert replace(opened.config, norm_eps=1e-5) == trainer.net.config


def test_pockets_own_controlnet_follows_outlines_it_has_not_seen(pipe):
    pipe.load_controlnet("pocket")
    scenes = outlined_scenes(5, seed=99, split="held out")
    lines = [Image.fromarray(as_bytes(line)) for line in outlines(scenes)]
    found: dict[float, list[float]] = {1.0: [], 0.0: []}
    for scale, overlaps in found.items():
        for scene, line, inside in zip(scenes, lines, covered(scenes), strict=True):
            call = {"control_image": line, "controlnet_conditioning_scale": scale, "seed": 5}
            overlaps.append(overlap(np.asarray(pipe(scene.caption, **call).images[0]), inside))
    assert np.mean(found[1.0]) > 0.8 and np.mean(found[0.0]) < 0.5  # README.md has the means of 200
