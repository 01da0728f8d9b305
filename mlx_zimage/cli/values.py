"""The types of values that arguments and options take."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ..drafts import parse_size, size_of_ratio
from ..dtypes import FLOATS
from ..errors import RequestError
from ..quantization import MODES
from ..request import check_size
from ..variants import ALIASES

F = TypeVar("F", bound=Callable)


API_KEY = "MLX_ZIMAGE_API_KEY"  # environment variable
MODEL_FORMATS = ("mlx", "diffusers", "comfyui", "comfyui-fp8", "comfyui-int8")  # that the converter writes


class _Expanded(click.ParamType):
    """~ is expanded to the home folder, even where the shell does not do it: in quotes, and after a comma or an equals
    sign."""

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

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "-" and sys.stdin is None:
            raise RequestError("stdin is closed, so - cannot read from it; pipe the text in, or give a file")
        return super().convert(value, param, ctx)


class LoraName(_Expanded, click.ParamType):
    """A LoRA's file or folder, Hugging Face id, or id:file. Completed as a file."""

    name = "LoRA"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class ModelName(_Expanded, click.ParamType):
    """A model's folder or file, Hugging Face id, or "pocket"."""

    name = "model"

    def __init__(self, listed_only: bool = False, converted: bool = False):
        """listed_only omits from the completions any folders and files that `mlx-zimage models` does not list.

        converted makes an alias such as z-image-turbo stand for what a first run converted, if it is there, as in
        `generate`.
        """
        self.listed_only, self.converted = listed_only, converted

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from ..weights.library import models

        names = []
        with suppress(Exception):  # having no completions is better than a traceback at the prompt
            names = [model.name for model in models() if model.kind != ("package" if self.listed_only else "prompts")]
        items = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        # A shell would offer no folders in addition to the names unless asked to: see completion.py.
        return items if self.listed_only else [CompletionItem(incomplete, type="file"), *items]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = os.path.expanduser(value)
        if self.converted and name in ALIASES:
            from ..weights.library import already_converted

            return str(already_converted(name))
        return name


# Options that several commands have.
variant_option = click.option(
    "--variant",
    metavar="NAME",
    help="turbo, base or de-turbo, if the model is detected as the wrong one; or a file variant, such as fp16.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(sorted(FLOATS)),
    help="Compute dtype.  [default: bfloat16 on a GPU, float16 on M1 and M2, float32 on a CPU]",
)
weights_dtype_option = click.option(
    "--dtype",
    type=click.Choice(sorted(FLOATS)),
    default="bfloat16",
    show_default=True,
    help="Dtype of the weights that are not quantized.",
)
memory_option = click.option(
    "--memory",
    metavar="SIZE",
    help="Memory budget, such as 6GB; what does not fit is streamed from disk.  [default: based on this machine]",
)
keep_option = click.option(
    "--keep/--stage",
    " /--low-ram",
    default=None,
    help="Keep the whole model in memory between images, or unload each network after use.  [default: keep if it fits]",
)
yes_option = click.option(
    "-y", "--yes", is_flag=True, help="Do not ask before downloading what is missing, or converting it."
)


def size_options(command: F) -> F:
    """The options for the size of an image: see `sides`."""
    for option in (
        click.option("--height", type=int, help="Height in pixels, a multiple of 16.  [default: the model's]"),
        click.option("--width", type=int, help="Width in pixels, a multiple of 16.  [default: the model's]"),
        click.option(
            "--size",
            metavar="W:H|WxH",
            help="Aspect ratio such as 3:2, at about the model's default pixel count, or pixels such as 1280x720.",
        ),
    ):
        command = option(command)
    return command


def quantization_options(command: F) -> F:
    """The options for what every layer is quantized to: see `convert.choose.quantizations`."""
    for option in (
        click.option(
            "--q-mode",
            "mode",
            type=click.Choice(list(MODES)),
            default="affine",
            show_default=True,
            help="Quantization mode.",
        ),
        click.option(
            "--q-group-size",
            "group_size",
            type=int,
            help="Number of weights that share a scale.  [default: the mode's]",
        ),
        click.option(
            "--q-bits", "bits", type=int, help="Bits per weight: 8, 6, 5, 4, 3 or 2.  [default: not quantized]"
        ),
    ):
        command = option(command)
    return command


def sides(size: str | None, width: int | None, height: int | None, default: int) -> tuple[int, int]:
    """Width and height in pixels, for a model whose default is a square of side `default`."""
    check_one_size(size, width, height)
    given, ratio = parse_size(size) if size else ({}, None)
    if ratio:
        return size_of_ratio(ratio, default)
    found = {"width": width or default, "height": height or default} | given
    for name, value in found.items():
        check_size(name, value)
    return found["width"], found["height"]


def check_one_size(size: str | None, width: int | None, height: int | None) -> None:
    if size and (width is not None or height is not None):
        raise RequestError(
            "--size cannot be combined with --width or --height; give either --size, or --width and --height"
        )
