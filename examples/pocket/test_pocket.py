"""Of the pocket example itself: python -m pytest examples/pocket (the torch half skips without torch)."""

import random
from dataclasses import replace

import numpy as np
import pytest
from data import CANVASES, held_out_scenes, is_held_out, sample_scene
from evaluate import pictures_of
from judge import judge
from palette import PALETTE
from render import ground_truth

SCENES = held_out_scenes(120, seed=5)
PICTURES = ground_truth(SCENES)


def test_ground_truth_is_right():
    assert all(judge(picture, scene).is_right for picture, scene in zip(PICTURES, SCENES, strict=True))


def test_training_scenes_are_never_held_out():
    rng = random.Random(0)
    assert not any(is_held_out(sample_scene(rng)) for _ in range(2000))


def test_objects_lie_on_the_latent_grid():
    assert all(thing.x % 8 == 0 and thing.y % 8 == 0 for scene in SCENES for thing in scene.things)


@pytest.mark.parametrize("field", ["shape", "color"])
def test_another_shape_or_color_is_wrong(field):
    count = {"shape": 8, "color": 10}[field]
    for picture, scene in zip(PICTURES, SCENES, strict=True):
        first, *rest = scene.things
        asked = replace(scene, things=(replace(first, **{field: (getattr(first, field) + 1) % count}), *rest))
        assert not judge(picture, asked).is_right


def test_another_background_is_wrong():
    for picture, scene in zip(PICTURES, SCENES, strict=True):
        assert not judge(picture, replace(scene, background=(scene.background + 1) % 10)).background


def test_a_missing_object_is_wrong():
    for scene in SCENES:
        fewer = replace(scene, things=scene.things[:-1])
        assert not judge(ground_truth([fewer])[0], scene).is_right


def test_a_mirrored_picture_has_the_wrong_place():
    told = [
        (picture, scene) for picture, scene in zip(PICTURES, SCENES, strict=True) if scene.relation in ("left", "right")
    ]
    assert told and not any(judge(picture[:, ::-1], scene).place for picture, scene in told)


def test_swapped_sizes_are_wrong():
    other = {"small": "large", "large": "small"}
    for picture, scene in zip(PICTURES, SCENES, strict=True):
        if any(thing.size for thing in scene.things):
            things = tuple(replace(thing, size=other.get(thing.size)) for thing in scene.things)
            assert not judge(picture, replace(scene, things=things)).sizes


def test_a_smudge_is_an_object_too_much():
    for picture, scene in zip(PICTURES, SCENES, strict=True):
        smudged = picture.copy()
        smudged[4:12, 4:12] = PALETTE[(scene.background + 1) % 10]
        assert not judge(smudged, scene).is_right


def test_a_picture_keeps_its_seed_whatever_the_batches():
    def draw(prompts, width, height, seeds):
        return [np.full((height, width, 3), seed, np.uint8) for seed in seeds]

    for batch in (1, 7):
        assert [picture.flat[0] for picture in pictures_of(draw, SCENES, seed=3, batch=batch)] == list(range(3, 123))


@pytest.mark.parametrize(("width", "height"), [canvas[:2] for canvas in CANVASES])
def test_training_passes_equal_diffusers(width, height):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from model import build_text_encoder, build_transformer, encode_text, predict

    torch.manual_seed(0)
    encoder, transformer = build_text_encoder(), build_transformer()
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.add_(0.05 * torch.randn_like(weight))  # it starts with zeros, which would hide errors
        tokens, lengths = torch.randint(0, 900, (3, 64)), torch.tensor([40, 64, 33])
        latents, t = torch.randn(3, 16, height // 8, width // 8), torch.rand(3)
        features = encode_text(encoder, tokens)
        expected = encoder(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
        assert (features - expected).norm() / expected.norm() < 1e-6  # float32, the same sums: measured 0
        out = predict(transformer, latents, t, features, lengths)
        captions = [one[:length] for one, length in zip(features, lengths, strict=True)]
        expected = torch.stack(transformer(list(latents[:, :, None]), t, captions, return_dict=False)[0])[:, :, 0]
    # float32, masks against none: only the order of the sums differs, measured 1e-6
    assert (out - expected).norm() / expected.norm() < 1e-5


def test_a_painted_picture_is_the_same_in_torch():
    pytest.importorskip("torch")
    from data import pack
    from vae_stage import paint_batch

    for scene, picture in list(zip(SCENES, PICTURES, strict=True))[:20]:
        painted = paint_batch(pack([scene]), scene.width, scene.height, "cpu")[0].permute(1, 2, 0).numpy()
        assert np.abs(painted.astype(int) - picture.astype(int)).max() <= 1
