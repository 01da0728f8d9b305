"""Judges an image by its pixels: is everything that the caption says there, and nothing else?

It needs numpy only, and knows nothing of what made the image. It assigns each pixel to the nearest of the world's
colours, takes connected regions, and compares them with the scene:

- background: the colour nearest to the rim's is the scene's, and the rim is close to it;
- count: as many objects as the scene has, and nothing stray: away from the outlines, fewer than
  STRAY pixels of any colour that does not belong there, be they lines, specks or smudges;
- colors: the objects' colours, as a multiset, each close to the palette's;
- shapes: every object looks most like its own shape among the world's. Each shape is laid over it
  with the same centre of mass and the same area or extent, and the intersection over union, times the ratio of their
  aspects, must be at least OVERLAP; no bump or notch in its outline may be deeper than TAIL;
- sizes: an object called small or large has the radius that the word means, within a factor of
  SIZE_FACTOR, which excludes the radius of unnamed sizes. Unnamed sizes are not tested;
- place: a named position is the middle, or the outer third, of both sides; of a relation's two
  objects the first ends before the second begins, on one line; nesting, row or column, in the
  caption's order.

What a caption leaves open is not tested. An image is right when all six hold.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, dataclass, fields
from functools import cache

import numpy as np
from palette import KNOWN, PALETTE, WIDER, World
from render import coverage
from scenes import KINDS, POSITIONS, Scene, Thing

# Perfect images reach 0.88 (the smallest diamonds) to 1.00. The longer a shape's outline relative
# to its area, the more it loses if the outline is off by half a pixel.
OVERLAP = {
    "circle": 0.88,
    "square": 0.88,
    "triangle": 0.85,
    "star": 0.78,
    "ring": 0.85,
    "cross": 0.85,
    "diamond": 0.82,
    "heart": 0.85,
    "oval": 0.87,
}
TAIL = 4  # pixels
SIZE_FACTOR = 1.3
COLOR_WITHIN = 50.0  # median distance to the palette's colour, in RGB; two colours of WIDER are 81 or more apart
STRAY = 6  # pixels
EDGE = 2  # pixels on both sides of an outline where colours may mix
LEAST_AREA = 25  # pixels
LINE_SLANT = 0.2  # how far the centres of a row or a pair may be off their line, relative to its length


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


def judge(image: np.ndarray, scene: Scene, world: World = KNOWN) -> Verdict:
    """image is (height, width, 3) uint8."""
    return look(image, scene, world)[0]


def look(image: np.ndarray, scene: Scene, world: World = KNOWN) -> tuple[Verdict, list[Seen]]:
    """The verdict, and the objects in the order of the scene's; none if their number is wrong."""
    if image.shape != (scene.height, scene.width, 3):
        raise ValueError(f"the scene is {scene.width}x{scene.height}, the image {image.shape[1]}x{image.shape[0]}")
    background, is_near, found, stray = find_objects(image, world.palette)
    has_background = is_near and background == scene.background
    if len(found) != len(scene.things) or stray >= STRAY:
        return Verdict(has_background, count=False), []
    seen = _match([_measure(one, found, len(world.shapes)) for one in found], scene)
    pairs = list(zip(seen, scene.things, strict=True))
    verdict = Verdict(
        background=has_background,
        count=True,
        colors=all(one.color == thing.color and one.has_right_color for one, thing in pairs),
        shapes=all(_has_shape(one, thing.shape) for one, thing in pairs),
        sizes=all(_has_size(one.radii[thing.shape], thing) for one, thing in pairs),
        place=_is_in_place(seen, scene),
    )
    return verdict, seen


def find_objects(image: np.ndarray, palette: np.ndarray = PALETTE) -> tuple[int, bool, list[Found], int]:
    """The background's colour, whether it is close to the palette's, the objects on it, and the
    number of stray pixels."""
    distances = np.sqrt(((image[:, :, None].astype(np.float32) - palette) ** 2).sum(-1))
    nearest, distance = distances.argmin(-1), distances.min(-1)
    rim = np.ones(nearest.shape, bool)
    rim[3:-3, 3:-3] = False
    background = int(np.bincount(nearest[rim], minlength=len(palette)).argmax())
    is_near = bool(np.median(distance[rim & (nearest == background)]) < COLOR_WITHIN)
    cores = [
        (int(color), mask)
        for color in np.unique(nearest)
        if color != background
        for mask in regions(nearest == color, LEAST_AREA)
        if _is_solid(mask)
    ]
    # an outline between two colours may look like a third, so only colours of some region are counted
    there = sorted({background, *(color for color, _ in cores)})
    nearest_there = np.array(there)[distances[:, :, there].argmin(-1)]
    found, owner = [], np.full(nearest.shape, background)
    for color in there:
        for mask in regions(nearest_there == color, LEAST_AREA) if color != background else ():
            if any(one == color and (mask & core).any() for one, core in cores) and _is_solid(mask):
                found.append(Found(color, mask, _fill(mask), bool(np.median(distance[mask]) < COLOR_WITHIN)))
                owner[mask] = color
    stray = int(((nearest != owner) & ~_near_outlines(owner)).sum())
    return background, is_near, [one for one in found if not _is_seen_through(one, found)], stray


def _is_solid(mask: np.ndarray) -> bool:
    area = int(mask.sum())
    return area >= LEAST_AREA and _eroded(mask).sum() >= max(8, 0.12 * area)


def _near_outlines(owner: np.ndarray) -> np.ndarray:
    """Where more than one value of `owner` lies within EDGE pixels."""
    padded = np.pad(owner, EDGE, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * EDGE + 1, 2 * EDGE + 1))
    return windows.max((2, 3)) != windows.min((2, 3))


def regions(mask: np.ndarray, least: int = 1) -> list[np.ndarray]:
    """The 4-connected regions of a boolean mask, as masks; only those of `least` pixels or more."""
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
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return [labels == label for label in np.flatnonzero(areas >= max(1, least))]


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
    """A measured object: bounding box and centre of mass in pixels; for each shape (n,) the
    radius it would have, how well it fits, and whether no bump or notch exceeds TAIL."""

    color: int
    has_right_color: bool
    left: int
    top: int
    right: int
    bottom: int
    radii: np.ndarray
    overlaps: np.ndarray
    keeps_to: np.ndarray
    centers: np.ndarray  # (n, 2): of the shape, which is not the centre of mass
    filled: np.ndarray

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


def _measure(one: Found, found: list[Found], shapes: int) -> Seen:
    mask = one.mask.copy()
    for hole in _holes(one.mask):  # a hole with another object in it is covered, not open
        if any((hole & other.mask).any() for other in found if other is not one):
            mask |= hole
    left, top, right, bottom = _box(mask)
    extent = max(right - left, bottom - top)
    margin = extent // 2 + TAIL + 2  # round the object, where another shape of its area may reach
    window = np.pad(mask[top:bottom, left:right], margin)
    rows, columns = np.nonzero(window)
    x, y = columns.mean() + 0.5, rows.mean() + 0.5
    radii, centers, overlaps, keeps_to = [], [], [], []
    for shape, measure in enumerate(_measures(shapes)):
        fits = []
        for radius in (math.sqrt(len(rows) / measure.area), extent / measure.extent):
            circle = np.array([[x, y - measure.down * radius, radius]], np.float32)
            ideal = coverage(np.array([shape]), circle, window.shape[1], window.shape[0])[0] > 0.5
            overlap = (window & ideal).sum() / (window | ideal).sum()
            fits.append((overlap, radius, ideal))
        overlap, radius, ideal = max(fits, key=lambda fit: fit[0])
        box = _box(ideal)
        aspect = (right - left) / (bottom - top) * (box[3] - box[1]) / (box[2] - box[0])
        radii.append(radius)
        centers.append((left - margin + x, top - margin + y - measure.down * radius))
        overlaps.append(overlap * min(aspect, 1 / aspect))
        sticks_out, is_open = window & ~_grown(ideal, TAIL), ~window & ~_grown(~ideal, TAIL)
        keeps_to.append(not sticks_out.any() and is_open.sum() < STRAY)
    return Seen(
        one.color,
        one.has_right_color,
        left,
        top,
        right,
        bottom,
        np.array(radii),
        np.array(overlaps),
        np.array(keeps_to),
        np.array(centers),
        one.filled,
    )


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """The mask and what lies within `by` pixels of it, along rows, columns or in between."""
    for _ in range(by):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


@dataclass(frozen=True)
class Measure:
    """Of a shape of radius 1: its area, its longer side, and how far its centre of mass lies below its centre."""

    area: float
    extent: float
    down: float


@cache
def _measures(shapes: int) -> tuple[Measure, ...]:
    """Of the first `shapes` shapes."""
    measures = []
    for shape in range(shapes):
        covered = coverage(np.array([shape]), np.array([[256.0, 256.0, 200.0]], np.float32), 512, 512)[0]
        left, top, right, bottom = _box(covered > 0.5)
        down = (np.arange(512) + 0.5) @ covered.sum(1) / covered.sum() - 256
        measures.append(
            Measure(float(covered.sum()) / 200**2, max(right - left, bottom - top) / 200, float(down) / 200)
        )
    return tuple(measures)


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


def _has_shape(one: Seen, shape: int) -> bool:
    is_like = one.overlaps.argmax() == shape and one.overlaps[shape] >= OVERLAP[WIDER.shapes[shape]]
    return bool(is_like and one.keeps_to[shape])


def _has_size(radius: float, thing: Thing) -> bool:
    return thing.size is None or thing.radius / SIZE_FACTOR < radius < thing.radius * SIZE_FACTOR


def _is_in_place(seen: list[Seen], scene: Scene) -> bool:
    centers = [tuple(one.centers[thing.shape]) for one, thing in zip(seen, scene.things, strict=True)]
    if scene.position:
        sides = scene.width, scene.height
        return all(
            int(3 * at / length) - 1 == side
            for at, length, side in zip(centers[0], sides, POSITIONS[scene.position], strict=True)
        )
    if scene.relation:
        is_across, is_first = scene.relation in ("left", "right"), scene.relation in ("left", "above")
        low, high = seen if is_first else seen[::-1]
        are_apart = low.right <= high.left if is_across else low.bottom <= high.top
        return are_apart and _is_line(centers, 0 if is_across else 1)
    if scene.kind == "inside":
        outer, inner = seen
        return not (inner.filled & ~outer.filled).any()
    if scene.arrangement:
        along = 0 if scene.arrangement == "row" else 1
        in_order = all(a[along] < b[along] for a, b in itertools.pairwise(centers))
        return _is_line(centers, along) and (in_order or scene.kind == "count")
    return True


def _is_line(centers: list[tuple[float, float]], along: int) -> bool:
    aside = [center[1 - along] for center in centers]
    return bool(np.ptp(aside) <= LINE_SLANT * np.ptp([center[along] for center in centers]))


@dataclass(frozen=True)
class Score:
    """Percentages over `count` images of a group, and the standard error of `right`."""

    group: str
    count: int
    right: float
    error: float
    checks: dict[str, float]


def scores(scenes: list[Scene], verdicts: list[Verdict]) -> list[Score]:
    """All, then by language, kind and size of the image."""
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
