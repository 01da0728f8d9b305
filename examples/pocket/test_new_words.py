"""Tests of the LoRAs that teach new words, in small."""

from dataclasses import replace

import mlx.core as mx
import pytest
from judge import judge
from new_words import STANDS_FOR, Images, Learner, known_scenes, with_new_word
from palette import WIDER
from render import ground_truth

from mlx_zimage import ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.weights.hub import POCKET


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


def test_a_step_changes_every_factor_and_its_lora_loads(pipe, tmp_path):
    copies = POCKET, convert(POCKET, tmp_path / "4-bit", bits=4)
    pipes = [ZImagePipeline.from_pretrained(path, dtype="float32") for path in copies]
    new, own = with_new_word("arrow", 6, 0, "train"), known_scenes(6, 5)
    learner = Learner(pipes, *(Images(pipes[0], scenes, ground_truth(scenes)) for scenes in (new, own)))
    learner.learn(0.1, 1, lambda step, loss: None)
    learner.save(tmp_path / "arrow.safetensors")
    saved = mx.load(str(tmp_path / "arrow.safetensors"))
    assert all(mx.any(array != 0).item() for array in saved.values())
    assert len(saved) == 2 * 7 * len(pipe.transformer.config.blocks)
    pipe.unload_lora(pipe.load_lora(tmp_path / "arrow.safetensors"))
