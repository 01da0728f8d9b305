"""Which files in a folder belong to the model, judging by their names, so that a file list from the hub is enough."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError

# Files left by operating systems and tools: macOS's ._* (on exFAT and SMB) and .DS_Store, Windows' own, .cache, .git.
SYSTEM = re.compile(r"\..*|__MACOSX|thumbs\.db|desktop\.ini", re.IGNORECASE)

# File variants as diffusers and transformers name them, now and in the past.
STEM, PART = r"(?:diffusion_pytorch_)?model", r"-\d{5}-of-\d{5}"
VARIANT = re.compile(
    rf"{STEM}\.(\w+)(?:{PART})?\.safetensors|{STEM}{PART}\.(\w+)\.safetensors"
    rf"|{STEM}\.safetensors\.index\.(\w+)\.json|{STEM}\.safetensors\.(\w+)\.index\.json"
)
INDEX = re.compile(r".+\.safetensors(?:\.\w+)?\.index(?:\.\w+)?\.json")
NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<rest>\..+)")
COUNTED = re.compile(r"\d+\.safetensors")  # mflux's


def is_hidden(name: str | PurePosixPath) -> bool:
    """Whether a path, relative to the model's folder, belongs to the system or a tool rather than to the model."""
    return any(SYSTEM.fullmatch(part) for part in PurePosixPath(name).parts)


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """The paths in a folder that match the pattern and are not hidden, sorted."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.relative_to(folder).as_posix()))


def variant_of(name: str) -> str:
    """The variant in the name of a weight file or an index, such as "fp16"; "" if there is none."""
    found = VARIANT.fullmatch(name)
    return next(filter(None, found.groups())) if found else ""


def weight_variants(names: Iterable[str]) -> dict[str, list[str]]:
    """The weight files and indexes among a component's files, by variant."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if not is_hidden(name) and (name.endswith(".safetensors") or INDEX.fullmatch(name)):
            found.setdefault(variant_of(name), []).append(name)
    return found


def choose_files(
    names: Iterable[str], variant: str | None, weight_map: Callable[[str], Mapping[str, str]], folder: object
) -> list[str]:
    """The files that contain a component's weights, among all files in its folder.

    As in diffusers, files without a variant are the default, and also stand in for a variant that this component
    lacks. weight_map reads an index (tensor name -> file name). An index whose files are missing is ignored if there
    is a single complete file. folder is only named in errors.
    """
    names = set(names)
    found = weight_variants(names)
    if not found:
        raise CheckpointError(
            f"{folder} has no safetensors file; download the model again, or convert it with `mlx-zimage convert` if "
            "it is in another format"
        )
    wanted = variant if variant in found else ""
    if wanted not in found and variant is None and len(found) == 1:
        (wanted,) = found
    if wanted not in found:
        several = len(found) > 1
        raise CheckpointError(
            f"{folder} has only the file variant{'s' * several} {' and '.join(found)}"
            f"{f', not {variant!r}' if variant else ''}; {'choose one' if several else 'name it'} with --variant "
            f"(variant= in Python)"
        )
    indexes = [name for name in found[wanted] if INDEX.fullmatch(name)]
    files = [name for name in found[wanted] if name not in indexes]
    if len(indexes) > 1:
        raise CheckpointError(f"{folder} has {len(indexes)} index files ({indexes[0]}, {indexes[1]}); keep only one")
    whole = [name for name in files if not NUMBERED.fullmatch(name)]
    if indexes:
        indexed = sorted(set(weight_map(indexes[0]).values()))
        missing = [name for name in indexed if name not in names]
        if missing and len(whole) != 1:
            more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
            raise CheckpointError(
                f"{folder}/{missing[0]} is missing{more}, but the index lists it; download the model again"
            )
        return whole if missing else indexed
    rows = {(row["stem"], row["count"], row["rest"]) for row in map(NUMBERED.fullmatch, files) if row}
    if len(whole) == 1 or (not rows and all(COUNTED.fullmatch(name) for name in files)):
        return whole
    if whole or len(rows) > 1:
        raise CheckpointError(
            f"{folder} has {len(files)} safetensors files but no index that lists them; download the model again"
        )
    ((_, count, _),) = rows
    if len(files) != int(count):
        raise CheckpointError(f"{folder} has {len(files)} of {int(count)} parts, such as {files[0]}; download the rest")
    return files
