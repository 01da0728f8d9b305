"""Judges a picture by its pixels: is everything that the caption says there, and nothing else?

Needs numpy only, and knows nothing of what drew the picture. It sorts the pixels to the nearest
of the ten colours, takes connected regions, and compares them with the scene:

- background: the colour along the rim is the scene's, and close to it;
- count: as many objects as the scene has. Any other region that survives a one-pixel erosion
  (anti-aliased edges don't) is an object too much;
- colors: the objects' colours, as a multiset, each close to the palette's;
- shapes: every object looks most like its own shape among the eight, and overlaps it (both
  stretched to their bounding boxes) by at least SHAPE_OVERLAP;
- sizes: an object called small measures under SMALL_BELOW pixels in radius, one called large
  over LARGE_ABOVE (drawn: 13 and 28, unnamed ones 17 and 18). Unnamed sizes are not tested;
- place: the named position, relation, nesting, row or column, in the caption's order.

What a caption leaves open is not tested. A picture is right when all six hold.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, dataclass, fields

import numpy as np
from data import KINDS, POSITIONS, Scene
from palette import PALETTE, SHAPES
from render import coverage

SHAPE_OVERLAP = 0.72
SMALL_BELOW, LARGE_ABOVE = 15.5, 23.0
COLOR_WITHIN = 50.0  # median distance to the palette's colour, in RGB; two palette colours are 81 or more apart
CENTER_WITHIN, SIDE_BEYOND = 12.0, 14.0  # pixels from the middle of the picture
LEAST_AREA = 25  # pixels
RASTER = 32  # outlines are compared on a raster this wide


@dataclass(frozen=True)
class Verdict:
    background: bool
    count: bool
    colors: bool = False
    shapes: bool = False
    sizes: bool = False
    place: bool = False

    @property
    def is_right(self) -> bool:
        return all(astuple(self))


CHECKS = tuple(field.name for field in fields(Verdict))


@dataclass(frozen=True)
class Found:
    """A region of one colour: its mask, and its mask with the holes filled."""

    color: int
    mask: np.ndarray
    filled: np.ndarray
    has_right_color: bool


def judge(picture: np.ndarray, scene: Scene) -> Verdict:
    """picture is (height, width, 3) uint8."""
    if picture.shape != (scene.height, scene.width, 3):
        raise ValueError(
            f"the scene is {scene.width}x{scene.height}, the picture {picture.shape[1]}x{picture.shape[0]}"
        )
    background, is_near, found = find_objects(picture)
    has_background = is_near and background == scene.background
    if len(found) != len(scene.things):
        return Verdict(has_background, count=False)
    seen = _match([_measure(one, found) for one in found], scene)
    pairs = list(zip(seen, scene.things, strict=True))
    return Verdict(
        background=has_background,
        count=True,
        colors=all(one.color == thing.color and one.has_right_color for one, thing in pairs),
        shapes=all(
            one.overlaps.argmax() == thing.shape and one.overlaps[thing.shape] >= SHAPE_OVERLAP for one, thing in pairs
        ),
        sizes=all(_has_size(one.radius(thing.shape), thing.size) for one, thing in pairs),
        place=_is_in_place(seen, scene),
    )


def find_objects(picture: np.ndarray) -> tuple[int, bool, list[Found]]:
    """The background's colour, whether it is close to the palette's, and the objects on it."""
    distances = np.sqrt(((picture[:, :, None].astype(np.float32) - PALETTE) ** 2).sum(-1))
    nearest, distance = distances.argmin(-1), distances.min(-1)
    rim = np.ones(nearest.shape, bool)
    rim[3:-3, 3:-3] = False
    background = int(np.bincount(nearest[rim], minlength=len(PALETTE)).argmax())
    is_near = bool(np.median(distance[rim & (nearest == background)]) < COLOR_WITHIN)
    found = []
    for color in np.unique(nearest):
        if color == background:
            continue
        for mask in regions(nearest == color):
            area = int(mask.sum())
            if area >= LEAST_AREA and _eroded(mask).sum() >= max(8, 0.12 * area):
                found.append(Found(int(color), mask, _fill(mask), bool(np.median(distance[mask]) < COLOR_WITHIN)))
    return background, is_near, [one for one in found if not _is_seen_through(one, found)]


def regions(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a boolean mask, as masks."""
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    runs = np.where(mask, starts.cumsum().reshape(mask.shape), 0)  # horizontal runs, numbered from 1
    parent = list(range(int(starts.sum()) + 1))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    touching = mask[1:] & mask[:-1]
    for upper, lower in set(zip(runs[:-1][touching].tolist(), runs[1:][touching].tolist(), strict=True)):
        parent[root(lower)] = root(upper)
    labels = np.array([root(run) for run in range(len(parent))])[runs]
    return [labels == label for label in np.unique(labels) if label]


def _eroded(mask: np.ndarray) -> np.ndarray:
    inner = mask[1:-1, 1:-1]
    return inner & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]


def _holes(mask: np.ndarray) -> list[np.ndarray]:
    outside = np.pad(~mask, 1, constant_values=True)
    return [hole[1:-1, 1:-1] for hole in regions(outside) if not hole[0, 0]]


def _fill(mask: np.ndarray) -> np.ndarray:
    return np.logical_or.reduce([mask, *_holes(mask)])


def _is_seen_through(one: Found, found: list[Found]) -> bool:
    """Whether this is the outer object again, seen through the hole of a ring that lies on it."""

    def lies_in(inner, outer):
        return inner is not outer and not (inner.mask & ~outer.filled).any()

    return any(
        lies_in(one, ring) and lies_in(ring, outer) and outer.color == one.color for ring in found for outer in found
    )


@dataclass(frozen=True)
class Seen:
    """A measured object: bounding box in pixels, and how much it overlaps each shape (8,)."""

    color: int
    has_right_color: bool
    left: int
    top: int
    right: int
    bottom: int
    overlaps: np.ndarray

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def extent(self) -> int:
        return max(self.right - self.left, self.bottom - self.top)

    def radius(self, shape: int) -> float:
        return self.extent / _TEMPLATES[shape].extent


def _measure(one: Found, found: list[Found]) -> Seen:
    mask = one.mask.copy()
    for hole in _holes(one.mask):  # a hole with another object in it is covered, not open
        if any((hole & other.mask).any() for other in found if other is not one):
            mask |= hole
    left, top, right, bottom = _box(mask)
    outline = _stretched(mask[top:bottom, left:right])
    aspect = (right - left) / (bottom - top)
    overlaps = []
    for template in _TEMPLATES:
        overlap = np.minimum(outline, template.outline).sum() / np.maximum(outline, template.outline).sum()
        squeeze = min(aspect / template.aspect, template.aspect / aspect)
        overlaps.append(overlap * squeeze**0.7)
    return Seen(one.color, one.has_right_color, left, top, right, bottom, np.array(overlaps))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _stretched(mask: np.ndarray) -> np.ndarray:
    """The mask on a RASTER x RASTER grid: the covered share of each cell."""

    def shares(size):
        edges = np.linspace(0, size, RASTER + 1)
        low = np.maximum(edges[:-1, None], np.arange(size))
        high = np.minimum(edges[1:, None], np.arange(1, size + 1))
        return np.clip(high - low, 0, None) * RASTER / size

    return shares(mask.shape[0]) @ mask @ shares(mask.shape[1]).T


@dataclass(frozen=True)
class Template:
    outline: np.ndarray  # (RASTER, RASTER), 0 to 1
    aspect: float  # width over height
    extent: float  # the longer side, in radii


def _template(shape: int) -> Template:
    circle = np.array([[64.0, 64.0, 48.0]], np.float32)
    mask = coverage(np.array([shape]), circle, 128, 128)[0] > 0.5
    left, top, right, bottom = _box(mask)
    width, height = right - left, bottom - top
    return Template(_stretched(mask[top:bottom, left:right]), width / height, max(width, height) / 48.0)


_TEMPLATES = tuple(_template(shape) for shape in range(len(SHAPES)))


def _match(seen: list[Seen], scene: Scene) -> list[Seen]:
    """The objects in the order of the scene's: by colour, then shape, then nearness.

    Nearness only breaks ties between equal objects, so it cannot make a wrong place right.
    """

    def agreement(order):
        return sum(
            10 * (one.color == thing.color)
            + one.overlaps[thing.shape]
            - 0.004 * (abs(one.center[0] - thing.x) + abs(one.center[1] - thing.y))
            for one, thing in zip(order, scene.things, strict=True)
        )

    return list(max(itertools.permutations(seen), key=agreement))


def _has_size(radius: float, size: str | None) -> bool:
    return {"small": radius < SMALL_BELOW, None: True, "large": radius > LARGE_ABOVE}[size]


def _is_in_place(seen: list[Seen], scene: Scene) -> bool:
    centers = [one.center for one in seen]
    if scene.position:
        middle = scene.width / 2, scene.height / 2
        return all(
            abs(at - half) < CENTER_WITHIN if side == 0 else (at - half) * side > SIDE_BEYOND
            for at, half, side in zip(centers[0], middle, POSITIONS[scene.position], strict=True)
        )
    if scene.relation:
        across, down = (first - second for first, second in zip(*centers, strict=True))
        along, aside = (across, down) if scene.relation in ("left", "right") else (down, across)
        return along * (-1 if scene.relation in ("left", "above") else 1) > abs(aside)
    if scene.kind == "inside":
        outer, inner = seen
        return (
            outer.left < inner.left
            and inner.right < outer.right
            and outer.top < inner.top
            and inner.bottom < outer.bottom
            and math.dist(outer.center, inner.center) < CENTER_WITHIN
        )
    if scene.arrangement:
        along, aside = (0, 1) if scene.arrangement == "row" else (1, 0)
        is_line = np.ptp([center[aside] for center in centers]) < 0.5 * np.ptp([center[along] for center in centers])
        in_order = all(a[along] < b[along] for a, b in itertools.pairwise(centers))
        return bool(is_line and (in_order or scene.kind == "count"))
    return True


@dataclass(frozen=True)
class Score:
    """Percentages over `count` pictures of a group, and the standard error of `right`."""

    group: str
    count: int
    right: float
    error: float
    checks: dict[str, float]


def scores(scenes: list[Scene], verdicts: list[Verdict]) -> list[Score]:
    """All, then by language, kind and size of the picture."""
    groups = {"all": lambda scene: True}
    groups |= {language: lambda scene, it=language: scene.language == it for language in ("en", "zh")}
    groups |= {kind: lambda scene, it=kind: scene.kind == it for kind in KINDS}
    sizes = sorted({(scene.width, scene.height) for scene in scenes})
    groups |= {f"{w}x{h}": lambda scene, it=(w, h): (scene.width, scene.height) == it for w, h in sizes}
    table = []
    for group, belongs in groups.items():
        chosen = [verdict for scene, verdict in zip(scenes, verdicts, strict=True) if belongs(scene)]
        if chosen:
            share = float(np.mean([verdict.is_right for verdict in chosen]))
            checks = {check: 100 * float(np.mean([getattr(verdict, check) for verdict in chosen])) for check in CHECKS}
            table.append(
                Score(group, len(chosen), 100 * share, 100 * math.sqrt(share * (1 - share) / len(chosen)), checks)
            )
    return table


def as_markdown(table: list[Score]) -> str:
    lines = ["| group | n | everything right % | " + " | ".join(CHECKS) + " |", "|---" * (3 + len(CHECKS)) + "|"]
    for score in table:
        checks = " | ".join(f"{share:.1f}" for share in score.checks.values())
        lines.append(f"| {score.group} | {score.count} | {score.right:.1f} ± {score.error:.1f} | {checks} |")
    return "\n".join(lines)
