"""People in a photo as OpenPose draws them, from two networks: one finds people, one the 133 points of each.

Source: DWPose, as in VideoX-Fun, which trained the ControlNet: YOLOX finds people, RTMPose their points in the order
of COCO-WholeBody. Lines and dots have OpenPose's colours, and the size that they have in an image of 512 pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Network = Callable[[np.ndarray], list[np.ndarray]]  # the outputs for one input, float32
Point = tuple[float, float]

FINDER = 640  # pixels per side that YOLOX sees
STRIDES = (8, 16, 32)  # of its three grids
GREY = 114  # around an image that is not square
PERSON = 0  # COCO's number
FOUND, OVERLAP = 0.3, 0.45  # least score of a person, and the most that two may overlap
MOST = 20  # people in an image
CROP = 288, 384  # pixels across and down of the crop of a person that RTMPose sees
AROUND = 1.25  # factor by which a person's box is enlarged to be cropped
PER_PIXEL = 2  # bins of its outputs
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB
SEEN = 0.3  # least score of a point
DRAWN_AT = 512  # pixels of the shorter side at which the sizes below are pixels
STICK, DOT, FACE_DOT, FINGER = 4, 4, 3, 2

# OpenPose's 18 points of a body by their number in COCO-WholeBody, where there is no neck: it is between the shoulders.
NECK, SHOULDERS = 1, [5, 6]
BODY = (0, NECK, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0)),
    *((0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255)),
    *((170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
FACE, EYES = slice(23, 91), slice(14, 16)  # the eyes are the body's
HANDS = slice(91, 112), slice(112, 133)
BONES = tuple((0 if i % 4 == 0 else finger + i, finger + i + 1) for finger in (0, 4, 8, 12, 16) for i in range(4))


def pose(pixels: np.ndarray, finder: Network, estimator: Network) -> np.ndarray | None:
    """The people in an image (H, W, 3) uint8, on black: (H, W, 3) uint8; None if there are none."""
    image = Image.fromarray(pixels)
    boxes = people(image, finder)
    return drawn([points(image, box, estimator) for box in boxes], *image.size) if len(boxes) else None


def people(image: Image.Image, finder: Network) -> np.ndarray:
    """The boxes around people (n, 4): left, top, right, bottom; the most confident first."""
    ratio = FINDER / max(image.size)
    seen = Image.new("RGB", (FINDER, FINDER), (GREY, GREY, GREY))
    seen.paste(
        image.resize((max(1, int(image.width * ratio)), max(1, int(image.height * ratio))), Image.Resampling.BILINEAR)
    )
    bgr = np.asarray(seen, np.float32)[..., ::-1]  # as it was trained
    found = finder(bgr.transpose(2, 0, 1)[None])[0][0]  # (cells, 5 + classes): x, y, log w, log h, score, by class
    cells, strides = _grid()
    middle, size = (found[:, :2] + cells) * strides, np.exp(found[:, 2:4]) * strides
    scores = found[:, 4] * found[:, 5 + PERSON]
    sure = scores > FOUND
    boxes = np.concatenate([middle - size / 2, middle + size / 2], axis=1)[sure] / ratio
    return boxes[_apart(boxes, scores[sure])[:MOST]]


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """The place (cells, 2) of each of YOLOX's cells in its grid, and the pixels (cells, 1) between those."""
    cells, strides = [], []
    for stride in STRIDES:
        side = FINDER // stride
        y, x = np.indices((side, side)).reshape(2, -1)
        cells.append(np.stack([x, y], axis=1))
        strides.append(np.full((side * side, 1), stride))
    return np.concatenate(cells), np.concatenate(strides)


def _apart(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """The indices of the boxes that are not overlapped by a more confident one, the most confident first."""
    kept: list[int] = []
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    for i in np.argsort(-scores, kind="stable"):
        shared = np.minimum(boxes[i, 2:], boxes[kept, 2:]) - np.maximum(boxes[i, :2], boxes[kept, :2])
        both = np.prod(np.maximum(shared, 0), axis=1)
        if (both <= OVERLAP * (area[i] + area[kept] - both)).all():
            kept.append(int(i))
    return kept


def points(image: Image.Image, box: np.ndarray, estimator: Network) -> np.ndarray:
    """The 133 points of the person in a box: x, y and score (133, 3)."""
    middle, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * AROUND
    step = max(size[0] / CROP[0], size[1] / CROP[1], 1e-6)  # pixels of the image per pixel of the crop
    left, top = middle - step * np.array(CROP) / 2
    crop = image.transform(CROP, Image.Transform.AFFINE, (step, 0, left, 0, step, top), Image.Resampling.BILINEAR)
    across, down = (bins[0] for bins in estimator(normalized(crop)))  # (133, bins) each
    x, y = (bins.argmax(axis=1) / PER_PIXEL * step for bins in (across, down))
    return np.stack([x + left, y + top, np.minimum(across.max(axis=1), down.max(axis=1))], axis=1)


def normalized(image: Image.Image) -> np.ndarray:
    """An image as networks trained on ImageNet take it: (1, 3, H, W) float32."""
    pixels = (np.asarray(image, np.float32) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return pixels.transpose(2, 0, 1)[None]


def drawn(found: list[np.ndarray], width: int, height: int) -> np.ndarray:
    """People's points (133, 3) on a black image: (height, width, 3) uint8."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    unit = min(width, height) / DRAWN_AT

    def dot(at: Point, radius: float, colour: tuple[int, int, int]) -> None:
        (x, y), r = at, max(0.5, radius * unit)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    for person in found:
        body = [_seen(person, i) for i in BODY]
        (x, y), seen = person[SHOULDERS, :2].mean(axis=0), person[SHOULDERS, 2] > SEEN
        body[NECK] = (float(x), float(y)) if seen.all() else None
        for (a, b), colour in zip(LIMBS, COLOURS[: len(LIMBS)], strict=True):
            if (start := body[a]) and (end := body[b]):
                dim = tuple(int(0.6 * part) for part in colour)
                draw.polygon(_stick(start, end, max(0.5, STICK * unit)), fill=dim)
        for at, colour in zip(body, COLOURS, strict=True):
            if at:
                dot(at, DOT, colour)
        for part in HANDS:
            hand = [_seen(person, i) for i in range(part.start, part.stop)]
            for i, (a, b) in enumerate(BONES):
                if (start := hand[a]) and (end := hand[b]):
                    red, green, blue = colorsys.hsv_to_rgb(i / len(BONES), 1, 1)
                    colour = int(255 * red), int(255 * green), int(255 * blue)
                    draw.line([start, end], fill=colour, width=max(1, round(FINGER * unit)))
            for at in filter(None, hand):
                dot(at, DOT, (0, 0, 255))
        face = [at for i in range(FACE.start, FACE.stop) if (at := _seen(person, i))]
        for at in filter(None, [*face, *(body[EYES] if face else ())]):
            dot(at, FACE_DOT, (255, 255, 255))
    return np.asarray(image)


def _seen(person: np.ndarray, i: int) -> Point | None:
    x, y, score = person[i].tolist()
    return (x, y) if score > SEEN else None


def _stick(start: Point, end: Point, half: float) -> list[Point]:
    """An ellipse from start to end, twice `half` wide, as a polygon."""
    (x, y), (dx, dy) = np.mean([start, end], axis=0), np.subtract(end, start) / 2
    length = np.hypot(dx, dy) or 1.0
    turn = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    along, beside = np.cos(turn), np.sin(turn) * half / length
    return list(zip((x + along * dx - beside * dy).tolist(), (y + along * dy + beside * dx).tolist(), strict=True))
