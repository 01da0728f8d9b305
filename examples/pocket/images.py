"""Generate the two figures of README.md: python examples/pocket/images.py CHECKPOINT DIR

DIR/images.png shows the six prompts below; DIR/sheet.png sixty new held-out ones, not selected, with a
magenta frame around those that the judge calls wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from evaluate import Generate, generate_with_mlx, images_of
from judge import Verdict, judge
from PIL import Image
from scenes import held_out_scenes

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
SHEET_SEED, SHEET_COUNT, COLUMNS = 60, 60, 10


def six_images(generate: Generate) -> np.ndarray:
    rows = []
    for row in ROWS:
        images = [generate([prompt], width, HEIGHT, [SEED])[0] for prompt, width in row]
        margins = ((MARGIN // 2,) * 2, (MARGIN // 2,) * 2, (0, 0))
        rows.append(np.concatenate([np.pad(one, margins, constant_values=255) for one in images], axis=1))
    return np.concatenate(rows)


def contact_sheet(images: list[np.ndarray], verdicts: list[Verdict]) -> np.ndarray:
    """Images of one size in rows; with a magenta frame around the wrong ones."""
    framed = []
    for image, verdict in zip(images, verdicts, strict=True):
        frame = np.full(np.add(image.shape, (6, 6, 0)), 255, np.uint8)
        if not verdict.is_right:
            frame[:] = (255, 0, 255)
        frame[3:-3, 3:-3] = image
        framed.append(frame)
    framed += [np.full_like(framed[0], 255)] * (-len(framed) % COLUMNS)
    rows = [np.concatenate(framed[i : i + COLUMNS], axis=1) for i in range(0, len(framed), COLUMNS)]
    return np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-n", "--count", type=int, default=SHEET_COUNT, help="images on the sheet")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    generate = generate_with_mlx(options.checkpoint)
    Image.fromarray(six_images(generate)).save(options.folder / "images.png")
    scenes = held_out_scenes(options.count, SHEET_SEED, (HEIGHT, HEIGHT))
    images = images_of(generate, scenes, SHEET_SEED)
    verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
    Image.fromarray(contact_sheet(images, verdicts)).save(options.folder / "sheet.png")
    print(f"{sum(verdict.is_right for verdict in verdicts)} of {len(verdicts)} right")
    for number, (scene, verdict) in enumerate(zip(scenes, verdicts, strict=True), 1):
        if not verdict.is_right:
            print(f"wrong, number {number}: {scene.caption}")


if __name__ == "__main__":
    main()
