"""The small files of a model folder: which of them are copied, from where, and what is left out of them.

A converted folder may be uploaded, and its source may come from a stranger. So only files that a loader knows are
copied; links out of the source, which could point to a key, are refused; and paths on this disk are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models import NETWORKS
from ..untrusted import one_line, parse_json, read_bytes
from ..weights.hub import REPOSITORY_ID
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
DATA = ("tokenizer.json", "vocab.json")  # their strings are tokens
MAX_FILE = 32 * 2**20  # bytes: Qwen3's tokenizer.json has 11 MB
NAMES = ("_name_or_path", "name_or_path")  # where transformers and diffusers write what a config was loaded from
RECORD = ("converter", "source", "dtype", "quantization", "loras", "parts", "before")  # the keys of conversion.json
LOCAL = re.compile(r"file:/|~[/\\]|[A-Za-z]:[\\/]|\\\\|/[^\s/]+/")  # how an absolute path begins


def small_files(folder: Path) -> dict[str, bytes]:
    """The contents to copy from a model's folder, by name."""
    return copies(folder, {name: folder / name for name in COPIED})


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The contents to copy from a tokenizer's own folder, by name in a model's folder."""
    return copies(folder, {f"tokenizer/{name}": folder / name for name in TOKENIZER_PARTS})


def copies(folder: Path, paths: dict[str, Path]) -> dict[str, bytes]:
    """The contents of the paths that exist in a folder, by name, as they may be copied."""
    present = {name: path for name, path in paths.items() if path.is_file()}
    check_inside(folder, present.values())
    return {name: _without_paths(name, read_small(path)) for name, path in present.items()}


def read_small(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_FILE)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; expected a config or tokenizer") from error


def check_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse links out of the folder, except those from a snapshot in the hub's cache to its own blobs."""
    home = folder.resolve()
    inside = [home]
    for snapshots in home.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            inside.append(snapshots.parent / "blobs")
    for path in paths:
        there = path.resolve()
        if not any(there.is_relative_to(place) for place in inside):
            raise CheckpointError(
                f"{path} is a link to {there}, outside {folder}; if that file belongs to the model, replace the "
                f"link with a copy of it"
            )


def _without_paths(name: str, content: bytes) -> bytes:
    if not name.endswith(".json") or name.endswith(DATA):
        return content
    try:
        values = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{name} is not valid JSON ({error}); download it again") from error
    cleaned = without_paths(values)
    return content if cleaned == values else render_json(cleaned)


def without_paths(value: Any) -> Any:
    """JSON without the values that are paths on somebody's disk."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items() if not _is_path(item, key)}
    if isinstance(value, list):
        return [without_paths(item) for item in value if not _is_path(item)]
    return value


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
        return {one_line(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return without_place(value) if isinstance(value, str) else value


def without_place(name: str) -> str:
    """A source's name on one line; of a path, only its last part."""
    return one_line(re.split(r"[/\\]", name.rstrip("/\\"))[-1] if LOCAL.match(name) else name)


def config_files(folder: Path) -> list[Path]:
    """The configs of networks in a model's folder or a network's own, whose values are copied."""
    places = (folder, *(folder / name for name in NETWORKS))
    return [path for place in places if (path := place / "config.json").is_file()]
