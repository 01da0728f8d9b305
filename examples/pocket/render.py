"""Renders scenes: anti-aliased shapes from signed distances, with numpy or PyTorch.

`xp` is the array module, numpy (ground truth for the judge) or torch (training, on any
device); the few functions used here have the same names in both.
"""

from __future__ import annotations

import math

import numpy as np
from palette import WIDER
from scenes import Scene, pack


def signed_distance(shape, x, y, xp=np):
    """Distance to the outline, negative within, in units of the radius.

    shape indexes WIDER.shapes and broadcasts against x and y, which are relative to the centre
    and in units of the radius, y downwards. Exact for the circle and the ring, elsewhere
    accurate near the outline, which is where anti-aliasing reads it.
    """
    across, down, from_centre = xp.abs(x), xp.abs(y), xp.sqrt(x * x + y * y + 1e-9)
    distances = {
        "circle": from_centre - 1.0,
        "square": xp.maximum(across, down) - 0.88,
        "triangle": xp.maximum(y - 0.78, (1.78 * across - 0.98 * y) / 2.0320 - 0.48229),
        "star": _star(across, y, from_centre, xp),
        "ring": xp.abs(from_centre - 0.76) - 0.24,
        "cross": xp.minimum(xp.maximum(across - 0.32, down - 0.95), xp.maximum(across - 0.95, down - 0.32)),
        "diamond": (across / 0.78 + down / 1.05 - 1.0) / math.hypot(1 / 0.78, 1 / 1.05),
        "heart": _heart(across, y, xp),
        "oval": _oval(x, y, xp),
    }
    distance = distances["circle"]
    for index, name in enumerate(WIDER.shapes):
        distance = xp.where(shape == index, distances[name], distance)
    return distance


def _star(across, y, from_centre, xp):
    wedge, outer, inner = math.pi / 5, 1.05, 0.44
    angle = xp.arctan2(across, -y)
    angle = xp.abs(xp.remainder(angle + wedge, 2 * wedge) - wedge)  # folded onto one point of the star
    u, v = from_centre * xp.sin(angle), from_centre * xp.cos(angle)
    edge_u, edge_v = inner * math.sin(wedge), inner * math.cos(wedge) - outer
    return ((v - outer) * edge_u - u * edge_v) / math.hypot(edge_u, edge_v)


def _heart(across, y, xp):
    """Inigo Quilez's heart, scaled to a radius of about one."""
    scale = 0.60
    u, v = across * scale, 0.54 - y * scale
    lobe = xp.sqrt((u - 0.25) ** 2 + (v - 0.75) ** 2 + 1e-9) - math.sqrt(2) / 4
    foot = 0.5 * xp.clip(u + v, 0, None)
    to_top, to_foot = u**2 + (v - 1) ** 2, (u - foot) ** 2 + (v - foot) ** 2
    tip = xp.sqrt(xp.minimum(to_top, to_foot) + 1e-9) * xp.sign(u - v)
    return xp.where(u + v > 1, lobe, tip) / scale


def _oval(x, y, xp):
    """An ellipse that lies on its side."""
    across, down = x / 1.05, y / 0.66
    from_centre = xp.sqrt(across**2 + down**2 + 1e-9)
    return from_centre * (from_centre - 1) / xp.sqrt((across / 1.05) ** 2 + (down / 0.66) ** 2 + 1e-9)


def coverage(shapes, circles, width, height, xp=np, **where):
    """How much of each pixel an object covers, 0 to 1: (n, height, width).

    shapes (n,) with -1 for none; circles (n, 3): x, y, radius in pixels. `where` goes to
    xp.arange (torch's device).
    """
    columns, rows = (xp.arange(size, dtype=xp.float32, **where) + 0.5 for size in (width, height))
    x, y, radius = (circles[:, i, None, None] for i in range(3))
    distance = signed_distance(
        shapes[:, None, None], (columns[None, None] - x) / radius, (rows[None, :, None] - y) / radius, xp
    )
    covered = xp.clip(0.5 - distance * radius, 0, 1)
    return xp.where(shapes[:, None, None] >= 0, covered, 0 * covered)


def paint(shapes, circles, colors, background, width, height, xp=np, **where):
    """Images (n, 3, height, width), in the units of colors.

    shapes (n, k), circles (n, k, 3), colors (n, k, 3), background (n, 3) or an image; later
    objects lie on top.
    """
    image = background if background.ndim == 4 else background[:, :, None, None]
    for k in range(shapes.shape[1]):
        covered = coverage(shapes[:, k], circles[:, k], width, height, xp, **where)[:, None]
        image = image * (1 - covered) + colors[:, k, :, None, None] * covered
    return image


def ground_truth(scenes: list[Scene]) -> list[np.ndarray]:
    """A perfect image of every scene: (height, width, 3) uint8."""
    images, palette = [], WIDER.palette
    for scene in scenes:
        world = pack([scene])
        image = paint(
            world["shapes"],
            world["circles"],
            palette[world["colors"]],
            palette[world["backgrounds"]],
            scene.width,
            scene.height,
        )
        images.append(image[0].transpose(1, 2, 0).round().astype(np.uint8))
    return images
