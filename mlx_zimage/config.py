"""Read a network's config.json into its dataclass; every value is checked and bounded before anything is built."""

from __future__ import annotations

import math
from dataclasses import fields

from .errors import CheckpointError
from .untrusted import brief

# No value may be more than this many times the published model's: just naming a billion layers would take all memory.
MOST = 100
KIND_NAMES = {
    bool: "true or false",
    int: "a positive whole number",
    float: "a positive number",
    tuple: "a list of positive whole numbers",
}


def read_config(cls, values: dict, network: str, fixed: dict):
    """The dataclass cls, from the values it has fields for; keys of `fixed` must have the value given there, if
    present.

    A field's default determines its kind: true or false, a positive whole number, a positive finite number, or a tuple
    of as many positive whole numbers. Numbers are at most MOST times the default, which is the published model's.
    """
    for key, expected in fixed.items():
        if values.get(key, expected) != expected:
            raise CheckpointError(f"{network} config: {key} must be {expected}, got {brief(values[key])}")
    known = {}
    for field in fields(cls):
        value = values.get(field.name, field.default)
        if not _is_kind(value, field.default):
            raise CheckpointError(
                f"{network} config: {field.name} must be {KIND_NAMES[type(field.default)]}, got {brief(value)}"
            )
        _check_bounds(f"{network} config: {field.name}", value, field.default)
        known[field.name] = tuple(value) if isinstance(field.default, tuple) else value
    return cls(**known)


def _is_kind(value, default) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_kind(item, 1) for item in value)
    if isinstance(value, bool) or not isinstance(value, int if isinstance(default, int) else (int, float)):
        return False
    return 0 < value < math.inf


def _check_bounds(label: str, value, default) -> None:
    if isinstance(default, tuple):
        if len(value) != len(default):
            raise CheckpointError(f"{label} must be {len(default)} numbers, got {brief(value)}")
        value, default = max(value), max(default)
    if not isinstance(default, bool) and value > MOST * default:
        raise CheckpointError(
            f"{label} must be at most {MOST} times the published model's {default}, got {brief(value)}"
        )
