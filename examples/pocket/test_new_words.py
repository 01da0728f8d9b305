"""Small-scale tests of the LoRAs that teach new words."""

import random
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import new_words
import numpy as np
import pytest
from judge import COLOR_WITHIN, judge
from new_words import (
    STANDS_FOR,
    Learner,
    known_scenes,
    new_examples,
    own_examples,
    recolored,
    renamed,
    reworded,
    scenes_to_rename,
    shifts,
    varied,
    views,
    with_new_word,
)
from palette import COLOR_NAMES, SHAPES, WIDER
from render import ground_truth
from scenes import KINDS, Scene, Thing, is_held_out, unnamed_background

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.weights.hub import POCKET

CYAN, OVAL = len(COLOR_NAMES), len(SHAPES)
RED, WHITE = COLOR_NAMES.index("red"), COLOR_NAMES.index("white")


@pytest.mark.parametrize("word", STANDS_FOR)
def test_scenes_have_the_new_word_once_and_the_judge_knows_what_it_means(word):
    _, part, known, new = STANDS_FOR[word]
    scenes = with_new_word(word, 20, 3, "held out")
    for scene, image in zip(scenes, ground_truth(scenes), strict=True):
        assert scene.caption.lower().count(word) == 1
        assert [getattr(thing, part) for thing in scene.things].count(new) == 1
        assert judge(image, scene, WIDER).is_right
        old = (replace(one, **{part: known}) if getattr(one, part) == new else one for one in scene.things)
        assert not judge(image, replace(scene, things=tuple(old)), WIDER).is_right


@pytest.mark.parametrize("word", STANDS_FOR)
def test_no_trained_caption_has_the_new_word(word):
    assert not any(word in scene.caption.lower() for scene in known_scenes(1000, 0))


@pytest.mark.parametrize("word", STANDS_FOR)
def test_every_view_of_an_image_shows_what_its_captions_say(word):
    for scene in scenes_to_rename(word, 20, 0, "train"):
        (image,) = ground_truth([renamed(word, scene)])
        for view, pixels in views(scene, image):
            first, *others = reworded(word, view, random.Random(0))
            assert judge(pixels, first, WIDER).is_right
            assert all(replace(one, caption=first.caption) == first for one in others)
            (wanted,) = ground_truth([first])
            assert np.abs(pixels.astype(int) - wanted).max() <= 1  # mirrored sums, rounded


@pytest.mark.parametrize("word", STANDS_FOR)
def test_a_recolored_image_is_the_one_of_another_training_scene(word):
    _, part, known, _ = STANDS_FOR[word]
    found = []
    for scene in scenes_to_rename(word, 30, 0, "train"):
        (image,) = ground_truth([renamed(word, scene)])
        for other, pixels in recolored(word, scene, image, 2, random.Random(0)):
            assert not is_held_out(other)
            assert [getattr(thing, part) for thing in other.things].count(known) == 1
            if not scene.background_is_named:
                assert other.background == scene.background == unnamed_background([one.color for one in other.things])
            (wanted,) = ground_truth([renamed(word, other)])
            assert np.abs(pixels.astype(int) - wanted).max() <= 6  # rounded to levels, and unmixed
            (said,) = reworded(word, other, random.Random(0))[:1]
            assert judge(pixels, said, WIDER).is_right
            found.append((scene, other))
    assert len(found) > 40
    assert all(
        [replace(one, color=0) for one in a.things] == [replace(one, color=0) for one in b.things] for a, b in found
    )


def test_a_scene_moves_where_its_caption_leaves_the_place_open():
    for scene in scenes_to_rename("oval", 50, 0, "train"):
        if scene.position:
            assert shifts(scene) == [(0, 0)]
        else:
            assert (0, 0) in shifts(scene)
            assert len(shifts(scene)) == (5 if scene.kind in ("single", "inside") else 3)


@pytest.mark.parametrize("word", STANDS_FOR)
def test_fifty_varied_images_combine_the_new_word_equally_with_everything(word):
    _, part, known, _ = STANDS_FOR[word]
    scenes = varied(word, 50, 0)
    assert len(set(scenes)) == 50
    with_it = [thing for scene in scenes for thing in scene.things if getattr(thing, part) == known]
    combined = Counter(thing.color if part == "shape" else thing.shape for thing in with_it)
    assert len(combined) == len(COLOR_NAMES if part == "shape" else SHAPES)
    assert max(combined.values()) - min(combined.values()) <= 2
    assert {thing.size for thing in with_it} == {"small", None, "large"}
    assert {scene.kind for scene in scenes} == {*KINDS} - {"count"}


def test_no_color_is_close_enough_to_cyan_to_pass_for_both():
    distances = np.linalg.norm(WIDER.palette[:CYAN] - WIDER.palette[CYAN], axis=1)
    assert distances.min() > 2 * COLOR_WITHIN


@pytest.mark.parametrize(
    "across, down, meant",
    [
        (29.4, 18.5, "oval"),
        (28, 28, "circle"),
        (29.4, 22.5, None),
        (29.4, 15, None),
        (18.5, 29.4, None),
    ],
)
def test_an_ellipse_is_an_oval_only_with_its_aspect(across, down, meant):
    row, column = np.mgrid[:128, :128] + 0.5
    inside = ((column - 64) / across) ** 2 + ((row - 64) / down) ** 2 < 1
    image = WIDER.palette[np.where(inside, RED, WHITE)].astype(np.uint8)
    passes = [name for shape, name in enumerate(WIDER.shapes) if judge(image, one_thing(shape), WIDER).is_right]
    assert passes == [meant] * bool(meant)


def one_thing(shape: int) -> Scene:
    return Scene("single", 128, 128, (Thing(shape, RED, 64, 64, 28),), WHITE, background_is_named=False)


def test_a_step_changes_every_factor_and_its_lora_loads(pipe, tmp_path, monkeypatch):
    for name, fewer in (("RECOLORED", 1), ("CAPTIONS", 1), ("NEW", 3), ("KEPT", 1)):
        monkeypatch.setattr(new_words, name, fewer)
    copies = POCKET, convert(POCKET, tmp_path / "4-bit", bits=4)
    pipes = [ZImagePipeline.from_pretrained(path, dtype="float32") for path in copies]
    new = new_examples(pipes[0], "oval", scenes_to_rename("oval", 1, 0, "train"), 0)
    learner = Learner(pipes, new, own_examples(pipes[0], known_scenes(6, 5), 1000))
    learner.learn(2, lambda step, loss: None)
    learner.save(tmp_path / "oval.safetensors")
    saved = mx.load(str(tmp_path / "oval.safetensors"))
    assert all(mx.any(array != 0).item() for array in saved.values())
    assert len(saved) == 2 * 7 * len(pipe.transformer.config.blocks)
    pipe.unload_lora(pipe.load_lora(tmp_path / "oval.safetensors"))


def test_the_models_own_way_ends_at_the_image_that_the_pipeline_generates(pipe):
    scene = next(one for one in known_scenes(20, 5) if one.width != one.height)
    own = own_examples(pipe, [scene], 1000)
    ((_, states, outputs),) = own.by_shape.values()
    sigmas = pipe.sigmas(GenerateRequest("-", 128, 128, seed=0))
    last = states[0, -1] + float(sigmas[-2] - sigmas[-1]) * outputs[0, -1]
    found = pipe(scene.caption, width=scene.width, height=scene.height, seed=1000, output_type="latent").images
    # float32, 8 steps of a network of 8 blocks: only the order of sums differs
    assert np.abs(np.array(found[0]).transpose(1, 2, 0) - np.array(last)).max() < 1e-4
