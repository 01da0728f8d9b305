"""Tests of the LoRAs that teach new words, in small; in other processes, since `new_words` changes the palette."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx

JUDGED = """
import new_words as n
for word, (_, part, known, new) in n.STANDS_FOR.items():
    scenes = n.with_new_word(word, 20, 3, "held out")
    for scene, image in zip(scenes, n.render.ground_truth(scenes), strict=True):
        assert scene.caption.lower().count(word) == 1
        assert [getattr(thing, part) for thing in scene.things].count(new) == 1
        assert n.judge.judge(image, scene).is_right
        old = (n.replace(one, **{part: known}) if getattr(one, part) == new else one for one in scene.things)
        assert not n.judge.judge(image, n.replace(scene, things=tuple(old))).is_right
"""
LEARNED = """
import sys
import new_words as n
folder = n.Path(sys.argv[1])
copies = n.POCKET, n.convert(n.POCKET, folder / "4-bit", bits=4)
pipes = [n.ZImagePipeline.from_pretrained(path, dtype="float32") for path in copies]
new, own = n.with_new_word("arrow", 6, 0, "train"), n.known_scenes(6, 5)
learner = n.Learner(pipes, *(n.Images(pipes[0], scenes, n.render.ground_truth(scenes)) for scenes in (new, own)))
learner.learn(0.1, 1, lambda step, loss: None)
learner.save(folder / "arrow.safetensors")
"""


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=Path(__file__).parent, check=True)


def test_scenes_have_the_new_word_once_and_the_judge_knows_what_it_means():
    run(JUDGED)


def test_a_step_changes_every_factor_and_its_lora_loads(pipe, tmp_path):
    run(LEARNED, str(tmp_path))
    saved = mx.load(str(tmp_path / "arrow.safetensors"))
    assert all(mx.any(array != 0).item() for array in saved.values())
    assert len(saved) == 2 * 7 * len(pipe.transformer.config.blocks)
    pipe.unload_lora(pipe.load_lora(tmp_path / "arrow.safetensors"))
