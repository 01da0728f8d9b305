"""Names that moved: for one release they still work in the old module, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence


def moved(old: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """A __getattr__ for the module `old`; homes maps the modules of this package where names are now to those names."""
    home_of = {name: f"{__package__}.{home}" for home, names in homes.items() for name in names}

    def find(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(home_of[name]), name)
        warnings.warn(
            f"{old}.{name} is now {home_of[name]}.{name}; the old name will be removed in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return find
