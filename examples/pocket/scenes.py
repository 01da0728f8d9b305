"""The pocket world: scenes of one to three coloured shapes on a plain background.

Needs numpy only. A scene is sampled in two steps: first the facts (what is where, and how
much of it the caption says), then the caption (`captions.py`). `render.py` renders it.

What makes the world learnable in minutes: centres lie on a 16-pixel grid (a few on one of 8 pixels), so that in the
transformer's tokens, 16 pixels wide, an object is one pattern, shifted; there are six radii; and what a caption leaves
open varies little. Objects keep 4 pixels from the rim and 6 from each other (4 inside another).

The held-out split is by meaning, not by wording: a tenth of all combinations of shapes and
colours never occur in a training image, in either language, in whatever order, arrangement
or size.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import captions
import numpy as np
from palette import COLOR_NAMES, COLORS, SHAPES

GRID = 16  # pixels per token of the transformer
RIM, GAP = 4, 6  # least distance to the rim and between objects
OUTER_SHAPES = ("circle", "square", "diamond", "heart")  # wide enough at the centre to hold another
RADIUS = {"small": 14.0, None: 19.0, "large": 28.0}  # by the size the caption names
LINE_RADIUS = 17.0  # three in a line of 128 pixels, 6 apart
OUTER_RADIUS, INNER_RADIUS = 42.0, {"small": 14.0, None: 16.0}
INSET = 32  # of a named position's centre from the sides; a large object just fits
APART = 64  # pixels between the centres of two objects
# width, height, share of the training images. 8x8 = 64 image tokens need no padding to a
# multiple of 32; 160x160 (100 tokens) and 160x128 (80) train the learned image pads.
CANVASES = (
    (128, 128, 0.52),
    (192, 128, 0.11),
    (128, 192, 0.11),
    (160, 160, 0.14),
    (160, 128, 0.06),
    (128, 160, 0.06),
)
KINDS = {"single": 0.26, "pair": 0.30, "and": 0.08, "inside": 0.13, "count": 0.13, "row": 0.10}
MAX_OBJECTS = 3
# column and row of each position: -1, 0 or 1
POSITIONS = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
RELATIONS = ("left", "right", "above", "below")  # of the first object, seen from the second


@dataclass(frozen=True)
class Thing:
    """One object. shape and color index SHAPES and COLORS; x, y, radius are pixels.

    size is "small" or "large" where the caption says so, else None.
    """

    shape: int
    color: int
    x: float
    y: float
    radius: float
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """What an image shows, and the caption that asks for it.

    position, relation and arrangement are None where the caption leaves them open. `things`
    are in the caption's order, save for "inside": there the outer object comes first.
    """

    kind: str
    width: int
    height: int
    things: tuple[Thing, ...]
    background: int
    background_is_named: bool
    position: str | None = None
    relation: str | None = None
    arrangement: str | None = None  # "row" or "column"
    language: str = "en"
    caption: str = ""

    @property
    def combination(self) -> tuple:
        """What decides the split: the things without their order."""
        looks = tuple(sorted((thing.shape, thing.color) for thing in self.things))
        if self.kind == "single":
            return (*looks, self.background)
        if self.kind == "count":
            return (len(looks), looks[0], self.background)
        return looks


def is_held_out(scene: Scene) -> bool:
    return zlib.crc32(repr(scene.combination).encode()) % 10 == 0


def sample_scene(
    rng: random.Random,
    split: str = "train",
    kind: str | None = None,
    language: str | None = None,
    canvas: tuple[int, int] | None = None,
) -> Scene:
    """A captioned scene of a split, "train" or "held out"; what is not given is sampled."""
    while True:
        scene = _sample_facts(rng, kind, canvas)
        if _fits(scene) and is_held_out(scene) == (split == "held out"):
            break
    language = language or rng.choice(("en",) * 5 + ("zh",) * 4)
    scene = replace(scene, language=language)
    return replace(scene, caption=captions.describe(rng, scene))


def held_out_scenes(count: int, seed: int, canvas: tuple[int, int] | None = None) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, "held out", canvas=canvas) for _ in range(count)]


def pack(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Arrays for the renderer and the trainer: shapes and colors (n, 3), -1 where there is no
    object; circles (n, 3, 3): x, y, radius in pixels; backgrounds (n,)."""
    shapes = np.full((len(scenes), MAX_OBJECTS), -1, np.int16)
    colors = np.zeros((len(scenes), MAX_OBJECTS), np.int16)
    circles = np.ones((len(scenes), MAX_OBJECTS, 3), np.float32)
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.things):
            shapes[i, j], colors[i, j] = thing.shape, thing.color
            circles[i, j] = thing.x, thing.y, thing.radius
    backgrounds = np.array([scene.background for scene in scenes], np.int16)
    return {"shapes": shapes, "colors": colors, "circles": circles, "backgrounds": backgrounds}


def _fits(scene: Scene) -> bool:
    return all(
        thing.radius + RIM <= thing.x <= scene.width - thing.radius - RIM
        and thing.radius + RIM <= thing.y <= scene.height - thing.radius - RIM
        for thing in scene.things
    )


def _sample_facts(rng: random.Random, kind: str | None, canvas: tuple[int, int] | None) -> Scene:
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    width, height = canvas or rng.choices([(w, h) for w, h, _ in CANVASES], [s for *_, s in CANVASES])[0]
    count = {"single": 1, "count": 1, "row": 3}.get(kind, 2)
    *colors, spare = rng.sample(range(len(COLORS)), count + 1)
    background_is_named = rng.random() < 0.65
    if background_is_named:
        background = spare
    else:
        background = unnamed_background(colors)
    sample = {"single": _single, "pair": _pair, "and": _pair, "inside": _inside, "count": _count, "row": _row}[kind]
    return Scene(
        kind=kind,
        width=width,
        height=height,
        background=background,
        background_is_named=background_is_named,
        **sample(rng, kind, colors, width, height),
    )


def unnamed_background(colors: Sequence[int]) -> int:
    """White, or the next colour that no object has."""
    return next(_index(name) for name in ("white", "gray", "black", "yellow") if _index(name) not in colors)


def _index(color: str) -> int:
    return COLOR_NAMES.index(color)


def _shape(rng: random.Random) -> int:
    return rng.randrange(len(SHAPES))


def _size(rng: random.Random, share: float) -> str | None:
    return rng.choice(("small", "large")) if rng.random() < share else None


def _jitter(rng: random.Random) -> int:
    return rng.choice((-GRID, 0, GRID))


def _near_middle(rng: random.Random, width: int, height: int) -> tuple[float, float]:
    """The middle, or a step up, down, left or right of it."""
    across, down = rng.choice(((0, 0), (GRID, 0), (-GRID, 0), (0, GRID), (0, -GRID)))
    return width / 2 + across, height / 2 + down


def _single(rng, kind, colors, width, height) -> dict:
    size = _size(rng, 0.5)
    position = rng.choice(list(POSITIONS)) if rng.random() < 0.5 else None
    if position is None:
        x, y = _near_middle(rng, width, height)
    else:
        column, row = POSITIONS[position]
        x = {-1: INSET, 0: width / 2, 1: width - INSET}[column]
        y = {-1: INSET, 0: height / 2, 1: height - INSET}[row]
    return {"things": (Thing(_shape(rng), colors[0], x, y, RADIUS[size], size),), "position": position}


def _pair(rng, kind, colors, width, height) -> dict:
    if rng.random() < 0.08:
        colors = [colors[0], colors[0]]
    shapes = [_shape(rng), _shape(rng)]
    while colors[0] == colors[1] and shapes[0] == shapes[1]:
        shapes[1] = _shape(rng)
    sizes = [_size(rng, 0.4), _size(rng, 0.4)]
    if sizes == ["large", "large"]:
        sizes[1] = None
    relation = rng.choice(RELATIONS) if kind == "pair" else "left"  # "a and b" reads left to right
    is_row = relation in ("left", "right")
    length, breadth = (width, height) if is_row else (height, width)
    along = _spread(2, length, APART)
    if relation in ("right", "below"):
        along = along[::-1]
    across = breadth / 2 + _jitter(rng)
    centres = [(a, across) if is_row else (across, a) for a in along]
    things = tuple(
        Thing(s, c, *centre, RADIUS[z], z) for s, c, centre, z in zip(shapes, colors, centres, sizes, strict=True)
    )
    return {"things": things, "relation": relation if kind == "pair" else None}


def _inside(rng, kind, colors, width, height) -> dict:
    sizes = ("large", "small") if rng.random() < 0.4 else (None, None)
    x, y = _near_middle(rng, width, height)
    outer = Thing(SHAPES.index(rng.choice(OUTER_SHAPES)), colors[0], x, y, OUTER_RADIUS, sizes[0])
    return {"things": (outer, Thing(_shape(rng), colors[1], x, y, INNER_RADIUS[sizes[1]], sizes[1]))}


def _count(rng, kind, colors, width, height) -> dict:
    count, shape = rng.choice((2, 3)), _shape(rng)
    size = rng.choice((None, None, "small", "large"))
    if count == 3 and size == "large":
        size = None
    radius = LINE_RADIUS if count == 3 and size is None else RADIUS[size]
    arrangement = rng.choice(("row", "column")) if rng.random() < 0.5 else None
    centres = _line(arrangement or "row", count, width, height, _jitter(rng))
    things = tuple(Thing(shape, colors[0], *centre, radius, size) for centre in centres)
    return {"things": things, "arrangement": arrangement}


def _row(rng, kind, colors, width, height) -> dict:
    arrangement = rng.choice(("row", "row", "column"))
    centres = _line(arrangement, 3, width, height, _jitter(rng))
    things = tuple(
        Thing(_shape(rng), color, *centre, LINE_RADIUS) for color, centre in zip(colors, centres, strict=True)
    )
    return {"things": things, "arrangement": arrangement}


def _line(arrangement, count, width, height, offset) -> list[tuple[float, float]]:
    length, breadth = (width, height) if arrangement == "row" else (height, width)
    step = APART if count == 2 else {128: 40, 160: 48, 192: 64}[length]
    across = breadth / 2 + offset
    return [(a, across) if arrangement == "row" else (across, a) for a in _spread(count, length, step)]


def _spread(count: int, length: int, step: float) -> list[float]:
    """Where `count` objects lie along a side, about its middle."""
    return [length / 2 + step * (i - (count - 1) / 2) for i in range(count)]
