import io
import json
import os
from itertools import chain
from pathlib import Path

import pytest

from mlx_zimage import drafts
from mlx_zimage.drafts import (
    Draft,
    lines_of,
    multiply,
    parse_seeds,
    parse_size,
    read_prompts,
    read_requests,
    read_text,
    size_of_ratio,
)
from mlx_zimage.errors import RequestError
from mlx_zimage.request import GenerateRequest


def lines(text: str) -> list[str]:
    return list(lines_of(io.BytesIO(text.encode()), "f"))


def test_every_seed_is_combined_with_every_prompt():
    made = list(chain(*multiply({"steps": 4}, [{"prompt": "a"}, {"prompt": "b", "steps": 2}], [1, 2], Path("x.png"))))
    assert [(draft.n, draft.values["prompt"], draft.values["seed"], draft.values["steps"]) for draft in made] == [
        (1, "a", 1, 4), (2, "a", 2, 4), (3, "b", 1, 2), (4, "b", 2, 2),
    ]  # fmt: skip


def test_a_prompts_own_values_override_all_others():
    own = {"prompt": "a", "seed": 9, "width": 64, "height": 32, "output": "y.png"}
    ((draft,),) = multiply({"prompt": "b", "width": 16}, [own], [1, 2], Path("x.png"), (3, 2))
    request = draft.request(128)
    assert (request.prompt, request.seed, request.width, request.height) == ("a", 9, 64, 32)
    assert draft.output == Path("y.png")


def test_a_missing_size_is_left_to_the_model_except_for_its_ratio():
    assert (Draft({"prompt": "a", "seed": 1}, Path("x.png")).request(128)).width is None
    assert (Draft({"prompt": "a", "seed": 1}, Path("x.png"), ratio=(1, 2)).request(128)).height == 176


@pytest.mark.parametrize(
    ("aspect", "size"),
    [("1:1", (1024, 1024)), ("3:2", (1248, 832)), ("2:3", (832, 1248)), ("16:9", (1360, 768)), ("21:9", (1568, 672))],
)
def test_aspect_ratios_keep_about_the_models_number_of_pixels(aspect, size):
    _, ratio = parse_size(aspect)
    assert size_of_ratio(ratio, 1024) == size
    assert abs(size[0] * size[1] / 1024**2 - 1) < 0.02


def test_a_size_in_pixels_is_used_exactly():
    assert parse_size("1280X720") == ({"width": 1280, "height": 720}, None)


@pytest.mark.parametrize("text", ["", "3", "3:0", "0:1", "9:1", "a:b", "1:1:1", "-1:1", "1280 x 720", "١:١"])
def test_an_invalid_size_is_refused(text):
    with pytest.raises(RequestError, match=r"3:2|8:1"):
        parse_size(text)


def test_count_adds_consecutive_seeds_to_each():
    assert parse_seeds("7") == [7]
    assert parse_seeds("1,2, 5") == [1, 2, 5]
    (series,) = multiply({}, [{"prompt": "a"}], [10, 20], Path("x.png"), count=2)
    assert series.seeds == (10, 11, 20, 21)
    with pytest.raises(RequestError, match="whole numbers"):
        parse_seeds("1-5")
    for text in ("۵", "1_0", "1,,2", ""):
        with pytest.raises(RequestError, match="seed must be one or more whole numbers"):
            parse_seeds(text)
    for count in (0, 100_001, True, "2", 1.5):
        with pytest.raises(RequestError, match="count must be from 1"):
            multiply({}, [{"prompt": "a", "count": count}], [1], Path("x.png"))


def test_a_request_may_use_the_names_of_the_command_line():
    wide, large = multiply(
        {"width": 64, "height": 64},
        [{"prompt": "a", "size": "2:1", "guidance": 3, "count": 2, "seed": 5}, {"prompt": "b", "size": "96x32"}],
        [1],
        Path("x.png"),
    )
    assert [draft.request(128) for draft in wide] == [
        GenerateRequest("a", width=176, height=96, seed=seed, guidance_scale=3) for seed in (5, 6)
    ]
    assert [draft.request(128) for draft in large] == [GenerateRequest("b", width=96, height=32, seed=1)]
    for twice in ({"size": "1:1", "width": 64}, {"guidance": 1, "guidance_scale": 1}):
        with pytest.raises(RequestError, match=r"line 1: (size|guidance) cannot be combined with"):
            read_requests(lines(json.dumps({"prompt": "a", **twice})), "f")


def test_too_many_images_are_refused_before_any_is_planned():
    with pytest.raises(RequestError, match="more than 100000 images in one call"):
        multiply({}, ({"prompt": "a"} for _ in range(10**9)), [1], Path("x.png"), count=50_000)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("a.png", "a.png"),
        ("{seed}-{n}-{width}x{height}-{steps}.png", "7-3-64x32-8.png"),
        ("{prompt}.png", "a-cat-it-s-一只猫.png"),
        ("{width}x{height}/{prompt}/{seed}.png", "64x32/a-cat-it-s-一只猫/7.png"),
        ("{{seed}}%d.png", "{seed}%d.png"),
        ("}{.png", "}{.png"),
    ],
)
def test_placeholders_in_folders_are_filled_in_too_and_doubled_braces_become_single_ones(template, name):
    draft = Draft(
        {"prompt": "a cat, it's: ../一只猫\n", "seed": 7, "width": 64, "height": 32, "steps": 8},
        Path("dir") / template,
        3,
    )
    assert draft.path(draft.request(128)) == Path("dir") / name


@pytest.mark.parametrize(
    "prompt", ["/", "..", "\0", "a/../../b", "~", "-rf", "猫" * 5000, "%n" * 100, "🙂🙂", "con\u202egnp"]
)
def test_any_prompt_gives_a_file_name_in_the_same_folder(tmp_path, prompt):
    draft = Draft({"prompt": prompt, "seed": 1}, tmp_path / "{prompt}{prompt}{prompt}{prompt}.png")
    path = draft.path(draft.request(128))
    assert path.parent == tmp_path
    assert len(os.fsencode(path.name)) <= 210
    path.write_bytes(b"")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("template", ["{sed}.png", "{seed.__class__}.png", "{0}.png", "{}.png", "{model}/a.png"])
def test_an_unknown_placeholder_is_refused_with_those_that_exist(template):
    with pytest.raises(RequestError, match=r"contains \{.*the placeholders are \{prompt\}, \{seed\}, \{n\}"):
        Draft({"prompt": "a", "seed": 1}, Path(template)).path(GenerateRequest("a", 64, 64, 1, 8))


def test_only_newlines_and_carriage_returns_end_a_line():
    line = "a\u2028b\u2029c\x85d\ve\ff\x1cg"
    assert read_prompts(lines(f"{line}\nb\r\nc\rd"), "f") == {
        i: {"prompt": text} for i, text in enumerate((line, "b", "c", "d"), start=1)
    }
    (request,) = read_requests(lines(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False)), "f").values()
    assert request == {"prompt": "a\u2028b\x85c"}


def test_seeds_from_an_iterator_serve_every_prompt():
    made = chain(*multiply({}, [{"prompt": "a"}, {"prompt": "b"}], iter([1, 2]), Path("x.png")))
    assert [(own.values["prompt"], own.values["seed"]) for own in made] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_prompts_are_read_one_per_line():
    assert read_prompts(lines("a cat\n\n# a note\r\n 一只狗 \n"), "f") == {
        1: {"prompt": "a cat"},
        4: {"prompt": "一只狗"},
    }
    with pytest.raises(RequestError, match="contains no prompts"):
        read_prompts(lines("\n# only notes\n"), "f")


def test_requests_are_read_one_object_per_line():
    assert read_requests(lines('{"prompt": "a", "seed": 1}\n\n{"output": "b.png"}\n'), "f") == {
        1: {"prompt": "a", "seed": 1},
        3: {"output": "b.png"},
    }
    for text, message in (
        ("", "no request"),
        ("{}\n{", "line 2 is not valid JSON"),
        ("[1]", "line 1 must be a JSON object, got list"),
        ('{"widht": 64}', "line 1: unknown field 'widht'; the fields are"),
        ('{"image_strength": 0.4}', "unknown field 'image_strength'; use strength, which is the opposite"),
        ('{"output": 1}', "output must be a file name"),
        ('{}\n{"size": "wide"}', "line 2: size must be an aspect ratio"),
        ('{"count": 0}', "line 1: count must be from 1"),
        ('{"output": "a\\u0000.png"}', "output must be a file name"),
        ('{"output": "\\ud800.png"}', "output must be a file name"),
        ("[" * 100_000, "line 1 is not valid JSON"),
    ):
        with pytest.raises(RequestError, match=message):
            read_requests(lines(text), "f")


def test_lines_are_the_same_however_they_are_read(monkeypatch):
    text = "\ufeffa\r\n\r\rb 猫\n\nc\r\nd\r"
    whole = lines(text)
    assert whole == ["a", "", "", "b 猫", "", "c", "d", ""]
    for size in range(1, 12):
        monkeypatch.setattr(drafts, "CHUNK", size)
        assert lines(text) == whole, size


def test_prompt_files_must_be_utf_8_and_not_too_large(monkeypatch):
    with pytest.raises(RequestError, match=r"f, line 2 is not UTF-8 text \(byte 3\)"):
        list(lines_of(io.BytesIO(b"a\nbc\xff"), "f"))
    assert read_text(io.BytesIO("\ufeffa 猫".encode()), "f") == "a 猫"
    with pytest.raises(RequestError, match="not UTF-8 text"):
        read_text(io.BytesIO(b"\xff"), "f")
    monkeypatch.setattr(drafts, "MAX_FILE", 10)
    with pytest.raises(RequestError, match="larger than"):
        lines("x" * 11)
    with pytest.raises(RequestError, match="f has more than"):
        monkeypatch.setattr(drafts, "MAX_IMAGES", 2)
        read_prompts(lines("a\nb\nc"), "f")
    with pytest.raises(RequestError, match="line 1 is longer than"):
        monkeypatch.setattr(drafts, "MAX_LINE", 3)
        lines("xxxx")
    with pytest.raises(RequestError, match="more than 1 values"):
        monkeypatch.setattr(drafts, "MAX_PARTS", 1)
        read_requests(['{"prompt": "a", "seed": 1, "steps": 2}'], "f")
