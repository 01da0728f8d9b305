"""Draws the README's picture with mlx_zimage: python examples/pocket/picture.py CHECKPOINT OUT.png"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from evaluate import draw_with_mlx
from PIL import Image

SEED, HEIGHT, MARGIN = 1, 128, 8
# two rows of equal width: prompt, width
ROWS = (
    (
        ("a yellow star above a blue circle on a black background", 128),
        ("三个红色的爱心排成一行，粉色背景", 192),
        ("a small white square inside a large purple circle on a yellow background", 128),
    ),
    (
        ("a green triangle, an orange square and a red diamond in a row", 192),
        ("蓝色背景，一个很大的白色圆环在中间", 128),
        ("a small black cross in the top right corner on an orange background", 128),
    ),
)


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:])
    draw = draw_with_mlx(checkpoint)
    rows = []
    for row in ROWS:
        pictures = [draw([prompt], width, HEIGHT, [SEED])[0] for prompt, width in row]
        margins = ((MARGIN // 2,) * 2, (MARGIN // 2,) * 2, (0, 0))
        rows.append(np.concatenate([np.pad(one, margins, constant_values=255) for one in pictures], axis=1))
    Image.fromarray(np.concatenate(rows)).save(out)


if __name__ == "__main__":
    main()
