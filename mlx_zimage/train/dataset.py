"""A folder of captioned images, read and checked before anything is computed.

Captions are in .txt files named like the images, or in metadata.jsonl, one image per line:

    {"file_name": "cat.png", "text": "a photo of [trigger]", "repeats": 2}

"prompt" or "caption" may take the place of "text". `[trigger]` in a caption is replaced by the trigger word. An image
is scaled down to at most resolution x resolution pixels and cropped to sides that are multiples of 16, never enlarged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import RequestError
from ..images.source import digest, fit_size, over_white, read_image
from ..request import SIZE_MULTIPLE
from ..sizes import counted
from ..untrusted import brief, parse_json, read_bytes
from .settings import check_count

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".heif")
TEXTS = ("text", "prompt", "caption")
TRIGGER = "[trigger]"
LEAST = 2  # images
MAX_REPEATS = 1000
NAMED = 5  # files that a message names at most


@dataclass(frozen=True)
class Example:
    """An image, its own size, the size at which it is used, the digest of its pixels, its caption, and its repeats in
    one pass."""

    file: Path
    size: tuple[int, int]
    width: int
    height: int
    digest: str
    caption: str
    repeats: int = 1

    def within(self, resolution: int) -> Example:
        """The same image, as if it had been read at this resolution, if that is lower."""
        width, height = fit_size(self.size, resolution**2)
        return self if width * height >= self.width * self.height else replace(self, width=width, height=height)


def read_dataset(folder: Path, resolution: int, trigger: str | None = None) -> list[Example]:
    """The examples of a folder, ordered by name; RequestError names everything that is wrong with it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder; give one with images and their captions")
    captions = list(_captions(folder))
    if len(captions) < LEAST:
        raise RequestError(f"{folder} has {counted(len(captions), 'image')}; training needs at least {LEAST}")
    bare = [file for file, text, _ in captions if text is None]
    if bare:
        if (folder / METADATA).exists():
            way = f'add a "text" field to the line for each image in {METADATA}'
        else:
            name = bare[0].with_suffix(".txt").name
            way = f"write a caption for each in a .txt file of the same name, such as {name}"
        raise RequestError(f"images without a caption ({len(bare)} of {len(captions)}): {_some(bare)}; {way}")
    empty = [file for file, text, _ in captions if not text]
    if empty:
        raise RequestError(
            f"images with an empty caption ({len(empty)} of {len(captions)}): {_some(empty)}; describe them"
        )
    texts = _with_trigger([str(text) for _, text, _ in captions], trigger, folder)
    examples, broken = [], []
    for (file, _, repeats), text in zip(captions, texts, strict=True):
        try:
            image = over_white(read_image(file))
        except RequestError as error:
            broken.append(str(error))
            continue
        if min(image.size) < SIZE_MULTIPLE:
            broken.append(f"{file} has {image.width}x{image.height} pixels, fewer than {SIZE_MULTIPLE} on a side")
            continue
        width, height = fit_size(image.size, resolution**2)
        examples.append(Example(file, image.size, width, height, digest(image), text, repeats))
    if broken:
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise RequestError(
            f"{len(broken)} of {len(captions)} images cannot be used: {'; '.join(broken[:NAMED])}{more}. Replace or "
            f"remove them"
        )
    return examples


def order_of(examples: Sequence[Example]) -> list[int]:
    """The index of each example, as many times as it is repeated in one pass."""
    return [i for i, example in enumerate(examples) for _ in range(example.repeats)]


def _captions(folder: Path) -> Iterator[tuple[Path, str | None, int]]:
    """Each image with its caption, if it has one, and its repeats."""
    if (folder / METADATA).exists():
        yield from _listed(folder / METADATA)
        return
    for file in _images(folder):
        text = file.with_suffix(".txt")
        yield file, _text(text) if text.exists() else None, 1


def _images(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES and file.name[0] != "."]


def _listed(file: Path) -> Iterator[tuple[Path, str | None, int]]:
    listed: list[Path] = []
    for number, line in enumerate(re.split(r"\r\n?|\n", _text(file)), 1):  # JSON strings may contain others
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode())
        except ValueError as error:
            raise RequestError(f"{file}, line {number} is not valid JSON ({error})") from error
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise RequestError(f'{file}, line {number}: expected an object with a "file_name" but got {brief(row)}')
        image, text, repeats = file.parent / name, _first(row), row.get("repeats", 1)
        try:
            is_inside = image.resolve().is_relative_to(file.parent.resolve())
        except ValueError as error:  # such as null characters
            raise RequestError(f"{file}, line {number}: {brief(name)} is not the name of a file") from error
        if not is_inside:
            raise RequestError(f"{file}, line {number}: {name} is outside the folder")
        if text is not None and not isinstance(text, str):
            raise RequestError(f"{file}, line {number}: expected text but got {brief(text)}")
        check_count(f"{file}, line {number}: repeats", repeats, most=MAX_REPEATS)
        listed.append(image)
        yield image, text if text is None else text.strip(), repeats
    if not all(image.exists() for image in listed):  # refused by name when they are read
        return
    known = set(map(_identity, listed))
    others = [image for image in _images(file.parent) if _identity(image) not in known]
    if others:
        raise RequestError(
            f"images without a line in {file} ({len(others)}): {_some(others)}; add a line for each, or remove them"
        )


def _identity(file: Path) -> tuple[int, int]:
    """Equal for two names of one file: a Mac's disk may ignore case."""
    found = file.stat()
    return found.st_dev, found.st_ino


def _first(row: dict) -> object:
    return next((row[key] for key in TEXTS if key in row), None)


def _text(file: Path) -> str:
    try:
        text = read_bytes(file).decode("utf-8-sig").strip()
        if "\0" in text:  # as in UTF-16
            raise ValueError("it contains null characters")
        return text
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error


def _with_trigger(texts: Sequence[str], trigger: str | None, folder: Path) -> list[str]:
    marked = [text for text in texts if TRIGGER in text]
    if trigger is None:
        if marked:
            raise RequestError(
                f"captions in {folder} contain {TRIGGER} ({len(marked)} of {len(texts)}), but no trigger word was "
                f"given; give one with --trigger"
            )
        return list(texts)
    if not trigger.strip():
        raise RequestError("the trigger word is empty; give a word that no caption would contain otherwise")
    found = [text.replace(TRIGGER, trigger) for text in texts]
    if not any(trigger in text for text in found):
        raise RequestError(f"no caption in {folder} contains {TRIGGER} or {brief(trigger)}; add {TRIGGER} to some")
    return found


def _some(files: Sequence[Path]) -> str:
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    return ", ".join(file.name for file in files[:NAMED]) + more
