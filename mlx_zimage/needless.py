"""diffusers' methods that need not, or cannot, do anything here, and say why."""

from __future__ import annotations

import warnings

from .errors import RequestError


class Needless:
    """A method of diffusers' that has nothing to do here. Each call issues a warning, which Python shows once per line
    of code."""

    def __init__(self, why: str):
        self.why = why

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __call__(self, *args: object, **kwargs: object) -> None:
        warnings.warn(f"{self.name} does nothing here: {self.why}", stacklevel=2)


class Elsewhere(Needless):
    """A method of diffusers' that is not available here. It raises RequestError with what to do instead."""

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise RequestError(f"there is no {self.name} here: {self.why}")


class Absent(Needless):
    """A component of diffusers' pipelines that cannot be read or replaced here."""

    def __get__(self, instance: object, owner: type) -> Absent:
        if instance is None:
            return self
        raise AttributeError(f"there is no {self.name} here: {self.why}")

    def __set__(self, instance: object, value: object) -> None:
        raise RequestError(f"there is no {self.name} here: {self.why}")
