"""The small files of a model folder: which of them are copied, from where, and what is left out of them.

A converted folder may be uploaded, and its source is untrusted. So only files that a loader knows are copied; links
out of the source, which could point to a key, are refused; and paths on this disk are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..tokenizer import MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES
from ..untrusted import one_line, parse_json, read_bytes
from ..weights.hub import REPOSITORY_ID, check_inside
from .disk import render_json

TOKENIZER = "tokenizer/tokenizer.json"
SCHEDULER = "scheduler/scheduler_config.json"
# What this package, diffusers and transformers read besides the weights and the networks' configs.
TOKENIZER_PARTS = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja"),
)
COPIED = (
    *("model_index.json", SCHEDULER, "text_encoder/generation_config.json"),
    *(f"tokenizer/{name}" for name in TOKENIZER_PARTS),
)
TOKEN_FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # large, and most of their strings are tokens
OF_TOKENS = ("vocab", "merges", "content", "pad_token")  # keys in tokenizer.json
MAX_CONFIG = 2**20  # bytes of another file
NAMES = ("_name_or_path", "name_or_path")  # where transformers and diffusers write what a config was loaded from
RECORD = ("converter", "source", "dtype", "quantization", "loras", "parts", "before")  # the keys of conversion.json
LOCAL = re.compile(r"file:/|~[/\\]|[A-Za-z]:[\\/]|\\\\|/[^\s/]+/")  # how an absolute path begins
# An absolute path in a longer text, but not a part of a URL or tag. Of Windows paths, only those to somebody's files,
# since chat templates contain backslashes.
PART = r"[^\s/\\\"'`<>|]+"
WITHIN = re.compile(
    rf"(?<![\w.\-/\\<>])(?:(?:file:/+|~?/){PART}/|(?:file:/+)?[A-Za-z]:[\\/]+Users[\\/]+|\\\\{PART}\\+)"
    rf"(?:{PART}[/\\]+)*(?:{PART})?"
)
REMOVED = "..."


def small_files(folder: Path) -> dict[str, bytes]:
    """The contents to copy from a model's folder, by name."""
    return copies(folder, {name: folder / name for name in COPIED})


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The contents to copy from a tokenizer's own folder, by name in a model's folder."""
    return copies(folder, {f"tokenizer/{name}": folder / name for name in TOKENIZER_PARTS})


def copies(folder: Path, paths: dict[str, Path]) -> dict[str, bytes]:
    """The contents of the paths that exist in a folder, by name, as they may be copied."""
    present = {name: path for name, path in paths.items() if path.exists()}  # a special file is refused when read
    check_inside(folder, present.values())
    contents = {
        name: read_small(path, MAX_TOKENIZER_BYTES if path.name in TOKEN_FILES else MAX_CONFIG)
        for name, path in present.items()
    }
    return {name: cleaned(name, content, paths[name]) for name, content in contents.items()}


def read_small(path: Path, most: int) -> bytes:
    try:
        return read_bytes(path, most)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; expected a config or tokenizer") from error


def cleaned(name: str, content: bytes, path: Path) -> bytes:
    """The content of the file at path, to be copied as name, without paths on somebody's disk.

    The same bytes if it has none.
    """
    *_, own = name.split("/")
    if own == "vocab.json":
        return content
    is_json = own.endswith(".json")
    try:
        if not is_json:
            return _without_places(own, content.decode()).encode()
        values = parse_json(content, MAX_TOKENIZER_VALUES)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid {'JSON' if is_json else 'text'} ({error}); download it again"
        ) from error
    kept = without_paths(values, OF_TOKENS if own in TOKEN_FILES else ())
    if kept == values:
        return content
    if own in TOKEN_FILES:
        return json.dumps(kept, ensure_ascii=False).encode(errors="backslashreplace")
    return render_json(kept)


def _without_places(name: str, text: str) -> str:
    """A template without such paths, or merges whose first line, which says who made them, has none."""
    first, end, rest = text.partition("\n") if name == "merges.txt" else (text, "", "")
    return WITHIN.sub(REMOVED, first) + end + rest


def without_paths(value: Any, kept: Collection[str] = ()) -> Any:
    """JSON without the keys and values that are paths on somebody's disk, and without paths in longer texts.

    The values of keys in `kept` stay as they are.
    """
    if isinstance(value, dict):
        return {
            WITHIN.sub(REMOVED, key): item if key in kept else without_paths(item, kept)
            for key, item in value.items()
            if key in kept or not (_is_path(item, key) or _is_path(key))
        }
    if isinstance(value, list):
        return [without_paths(item, kept) for item in value if not _is_path(item)]
    return WITHIN.sub(REMOVED, value) if isinstance(value, str) else value


def _is_path(value: object, key: str = "") -> bool:
    if not isinstance(value, str):
        return False
    if key in NAMES:
        return not re.fullmatch(rf"[\w.-]*|{REPOSITORY_ID.pattern}", value)
    return LOCAL.match(value) is not None


def clean_record(record: dict) -> dict:
    """A conversion.json, and those before it, with only the keys that the converter writes, and without paths."""
    return {
        key: clean_record(record[key]) if key == "before" else _clean(record[key]) for key in RECORD if key in record
    }


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {without_place(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return without_place(value) if isinstance(value, str) else value


def without_place(name: str) -> str:
    """A source's name on one line; of a path, only its last part."""
    if LOCAL.match(name):
        return one_line(re.split(r"[/\\]", name.rstrip("/\\"))[-1])
    return one_line(WITHIN.sub(REMOVED, name))
