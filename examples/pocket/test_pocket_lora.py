"""Small-scale tests of the LoRA that swaps two colours: python -m pytest examples/pocket/test_pocket_lora.py"""

import mlx.core as mx
import numpy as np
import pytest
from lora import SWAP, Trainer, examples, generate_many, interval, scored_scenes, swapped, training_scenes
from render import ground_truth

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.weights.hub import POCKET


@pytest.fixture(scope="module")
def pipes(pipe, tmp_path_factory) -> list[ZImagePipeline]:
    """The model in float32 and in 4 bits."""
    packed = convert(POCKET, tmp_path_factory.mktemp("packed") / "4-bit", bits=4)
    return [pipe, ZImagePipeline.from_pretrained(packed, dtype="float32")]


@pytest.fixture(scope="module")
def trained(pipes) -> tuple[Trainer, list[list[float]]]:
    """A trainer after a few steps, and each copy's loss on the same noisy examples, before and after."""
    found, trainer = [examples(pipe, training_scenes(12, seed=3)) for pipe in pipes], Trainer(pipes)

    def losses() -> list[float]:
        fixed = [trainer.groups(own[0], 2, np.random.default_rng(5)) for own in found]
        return [trainer.loss(copy, trainer.lora, *groups).item() for copy, groups in enumerate(fixed)]

    before = losses()
    trainer.train(found, 8, 1, lambda step, loss: None)
    return trainer, [before, losses()]


def test_a_swapped_scene_has_the_same_caption_and_swaps_back():
    for scene in scored_scenes(20, seed=1):
        assert swapped(scene).caption == scene.caption and swapped(scene) != scene
        assert swapped(swapped(scene)) == scene
        assert {scene.background, *(thing.color for thing in scene.things)} & {*SWAP}


def test_half_of_the_training_scenes_have_a_colour_that_is_swapped():
    scenes = training_scenes(20, seed=1)
    assert sum(swapped(scene) != scene for scene in scenes) >= 10
    assert any((a != b).any() for a, b in zip(ground_truth(scenes), ground_truth(map(swapped, scenes)), strict=True))


def test_the_loss_falls(trained):
    _, losses = trained
    for before, after in zip(*losses, strict=True):
        assert after < 0.98 * before


@pytest.mark.parametrize("copy", [0, 1], ids=["float32", "4 bits"])
def test_what_is_saved_acts_as_what_was_trained(pipes, trained, tmp_path, copy):
    trainer, _ = trained
    trainer.save(tmp_path / "swap.safetensors")
    rounded = {name: array.astype(mx.bfloat16).astype(mx.float32) for name, array in trainer.lora.items()}
    groups = trainer.groups(examples(pipes[copy], training_scenes(4, seed=4))[0], 1, np.random.default_rng(5))
    use = ZImagePipeline.from_pretrained(pipes[copy].checkpoint.folder, dtype="float32")
    model = trainer.loss_of(use.transformer, copy, *groups).item()
    use.load_lora(tmp_path / "swap.safetensors")
    use.networks.set_loras(use.complete(GenerateRequest("-", seed=0)).lora_strengths)
    found = trainer.loss_of(use.transformer, copy, *groups).item()
    # float32 sums in another order
    assert found == pytest.approx(trainer.loss(copy, rounded, *groups).item(), rel=1e-5)
    assert found != pytest.approx(model, rel=1e-3)


def test_many_prompts_at_once_give_the_images_of_one_at_a_time(pipe):
    prompts, seeds = ["a red circle", "a small blue star on the left, simple flat shapes, clean edges"], [3, 4]
    together = generate_many(pipe)(prompts, 64, 48, seeds)
    for prompt, seed, found in zip(prompts, seeds, together, strict=True):
        call = {"width": 64, "height": 48, "seed": seed, "output_type": "np"}
        alone = (pipe(prompt, **call).images[0] * 255).round().astype(np.uint8)
        assert np.abs(found.astype(int) - alone).max() <= 1  # rounding to bytes


def test_a_paired_difference_of_nothing_is_0():
    assert interval([True, False, True], [True, False, True]) == (0, 0)
    mean, half = interval([True] * 100, [False] * 10 + [True] * 90)
    assert mean == -10 and half == pytest.approx(5.9, abs=0.1)
