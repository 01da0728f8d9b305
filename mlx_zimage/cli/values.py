"""The types of values that arguments and options take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class _Expanded(click.ParamType):
    """~ stands for the home folder, also where the shell leaves it: in quotes, and after a comma or an equals sign."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(
            os.path.expanduser(value) if isinstance(value, (str, bytes, Path)) else value, param, ctx
        )


class FilePath(_Expanded, click.Path):
    """The path of a file or a folder."""

    def __init__(self, **options: Any):
        super().__init__(path_type=Path, **options)


class InputFile(_Expanded, click.File):
    """A file to read, or - for stdin."""

    def __init__(self) -> None:
        super().__init__("rb")


class ModelName(_Expanded, click.ParamType):
    """A model's folder or file, Hugging Face id, or "pocket"."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return os.path.expanduser(value)
