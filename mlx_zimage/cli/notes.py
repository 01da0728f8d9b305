"""Notes on valid requests of which some part changes nothing, or makes the image blank or worse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..request import GenerateRequest
    from ..weights.checkpoint import Checkpoint

# Every word and character of the captions that pocket was trained on: examples/pocket/captions.py.
WORDS = """
a above against an and art as at background below beneath beside big black blue book bottom box boxes bright by center
centered children circle circles clean clear colors column containing corner cross crosses detailed diamond diamonds
disc discs donut donuts dot dots drawing edges flat for from gray green grey heart hearts high huge icon illustration
image in inside is large left little lower middle minimalist next no of on orange over part picture pink plain plus
purple quality red rhombus rhombuses right ring rings row seen shadows shapes side sign signs simple small square
squares stacked star stars style texture the there three tiny to top triangle triangles two under upper vector
vertically very violet white with yellow 2 3
"""
POCKET_WORDS = frozenset(WORDS.split())
POCKET_CHARACTERS = frozenset(
    "一三上下与两个中丰主义书五从侧儿列到加十右号和图圆圈在块大央字富小左平底张形彩影很心成扁排插方旁明星是景晰有极格橘橙"
    "正没洁清灰爱片环理画白的着矢竖童简粉紫红纹细绿缘背色节菱蓝行角质边部里量间阴面顶风高鲜黄黑"
)
POCKET_SHAPES = re.compile(
    r"\b(circle|disc|dot|square|box(es)?|triangle|star|ring|donut|cross(es)?|plus|diamond|rhombus(es)?|heart)s?\b"
    "|圆|方形|方块|三角形|星|环|十字|加号|菱形|爱心|心形"
)
# It was trained at 128x128 to 192x128 and 160x160. At 112x112, 176x96, 224x128 and 208x208, judge.py accepts nearly all
# images of single shapes; at 96x96, 128x64 and 224x224, none.
POCKET_LEAST_SIDE, POCKET_PIXELS = 96, (112**2, 208**2)
POCKET_KNOWS = (
    "it knows circles, squares, triangles, stars, rings, crosses, diamonds and hearts in red, orange, yellow, green, "
    "blue, purple, pink, black, white and gray (in Chinese: 圆形 正方形 三角形 星星 圆环 十字 菱形 爱心); "
    "anything else needs the real model"
)


def notes(request: GenerateRequest, checkpoint: Checkpoint) -> Iterator[str]:
    """The notes on a request that a model is about to run."""
    yield from checkpoint.variant.notes(
        request.guidance_scale or 0.0, request.negative_prompt, request.cfg_normalization, request.cfg_truncation
    )
    if is_pocket(checkpoint):
        unknown = unknown_to_pocket(request.prompt)
        if unknown:
            words = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            yield f"pocket does not know {words}, so the image may be blank; {POCKET_KNOWS}"
        elif not POCKET_SHAPES.search(request.prompt.lower()):
            yield f"the prompt names none of pocket's shapes, so the image may be blank; {POCKET_KNOWS}"
        width, height, _ = request.extent
        (low, high), side = POCKET_PIXELS, checkpoint.vae.config.sample_size
        fits = min(width, height) >= POCKET_LEAST_SIDE and low <= width * height <= high
        refined = request.image is not None and request.upscale is not None  # in tiles of the size that it knows
        if not fits and not refined:
            yield (
                f"pocket knows sizes near 128x128, 192x128 and 160x160, so an image of {width}x{height} may be blank; "
                f"try --size {side}x{side}"
            )


def is_pocket(checkpoint: Checkpoint) -> bool:
    from ..weights.checkpoint import origins
    from ..weights.hub import POCKET

    return checkpoint.folder == POCKET or "pocket" in origins(checkpoint.folder)


def unknown_to_pocket(prompt: str) -> list[str]:
    """The words, or Chinese characters, that are in no caption that pocket was trained on, in order."""
    found = re.findall(r"[\u3400-\u9fff]|(?:(?![\u3400-\u9fff])[^\W_])+", prompt.lower())
    return list(dict.fromkeys(word for word in found if word not in POCKET_WORDS | POCKET_CHARACTERS))
