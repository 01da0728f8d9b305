"""A dataset is read whole, and refused whole, before anything is computed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_zimage import RequestError
from mlx_zimage.images.source import fit_size
from mlx_zimage.train.dataset import Example, order_of, read_dataset


def write(folder, name: str, size=(64, 48), caption: str | None = "a cat", mode: str = "RGB") -> None:
    pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def refused(folder, **options) -> str:
    with pytest.raises(RequestError) as caught:
        read_dataset(folder, 512, **options)
    return str(caught.value)


def test_images_are_read_with_the_captions_in_files_of_the_same_name(tmp_path):
    write(tmp_path, "b.png", caption="a dog\n")
    write(tmp_path, "a.jpg", caption="a cat of 猫")
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / "._b.png").write_bytes(b"macOS")
    found = read_dataset(tmp_path, 512)
    assert [(e.file.name, e.caption, e.repeats) for e in found] == [("a.jpg", "a cat of 猫", 1), ("b.png", "a dog", 1)]


def test_metadata_jsonl_gives_captions_and_repeats(tmp_path):
    for name in ("a.png", "b.png"):
        write(tmp_path, name, caption=None)
    rows = [{"file_name": "a.png", "text": "x", "repeats": 3}, {"file_name": "b.png", "prompt": " y "}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = read_dataset(tmp_path, 512)
    assert [(e.caption, e.repeats) for e in found] == [("x", 3), ("y", 1)]
    assert order_of(found) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "size, resolution, expected",
    [((64, 48), 512, (64, 48)), ((70, 50), 512, (64, 48)), ((128, 128), 64, (64, 64)), ((200, 50), 64, (128, 32))],
)
def test_images_are_scaled_down_to_multiples_of_16_and_never_enlarged(tmp_path, size, resolution, expected):
    for name in ("a.png", "b.png"):
        write(tmp_path, name, size=size)
    assert {(e.width, e.height) for e in read_dataset(tmp_path, resolution)} == {expected}


def test_an_image_scaled_down_later_has_the_size_it_would_have_been_read_at():
    random = np.random.default_rng(0)
    for width, height, resolution in zip(*random.integers((200, 200, 16), (4000, 4000, 32), (1000, 3)).T, strict=True):
        size = int(width), int(height)
        example = Example(Path(), size, *fit_size(size, 512**2), "", "a cat").within(16 * int(resolution))
        assert (example.width, example.height) == fit_size(size, (16 * int(resolution)) ** 2)
        assert example.within(512) == example


def test_images_of_all_modes_are_used(tmp_path):
    for mode, name in (("L", "a.png"), ("P", "b.png"), ("RGBA", "c.png"), ("CMYK", "d.jpg"), ("1", "e.png")):
        write(tmp_path, name, mode=mode)
    assert len(read_dataset(tmp_path, 512)) == 5


def test_the_trigger_word_replaces_its_placeholder(tmp_path):
    write(tmp_path, "a.png", caption="a photo of [trigger], [trigger]")
    write(tmp_path, "b.png", caption="a dog")
    assert [e.caption for e in read_dataset(tmp_path, 512, "sks")] == ["a photo of sks, sks", "a dog"]
    assert "--trigger" in refused(tmp_path)
    (tmp_path / "a.txt").write_text("a photo")
    assert re.search("no caption .* contains .trigger.", refused(tmp_path, trigger="sks"))


def test_all_broken_images_are_named(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        write(tmp_path, name)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:200])
    (tmp_path / "c.png").write_text("text")
    write(tmp_path, "d.png", size=(1, 1))
    message = refused(tmp_path)
    assert "3 of 4 images" in message and all(name in message for name in ("b.png", "c.png", "d.png", "1x1"))
    assert "a.png" not in message


def test_missing_and_empty_captions_are_refused_by_name(tmp_path):
    write(tmp_path, "a.png", caption=None)
    write(tmp_path, "b.png")
    assert "images without a caption (1 of 2): a.png; write a caption for each in" in refused(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    assert "a.png" in refused(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert "UTF-8" in refused(tmp_path)


def test_a_folder_without_enough_images_is_refused(tmp_path):
    assert "has 0 images; training needs at least 2" in refused(tmp_path)
    write(tmp_path, "a.png")
    assert "has 1 image; training needs" in refused(tmp_path)
    assert "is not a folder" in refused(tmp_path / "a.png")


@pytest.mark.parametrize(
    "row, said",
    [
        ("{", "line 1 is not valid JSON"),
        ("[]", "expected an object"),
        ('{"file_name": 3}', "expected an object"),
        ('{"file_name": "a.png", "text": 3}', "expected text"),
        ('{"file_name": "a.png", "text": "x", "repeats": 0}', "repeats must be"),
        ('{"file_name": "a.png", "text": "x", "repeats": 10000000000}', "repeats must be"),
        ('{"file_name": "../a.png", "text": "x"}', "outside the folder"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "line 1: 'a\\x00.png' is not the name of a file"),
        ('{"file_name": "\\ud800.png", "text": "x"}', "is not the name of a file"),
    ],
)
def test_wrong_lines_of_metadata_are_refused_by_number(tmp_path, row, said):
    (tmp_path / "metadata.jsonl").write_text(row)
    assert said in refused(tmp_path)


def test_images_without_a_line_in_metadata_are_refused_by_name(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path, name, caption=None)
    rows = [json.dumps({"file_name": name, "text": "a cat"}) for name in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    said = refused(tmp_path)
    assert "images without a line in" in said and "(1): c.png; add a line for each, or remove them" in said


def test_a_caption_in_utf_16_is_refused(tmp_path):
    for name in ("a.png", "b.png"):
        write(tmp_path, name)
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-16-le")
    assert "a.txt is not UTF-8 text (it contains null characters); save it as UTF-8" in refused(tmp_path)


def test_texts_in_metadata_may_contain_line_breaks_of_unicode(tmp_path):
    for i in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    texts = ["a\u2028b", "c\u0085d"]
    rows = [json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "metadata.jsonl").write_bytes(end.join(rows).encode())
        assert [example.caption for example in read_dataset(tmp_path, 64)] == texts
