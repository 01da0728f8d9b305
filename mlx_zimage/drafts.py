"""What one call of `mlx-zimage generate` produces: all combinations of prompts, seeds and file names.

A Draft is a request whose size and other defaults may still be missing, since they come from the model once it is open.
Imports neither click nor MLX.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from typing import BinaryIO, TypeVar

from .errors import RequestError
from .request import LATENT_PIXELS, MAX_PROMPT, SIZE_MULTIPLE, GenerateRequest
from .untrusted import brief, parse_json

MAX_FILE = 50_000_000  # bytes in a file of prompts
MAX_LINES = 500_000  # with comments and blank ones
MAX_LINE = 4_000_000  # bytes: twice those of two prompts, with every character escaped
MAX_TEXT = 8 * MAX_PROMPT  # bytes of a prompt from stdin, with the blank space around it
MAX_PARTS = 1_000_000  # commas in a file of requests, as a bound for what they take in memory
MAX_IMAGES = 100_000  # in one call
MAX_KINDS = 10_000  # of requests in one call, since each kind is checked and planned: see `kind_of`
CHUNK = 2**20
LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")  # a final carriage return may be half of one
LAST_LINE_END = re.compile(rb"\r\n|\n|\r")
T = TypeVar("T")
MAX_NAME = 200  # bytes in a file name's stem: 255 are allowed, and some are needed for the suffix and a counter
FIELDS = {field.name for field in fields(GenerateRequest)}
INPUT_FILES = ("image", "mask_image", "controls")  # each request may name its own
SHORT = {  # names as on the command line, and the fields that they replace
    "size": {"width", "height"},
    "guidance": {"guidance_scale"},
    "count": set[str](),
}
PLACEHOLDERS = ("prompt", "seed", "n", "width", "height", "steps")


@dataclass(frozen=True)
class Series:
    """The drafts of one prompt: they differ in their seeds only. n is the first one's number, counted from 1.

    Those of one call with equal kinds differ in nothing but their prompts, seeds and output files: see `kind_of`.
    """

    values: dict
    seeds: Sequence[int]
    output: Path
    n: int = 1
    ratio: tuple[int, int] | None = None
    kind: str = ""

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Draft]:
        for i, seed in enumerate(self.seeds):
            yield Draft({**self.values, "seed": seed}, self.output, self.n + i, self.ratio)


@dataclass(frozen=True)
class Draft:
    """A future request: the values known so far, and the file for its image.

    ratio is the aspect ratio (width, height) of an image with about as many pixels as the model's default; n counts
    drafts from 1.
    """

    values: dict
    output: Path
    n: int = 1
    ratio: tuple[int, int] | None = None

    def request(self, side: int | None = None) -> GenerateRequest:
        """The request; its ratio becomes a size for a model whose default is side x side, None before one is open."""
        if self.ratio and side:
            width, height = size_of_ratio(self.ratio, side)
            return GenerateRequest(**{"width": width, "height": height, **self.values})
        return GenerateRequest(**self.values)

    def path(self, request: GenerateRequest) -> Path:
        """The output path with {seed}, {prompt} and so on filled in, in folders too; {{ and }} are literal braces."""
        values = {name: getattr(request, name) for name in ("seed", "width", "height", "steps")}
        values |= {"n": self.n, "prompt": slug(request.prompt)}
        *folders, name = self.output.parts or (".",)  # "." and "/" are refused by check_output
        stem, suffix = os.path.splitext(name)
        folders = [_cut(_filled(folder, values), MAX_NAME) for folder in folders]
        return Path(*folders, _cut(_filled(stem, values), MAX_NAME) + suffix)


def multiply(
    base: dict,
    prompts: Iterable[dict],
    seeds: Iterable[int],
    output: Path,
    ratio: tuple[int, int] | None = None,
    count: int = 1,
) -> list[Series]:
    """A Series for each prompt, of `count` images from each seed on. A prompt's own values override all others."""
    made, total, seeds, output = [], 0, tuple(seeds), Path(os.path.expanduser(output))
    for own in prompts:
        values, own_ratio = expand_short(own)
        file = Path(os.path.expanduser(values.pop("output"))) if "output" in values else output
        wanted = values.pop("count", count)
        _check_count(wanted)
        starts = (values.pop("seed"),) if "seed" in values else seeds
        n, total = total + 1, total + len(starts) * wanted
        if total > MAX_IMAGES:
            raise RequestError(f"more than {MAX_IMAGES} images in one call; lower the count, or split the file")
        if wanted > 1 and all(isinstance(seed, int) for seed in starts):
            starts = tuple(seed + i for seed in starts for i in range(wanted))
        if not own_ratio and not {"width", "height"} & values.keys():
            own_ratio = ratio
        kept = {name: value for name, value in base.items() if not (own_ratio and name in ("width", "height"))}
        made.append(Series({**kept, **values}, starts, file, n, own_ratio, kind_of(own)))
    return made


def kind_of(own: dict) -> str:
    """What a prompt's values say besides its prompt, seed and output: the same for all that are checked as one."""
    return repr({name: value for name, value in own.items() if name not in ("prompt", "seed", "output")})


def expand_short(own: dict) -> tuple[dict, tuple[int, int] | None]:
    """The values of a prompt with its short names (see SHORT) replaced by a request's fields, and its aspect ratio."""
    values = dict(own)
    if "guidance" in values:
        values["guidance_scale"] = values.pop("guidance")
    sides, ratio = parse_size(values.pop("size")) if "size" in values else ({}, None)
    return values | sides, ratio


def _check_count(count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_IMAGES:
        raise RequestError(f"count must be from 1 to {MAX_IMAGES}, got {count!r}")


def parse_seeds(text: str) -> list[int]:
    """ "7" or "1,2,5"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"-?[0-9]{1,20}", part) for part in parts):
        raise RequestError(
            f"seed must be one or more whole numbers from 0 to 2**64 - 1, separated by commas, got {brief(text)}"
        )
    return [int(part) for part in parts]


def parse_size(text: object) -> tuple[dict, tuple[int, int] | None]:
    """A size "1280x720" as width and height, or an aspect ratio "16:9" as a ratio."""
    match = re.fullmatch(r"([0-9]{1,5})([x:])([0-9]{1,5})", str(text).strip().lower())
    if not match:
        raise RequestError(f"size must be an aspect ratio such as 3:2 or pixels such as 1280x720, got {text!r}")
    width, height = int(match[1]), int(match[3])
    if match[2] == "x":
        return {"width": width, "height": height}, None
    if not 0 < width <= 8 * height or not 0 < height <= 8 * width:
        raise RequestError(f"size must be an aspect ratio from 1:8 to 8:1, got {text!r}")
    return {}, (width, height)


def size_of_ratio(ratio: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height with this ratio and about side x side pixels in total, rounded to multiples of 16."""
    width, height = (max(1, round(side * sqrt(a / b) / SIZE_MULTIPLE)) * SIZE_MULTIPLE for a, b in (ratio, ratio[::-1]))
    return width, height


def fields_of_latents(shape: tuple[int, ...]) -> dict[str, int]:
    """The fields that a request needs to match latents of this shape, (B, C, h, w)."""
    count, _, h, w = shape
    return {"num_images": count, "width": w * LATENT_PIXELS, "height": h * LATENT_PIXELS}


def read_prompts(lines: Iterable[str], name: str) -> dict[int, dict]:
    """One prompt per line, by the line's number; empty lines and lines starting with # are ignored."""
    stripped = ((i, line.strip()) for i, line in enumerate(lines, start=1))
    prompts = {i: {"prompt": x} for i, x in limited(((i, x) for i, x in stripped if x and x[0] != "#"), name)}
    if not prompts:
        raise RequestError(f"{name} contains no prompts; write one per line")
    return prompts


def read_requests(lines: Iterable[str], name: str) -> dict[int, dict]:
    """JSON Lines: one object per line, by the line's number, with a request's fields and optionally "output"."""
    requests = {}
    parts, kinds = 0, set()
    for i, line in limited(((i, line) for i, line in enumerate(lines, start=1) if line.strip()), name):
        parts += line.count(",")
        if parts > MAX_PARTS:
            raise RequestError(f"{name} has more than {MAX_PARTS:,} values; split it")
        try:
            values = parse_json(line)
        except ValueError as error:
            raise RequestError(f"{name}, line {i} is not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise RequestError(f"{name}, line {i} must be a JSON object, got {type(values).__name__}")
        unknown = sorted(values.keys() - FIELDS - SHORT.keys() - {"output"})
        if unknown:
            advice = f"the fields are {', '.join(['output', *SHORT, *sorted(FIELDS)])}"
            if unknown[0] == "image_strength":
                advice = "use strength, which is the opposite: for mflux's image_strength 0.4, use strength 0.6"
            raise RequestError(f"{name}, line {i}: unknown field {unknown[0]!r}; {advice}")
        for short, names in SHORT.items():
            twice = sorted(values.keys() & names) if short in values else []
            if twice:
                raise RequestError(f"{name}, line {i}: {short} cannot be combined with {twice[0]}; give one")
        try:
            expand_short(values)
            _check_count(values.get("count", 1))
        except RequestError as error:
            raise RequestError(f"{name}, line {i}: {error}") from None
        if not _can_be_a_path(values.get("output", "")):
            raise RequestError(f"{name}, line {i}: output must be a file name, got {values['output']!r}")
        kinds.add(hash(kind_of({name: value for name, value in values.items() if name not in INPUT_FILES})))
        if len(kinds) > MAX_KINDS:
            raise RequestError(f"{name} has more than {MAX_KINDS:,} requests that differ in their settings; split it")
        requests[i] = values
    if not requests:
        raise RequestError(f"{name} contains no requests; write one JSON object per line")
    return requests


def lines_of(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of UTF-8 text; only the current one and a few that were read ahead are in memory.

    Unlike in str.splitlines, U+2028, VT and the like do not end a line.
    """
    size, number, rest = 0, 0, b""
    while True:
        chunk = stream.read(CHUNK)
        size += len(chunk)
        if size > MAX_FILE:
            raise RequestError(f"{name} is larger than {MAX_FILE // 10**6} MB; split it")
        *lines, rest = (LINE_END if chunk else LAST_LINE_END).split(rest + chunk)
        for line in lines if chunk else [*lines, rest]:
            number += 1
            if number > MAX_LINES:
                raise RequestError(f"{name} has more than {MAX_LINES:,} lines; split it")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RequestError(f"{name}, line {number} is not UTF-8 text (byte {error.start + 1})") from None
        if not chunk:
            return
        if len(rest) > MAX_LINE:
            raise RequestError(f"{name}, line {number + 1} is longer than {MAX_LINE // 10**6} MB; is it text?")


def limited(items: Iterable[T], name: str) -> Iterator[T]:
    """The items; RequestError if there are more than the images that one call may generate."""
    for n, item in enumerate(items):
        if n == MAX_IMAGES:
            raise RequestError(f"{name} has more than {MAX_IMAGES} prompts; split it")
        yield item


def _can_be_a_path(value: object) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        return False


def read_text(stream: BinaryIO, name: str) -> str:
    """The UTF-8 text of a binary stream that contains one prompt."""
    content = stream.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise RequestError(
            f"{name} has more than {MAX_TEXT:,} bytes; expected a prompt of at most {MAX_PROMPT:,} characters"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 text (first invalid byte: {error.start})") from None


def slug(prompt: str) -> str:
    """The words of a prompt for use in a file name: letters and digits of any script, joined with dashes."""
    words = re.findall(r"[^\W_]+", prompt[:MAX_PROMPT])
    return _cut("-".join(words), 60).rstrip("-") or "image"


def _filled(template: str, values: Mapping[str, object]) -> str:
    def value(match: re.Match) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] not in PLACEHOLDERS:
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise RequestError(f"output contains {match[0]}; the placeholders are {known}; write {{{{ for a brace")
        return str(values[match[1]])

    return re.sub(r"\{\{|\}\}|\{([^{}]*)\}", value, template)


def _cut(text: str, size: int) -> str:
    """As much of the text as fits in size bytes of a file name."""
    text = text[:size]
    while len(os.fsencode(text)) > size:
        text = text[:-1]
    return text
