"""Names that moved: for one release the old place gives them, with a warning that tells the new one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence


def moved(old: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """The __getattr__ of the module `old`, whose names are now in other modules of this package: module -> names."""
    home_of = {name: f"{__package__}.{home}" for home, names in homes.items() for name in names}

    def find(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(home_of[name]), name)
        warnings.warn(
            f"{old}.{name} is now {home_of[name]}.{name}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return find
