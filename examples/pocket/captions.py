"""Captions in English and Chinese for the scenes of `scenes.py`: many wordings of the same facts."""

from __future__ import annotations

import random

from palette import COLOR_NAMES, SHAPES

COLORS_EN = {"purple": ("purple", "violet"), "gray": ("gray", "grey")}
COLORS_ZH = {
    "red": ("红色", "红"),
    "orange": ("橙色", "橘色"),
    "yellow": ("黄色", "黄"),
    "green": ("绿色", "绿"),
    "blue": ("蓝色", "蓝"),
    "purple": ("紫色", "紫"),
    "pink": ("粉色", "粉红色"),
    "black": ("黑色", "黑"),
    "white": ("白色", "白"),
    "gray": ("灰色", "灰"),
}
SHAPES_EN = {
    "circle": ("circle", "circle", "disc", "dot"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "donut"),
    "cross": ("cross", "cross", "plus sign"),
    "diamond": ("diamond", "rhombus"),
    "heart": ("heart",),
}
SHAPES_ZH = {
    "circle": ("圆形", "圆形", "圆", "圆圈"),
    "square": ("正方形", "方块", "方形"),
    "triangle": ("三角形",),
    "star": ("星星", "五角星", "星形"),
    "ring": ("圆环", "环"),
    "cross": ("十字", "十字形", "加号"),
    "diamond": ("菱形",),
    "heart": ("爱心", "心形"),
}
PLURALS = {"box": "boxes", "cross": "crosses", "rhombus": "rhombuses"}
SIZES_EN = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge"), None: ("",)}
SIZES_ZH = {"small": ("小", "小的", "很小的"), "large": ("大", "大的", "很大的"), None: ("",)}
POSITIONS_EN = {
    "center": ("in the center", "in the middle", "centered"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    "top left": ("in the top left corner", "in the upper left corner", "at the top left"),
    "top right": ("in the top right corner", "in the upper right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "in the lower right corner", "at the bottom right"),
}
POSITIONS_ZH = {
    "center": ("中间", "中央", "正中间"),
    "left": ("左边", "左侧"),
    "right": ("右边", "右侧"),
    "top": ("上方", "顶部", "上面"),
    "bottom": ("下方", "底部", "下面"),
    "top left": ("左上角",),
    "top right": ("右上角",),
    "bottom left": ("左下角",),
    "bottom right": ("右下角",),
}
RELATIONS_EN = {
    "left": ("to the left of", "left of", "on the left side of", "on the left of"),
    "right": ("to the right of", "right of", "on the right side of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
RELATIONS_ZH = {
    "left": ("左边", "左侧", "左面"),
    "right": ("右边", "右侧", "右面"),
    "above": ("上面", "上方", "上边"),
    "below": ("下面", "下方", "下边"),
}
NUMBERS_EN = {2: ("two", "two", "two", "2"), 3: ("three", "three", "three", "3")}
NUMBERS_ZH = {2: ("两个", "两个", "两个", "2个"), 3: ("三个", "三个", "三个", "3个")}
LINES_EN = {"row": (" in a row", " side by side"), "column": (" in a column", " stacked vertically"), None: ("",)}
LINES_ZH = {"row": ("排成一行", "排成一排"), "column": ("排成一列", "竖着排列"), None: ("",)}
SERIES_EN = {
    "row": (" in a row", " from left to right", " side by side"),
    "column": (" in a column", " from top to bottom", " stacked vertically"),
}
SERIES_ZH = {"row": ("排成一行", "排成一排", "从左到右排列"), "column": ("从上到下排列", "排成一列")}
OPENINGS_EN = (
    "",
    "",
    "",
    "",
    "",
    "an image of ",
    "a picture of ",
    "a drawing of ",
    "an icon of ",
    "a simple picture of ",
)
OPENINGS_ZH = ("", "", "", "", "一张图片，", "画面里有", "画", "图中有")
# what people add and the pocket world cannot show: a tenth of the captions end with some of these,
# so that the model learns to ignore them, and to read captions of more than 32 tokens
FLOURISHES_EN = (
    "simple flat shapes",
    "minimalist style",
    "clean edges",
    "high quality",
    "vector art",
    "bright and clear colors",
    "a plain illustration for children",
    "very detailed",
    "as seen in a picture book",
    "no shadows and no texture",
)
FLOURISHES_ZH = (
    "简洁的扁平风格",
    "极简主义",
    "边缘清晰",
    "高质量",
    "矢量插画",
    "色彩鲜明",
    "儿童图画书里的插图",
    "细节丰富",
    "没有阴影和纹理",
)
FLOURISH_SHARE = 0.1


def describe(rng: random.Random, scene) -> str:
    return _describe_zh(rng, scene) if scene.language == "zh" else _describe_en(rng, scene)


def _names(thing) -> tuple[str, str]:
    return SHAPES[thing.shape], COLOR_NAMES[thing.color]


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _plain_en(rng, thing, plural=False) -> str:
    shape, color = _names(thing)
    noun = rng.choice(SHAPES_EN[shape])
    if plural:
        noun = PLURALS.get(noun, noun + "s")
    words = (rng.choice(SIZES_EN[thing.size]), rng.choice(COLORS_EN.get(color, (color,))), noun)
    return " ".join(word for word in words if word)


def _one_en(rng, thing) -> str:
    return _with_article(_plain_en(rng, thing))


def _describe_en(rng, scene) -> str:
    things = scene.things
    if scene.kind == "single":
        core = _one_en(rng, things[0])
        if scene.position:
            core += " " + rng.choice(POSITIONS_EN[scene.position])
    elif scene.kind == "pair":
        relation = rng.choice(RELATIONS_EN[scene.relation])
        first = _one_en(rng, things[0])
        second = "the " + _plain_en(rng, things[1]) if rng.random() < 0.2 else _one_en(rng, things[1])
        core = rng.choice(
            (f"{first} {relation} {second}",) * 3
            + (
                f"{first} is {relation} {second}",
                f"{relation} {second} is {first}",
                f"{relation} {second} there is {first}",
            )
        )
    elif scene.kind == "and":
        joint = rng.choice((" and ", " and ", " next to ", " beside "))
        core = _one_en(rng, things[0]) + joint + _one_en(rng, things[1])
    elif scene.kind == "inside":
        outer, inner = _one_en(rng, things[0]), _one_en(rng, things[1])
        core = rng.choice(
            (
                f"{inner} inside {outer}",
                f"{inner} in {outer}",
                f"{outer} with {inner} inside",
                f"{outer} containing {inner}",
            )
        )
    elif scene.kind == "count":
        number = rng.choice(NUMBERS_EN[len(things)])
        core = f"{number} {_plain_en(rng, things[0], plural=True)}" + rng.choice(LINES_EN[scene.arrangement])
    else:
        first, second, third = (_one_en(rng, thing) for thing in things)
        core = rng.choice((f"{first}, {second} and {third}", f"{first}, {second}, {third}"))
        core += rng.choice(SERIES_EN[scene.arrangement])
    return _finish_en(rng, scene, core)


def _finish_en(rng, scene, core) -> str:
    opening = rng.choice(OPENINGS_EN)
    if scene.background_is_named:
        name = COLOR_NAMES[scene.background]
        color = rng.choice(COLORS_EN.get(name, (name,)))
        ground = _with_article(color) + " background"
        text = rng.choice(
            (
                f"on {ground}, {core}",
                f"{opening}{core}, {color} background",
                f"{opening}{core} with {ground}",
                f"{opening}{core} against {ground}",
                f"{opening}{core} on {ground}",
                f"{opening}{core} on {ground}",
            )
        )
    else:
        text = opening + core
    if rng.random() < FLOURISH_SHARE:
        text = ", ".join((text, *rng.sample(FLOURISHES_EN, rng.randint(2, 5))))
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.3 else "")


def _plain_zh(rng, thing) -> str:
    shape, color = _names(thing)
    color = rng.choice(COLORS_ZH[color])
    of = "的" if len(color) > 1 and rng.random() < 0.5 else ""
    return rng.choice(SIZES_ZH[thing.size]) + color + of + rng.choice(SHAPES_ZH[shape])


def _one_zh(rng, thing) -> str:
    return "一个" + _plain_zh(rng, thing)


def _describe_zh(rng, scene) -> str:
    things = scene.things
    if scene.kind == "single":
        core = _one_zh(rng, things[0])
        if scene.position:
            place = rng.choice(POSITIONS_ZH[scene.position])
            core = rng.choice((f"{core}在{place}", f"{core}在{place}", f"{place}有{core}"))
    elif scene.kind == "pair":
        relation = rng.choice(RELATIONS_ZH[scene.relation])
        first, second = _one_zh(rng, things[0]), rng.choice(("一个", "")) + _plain_zh(rng, things[1])
        core = rng.choice(
            (f"{first}在{second}的{relation}", f"{second}的{relation}有{first}", f"{first}在{second}{relation}")
        )
    elif scene.kind == "and":
        core = _one_zh(rng, things[0]) + rng.choice(("和", "与", "，旁边是")) + _one_zh(rng, things[1])
    elif scene.kind == "inside":
        outer, inner = _one_zh(rng, things[0]), _one_zh(rng, things[1])
        core = rng.choice((f"{inner}在{outer}里面", f"{inner}在{outer}的中间", f"{outer}里面有{inner}"))
    elif scene.kind == "count":
        core = rng.choice(NUMBERS_ZH[len(things)]) + _plain_zh(rng, things[0])
        core += rng.choice(LINES_ZH[scene.arrangement])
    else:
        first, second, third = (_one_zh(rng, thing) for thing in things)
        core = rng.choice((f"{first}、{second}和{third}", f"{first}，{second}和{third}"))
        core += rng.choice(SERIES_ZH[scene.arrangement])
    return _finish_zh(rng, scene, core)


def _finish_zh(rng, scene, core) -> str:
    opening = rng.choice(OPENINGS_ZH)
    if scene.background_is_named:
        color = COLORS_ZH[COLOR_NAMES[scene.background]][0]
        text = rng.choice(
            (
                f"{color}背景上有{core}" if core[0] in "一两三" else f"{color}背景，{core}",
                f"{color}背景，{core}",
                f"{opening}{core}，{color}背景",
                f"{opening}{core}，{color}的背景",
            )
        )
    else:
        text = opening + core
    if rng.random() < FLOURISH_SHARE:
        text = "，".join((text, *rng.sample(FLOURISHES_ZH, rng.randint(2, 5))))
    return text + ("。" if rng.random() < 0.3 else "")
