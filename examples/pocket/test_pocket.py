"""Tests of the pocket example itself: python -m pytest examples/pocket (the torch half skips without torch)."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import variety
from evaluate import as_bytes, images_of
from judge import Verdict, judge
from palette import PALETTE, SHAPES
from render import ground_truth
from scenes import (
    CANVASES,
    GAP,
    POSITIONS,
    RADIUS,
    RIM,
    Scene,
    Thing,
    held_out_scenes,
    is_held_out,
    sample_scene,
)
from variety import NONE, Batches, Way, compare

SCENES = held_out_scenes(60, seed=5)
IMAGES = ground_truth(SCENES)


def test_ground_truth_is_right():
    assert all(judge(image, scene).is_right for image, scene in zip(IMAGES, SCENES, strict=True))


def test_training_scenes_are_never_held_out():
    rng = random.Random(0)
    assert not any(is_held_out(sample_scene(rng)) for _ in range(2000))


def test_things_named_in_another_order_are_the_same_combination():
    for scene in SCENES:
        assert is_held_out(replace(scene, things=scene.things[::-1]))


def test_objects_keep_their_distance():
    for scene in SCENES:
        if scene.kind == "inside":
            continue
        for one in scene.things:
            assert RIM + one.radius <= min(one.x, one.y, scene.width - one.x, scene.height - one.y)
        for one, other in itertools.combinations(scene.things, 2):
            assert math.dist((one.x, one.y), (other.x, other.y)) >= one.radius + other.radius + GAP


def test_objects_lie_on_half_the_token_grid():
    assert all(thing.x % 8 == 0 and thing.y % 8 == 0 for scene in SCENES for thing in scene.things)


@pytest.mark.parametrize("field", ["shape", "color"])
def test_another_shape_or_colour_is_wrong(field):
    count = {"shape": 8, "color": 10}[field]
    for image, scene in zip(IMAGES, SCENES, strict=True):
        first, *rest = scene.things
        asked = replace(scene, things=(replace(first, **{field: (getattr(first, field) + 1) % count}), *rest))
        assert not judge(image, asked).is_right


def test_another_background_is_wrong():
    for image, scene in zip(IMAGES, SCENES, strict=True):
        assert not judge(image, replace(scene, background=(scene.background + 1) % 10)).background


def test_a_missing_object_is_wrong():
    for scene in SCENES:
        fewer = replace(scene, things=scene.things[:-1])
        assert not judge(ground_truth([fewer])[0], scene).is_right


def test_a_mirrored_image_has_the_wrong_place():
    told = [(image, scene) for image, scene in zip(IMAGES, SCENES, strict=True) if scene.relation in ("left", "right")]
    assert told and not any(judge(image[:, ::-1], scene).place for image, scene in told)


def test_swapped_sizes_are_wrong():
    other = {"small": "large", "large": "small"}
    for image, scene in zip(IMAGES, SCENES, strict=True):
        if any(thing.size for thing in scene.things):
            sizes = [other.get(thing.size) for thing in scene.things]
            things = tuple(
                replace(thing, size=size, radius=RADIUS[size]) for thing, size in zip(scene.things, sizes, strict=True)
            )
            assert not judge(image, replace(scene, things=things)).sizes


def test_a_smudge_counts_as_an_extra_object():
    for image, scene in zip(IMAGES, SCENES, strict=True):
        smudged = image.copy()
        smudged[4:12, 4:12] = PALETTE[(scene.background + 1) % 10]
        assert not judge(smudged, scene).is_right


def one(shape: str, size: str | None = None, position: str | None = "center", **where) -> Scene:
    """A red shape on white, 128x128."""
    thing = Thing(SHAPES.index(shape), 0, 64.0, 64.0, RADIUS[size], size)
    return Scene("single", 128, 128, (replace(thing, **where),), 8, True, position)


def drawn(*masks, size=128) -> np.ndarray:
    """An image from functions of x and y, pixels from the middle: red where one of them holds, otherwise white."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    is_red = np.logical_or.reduce([mask(x, y) for mask in masks])
    return np.where(is_red[..., None], PALETTE[0], PALETTE[8]).astype(np.uint8)


def test_shapes_drawn_in_another_way_are_right():
    assert judge(drawn(lambda x, y: np.hypot(x, y) < 19), one("circle")).is_right
    assert judge(drawn(lambda x, y: np.maximum(abs(x), abs(y)) < 17), one("square")).is_right
    assert judge(drawn(lambda x, y: abs(np.hypot(x, y) - 14.5) < 4.5), one("ring")).is_right


@pytest.mark.parametrize("squeeze", [1.2, 1.5])
def test_an_ellipse_is_not_a_circle(squeeze):
    for size, radius in RADIUS.items():
        wide = drawn(lambda x, y, r=radius: np.hypot(x / squeeze**0.5, y * squeeze**0.5) < r)
        assert not judge(wide, one("circle", size)).shapes


@pytest.mark.parametrize(("width", "height"), [(56, 36), (36, 56), (40, 33)])
def test_a_rectangle_is_not_a_square(width, height):
    assert not judge(drawn(lambda x, y: (abs(x) < width / 2) & (abs(y) < height / 2)), one("square")).shapes


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stretched_shape_is_wrong(shape):
    scene = one(shape, "large")
    image = ground_truth([scene])[0]
    assert judge(image, scene).is_right
    keep = np.flatnonzero(np.arange(128) % 5)  # four of every five rows or columns; a margin fills the rest
    for axis in (0, 1):
        short = np.take(image, keep, axis)
        margin = [(0, 0)] * 3
        margin[axis] = ((128 - len(keep)) // 2, 128 - len(keep) - (128 - len(keep)) // 2)
        squeezed = np.pad(short, margin, mode="edge")
        assert not judge(squeezed, scene).shapes


def test_a_lumpy_outline_is_wrong():
    def lumpy(radius, lumps, depth):
        return lambda x, y: np.hypot(x, y) < radius * (1 + depth * np.cos(lumps * np.arctan2(y, x)))

    for lumps in (3, 4, 5):
        assert not judge(drawn(lumpy(19, lumps, 0.25)), one("circle")).shapes
    hole = lumpy(14, 3, 0.3)
    assert not judge(drawn(lambda x, y: (np.hypot(x, y) < 28) & ~hole(x, y)), one("ring", "large")).shapes
    ragged = drawn(lambda x, y: abs(x) / 15 + abs(y) / 20 + 0.15 * np.sin(y) < 1)
    assert not judge(ragged, one("diamond")).shapes


def test_an_octagon_is_not_a_square_nor_a_rounded_square_a_circle():
    octagon = drawn(lambda x, y: (np.maximum(abs(x), abs(y)) < 17) & (abs(x) + abs(y) < 21))
    assert not judge(octagon, one("square")).shapes
    assert not judge(drawn(lambda x, y: (abs(x) / 17) ** 6 + (abs(y) / 17) ** 6 < 1), one("circle")).shapes


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [(46, 64, "center"), (82, 82, "center"), (39, 64, "left"), (64, 89, "bottom"), (39, 64.1, "left")],
)
def test_places_change_at_the_thirds(x, y, place):
    off = ground_truth([one("circle", x=float(x), y=float(y))])[0]
    for name in ("center", "left", "right", "top", "bottom"):
        assert judge(off, one("circle", position=name)).place == (name == place), name


def test_a_place_is_a_third():
    for name, (column, row) in POSITIONS.items():
        there = ground_truth([one("circle", x=64.0 + 32 * column, y=64.0 + 32 * row)])[0]
        assert [other for other in POSITIONS if judge(there, one("circle", position=other)).place] == [name]
        near = ground_truth([one("circle", x=64.0 + 18 * column, y=64.0 + 18 * row)])[0]
        assert judge(near, one("circle", position=name)).place == (name == "center")


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("factor", [0.72, 1.36])
def test_a_named_size_is_kept_within_a_third(size, factor):
    for shape in SHAPES:
        other = ground_truth([one(shape, size, radius=factor * RADIUS[size])])[0]
        assert not judge(other, one(shape, size)).sizes


def test_objects_of_no_named_size_are_neither_small_nor_large():
    for shape in SHAPES:
        image = ground_truth([one(shape)])[0]
        assert not any(judge(image, one(shape, size)).sizes for size in ("small", "large"))


@pytest.mark.parametrize("color", range(1, 8))
def test_lines_and_specks_of_another_colour_are_wrong(color):
    scene = one("circle")
    clean = ground_truth([scene])[0]
    line, inner, specks = clean.copy(), clean.copy(), clean.copy()
    line[100, 20:60] = PALETTE[color]
    inner[64, 52:76] = PALETTE[color]
    specks[10:26:8, 10:100:40] = PALETTE[color]
    assert judge(clean, scene).is_right
    assert not any(judge(spoilt, scene).is_right for spoilt in (line, inner, specks))


def test_lines_tails_and_slits_in_the_images_own_colours_are_wrong():
    scene = one("circle")
    clean = ground_truth([scene])[0]
    line, tail, slit = clean.copy(), clean.copy(), clean.copy()
    line[100, 20:60] = PALETTE[0]
    tail[64, 80:100] = PALETTE[0]
    slit[64] = PALETTE[8]
    assert not any(judge(spoilt, scene).is_right for spoilt in (line, tail, slit))


def test_a_slanted_pair_is_not_side_by_side():
    things = (Thing(0, 0, 32.0, 44.0, 19.0), Thing(1, 1, 96.0, 84.0, 19.0))
    asked = Scene("pair", 128, 128, things, 8, True, relation="left")
    assert not judge(ground_truth([asked])[0], asked).place


def test_an_object_that_leaves_its_outer_one_is_not_inside():
    things = (Thing(1, 0, 64.0, 64.0, 42.0), Thing(0, 4, 92.0, 64.0, 16.0))
    asked = Scene("inside", 128, 128, things, 8, True)
    assert not judge(ground_truth([asked])[0], asked).is_right


def test_an_image_keeps_its_seed_whatever_the_batches():
    def draw(prompts, width, height, seeds):
        return [np.full((height, width, 3), seed, np.uint8) for seed in seeds]

    for batch in (1, 7):
        assert [image.flat[0] for image in images_of(draw, SCENES, seed=3, batch=batch)] == list(
            range(3, 3 + len(SCENES))
        )


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


def test_a_painted_image_is_the_same_in_torch():
    pytest.importorskip("torch")
    from scenes import pack
    from vae_stage import paint_batch

    for scene, image in list(zip(SCENES, IMAGES, strict=True))[:20]:
        painted = paint_batch(pack([scene]), scene.width, scene.height, "cpu")[0].permute(1, 2, 0).numpy()
        assert np.abs(painted.astype(int) - image.astype(int)).max() <= 1


def test_a_stage_ends_by_its_steps_or_by_its_seconds():
    pytest.importorskip("torch")
    from optim import LOOK, Clock

    assert [step for step, _ in Clock(40, 1e6, "cpu")] == list(range(40))
    assert [step for step, _ in Clock(40, 1e6, "cpu", done=0.5)] == list(range(20, 40))
    assert len(list(Clock(10**9, 1e-9, "cpu"))) == LOOK
    progress = [progress for _, progress in Clock(400, 1e6, "cpu")]
    assert progress == sorted(progress) and progress[0] == 0 and progress[-1] < 1


def test_verdicts_of_another_checkpoint_are_not_used(tmp_path):
    from scores import BASE, Part, digest_of, judge_part

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    stamps = []
    for content in ("one", "other"):
        (checkpoint / "weights").write_text(content)
        stamps.append(digest_of(checkpoint))
    perfect = replace(BASE, name="ground truth", made_by="nothing")
    first, other = (Part(perfect, checkpoint, "float32", 3, 1, 0, 3, stamp, tmp_path) for stamp in stamps)
    assert first.kept() is None
    assert [verdict.is_right for verdict in judge_part(first).kept()] == [True] * 3
    assert first.file == other.file and other.kept() is None


def test_rows_are_compared_with_float32_alone():
    from scores import ROWS, as_table

    right = [Verdict(*[True] * 6) for _ in SCENES]
    wrong = [Verdict(True, False), *right[1:]]
    table = as_table(ROWS[:2], SCENES, {"float32": right, "bfloat16": wrong}).splitlines()
    assert table[-1].endswith("| 1 | 0 |")
    alone = as_table(ROWS[1:2], SCENES[:1], {"bfloat16": wrong[:1]}).splitlines()
    assert alone[-1].endswith("| |") and " 0.0 ± 0.0 " in alone[-1]


def test_pairs_of_images_are_compared_where_both_are_right():
    scene = next(scene for scene in SCENES if scene.kind == "single" and scene.position is None)
    (thing,) = scene.things
    there = replace(scene, things=(replace(thing, x=thing.x + 16),))
    empty = replace(scene, things=())
    images = ground_truth([scene, scene, there, empty])
    right, pairs = compare((scene, images))
    assert right == [True, True, True, False]
    assert [pairs[pair].moved for pair in ((0, 1), (0, 2), (1, 2), (0, 3))] == [False, True, True, None]
    assert pairs[0, 1].distance == 0 < pairs[0, 2].distance == pairs[1, 2].distance
    way = Way("low", 0.5, 1)
    row = {NONE: (right, pairs), way: compare((scene, images[:1] * 4))}
    # by hand: from three right images to four, and from two of three pairs that differ to none
    expected = "| low 0.5, 1 step | 100.00 | +25.00 ± nan | 0.0000 | -100.00 ± nan | 0.0 | -66.67 ± nan |"
    assert variety.as_table([row], [way]).endswith(expected)


@pytest.mark.slow
def test_batches_generate_what_the_pipeline_does():
    scenes = [(i, scene) for i, scene in enumerate(SCENES) if (scene.width, scene.height) == (128, 128)][:2]
    batches, ways = Batches("pocket", "float32"), [NONE, *map(Way.of, ("noise:0:2", "empty:0:1", "noise:1:1"))]
    found = batches.images(scenes, 2, ways)
    one = batches.pipe(scenes[1][1].caption, height=128, width=128, seed=100 * scenes[1][0] + 1, output_type="np")
    # a batch adds products in another order
    assert np.abs(found[NONE][3].astype(int) - as_bytes(one.images[0])).max() <= 1
    for way in ways[1:3]:
        assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(found[NONE], found[way], strict=True))
    assert np.abs(found[NONE][0].astype(int) - found[ways[3]][0]).max() > 1
