"""Public names that moved: for one release they still work where they were, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence


def moved(
    old: str, homes: Mapping[str, Sequence[str]], renamed: Mapping[str, str] | None = None
) -> Callable[[str], object]:
    """A __getattr__ for the module `old`.

    homes maps the modules of this package where names are now to those names; renamed maps old names to a module and
    a new name there, such as "convert.layout.lay_out_folder".
    """
    places = {name: f"{home}.{name}" for home, names in homes.items() for name in names} | dict(renamed or {})

    def find(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        home, _, new = f"{__package__}.{places[name]}".rpartition(".")
        found = getattr(importlib.import_module(home), new)
        warnings.warn(
            f"{old}.{name} is now {home}.{new}; the old name will be removed in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return find
