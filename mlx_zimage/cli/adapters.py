"""LoRAs on a command line: `--lora PATH [SCALE]`, and mflux's spelling of several."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, count
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from ..request import GenerateRequest
from .elsewhere import Command, words_after
from .values import LoraName

if TYPE_CHECKING:
    from ..images.metadata import Origin
    from ..pipeline import ZImagePipeline

KEY = "mlx_zimage.lora_strengths"


class WithLoras(Command):
    """A command with `lora_options`. The word after --lora PATH is its strength if it is a number, and only then."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args, ctx.meta[KEY] = split_strengths(args)
        ctx.allow_extra_args = True
        rest = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            raise click.UsageError(_one_file(words_after("--lora", args)) or self.too_many(ctx, args), ctx)
        return rest

    def too_many(self, ctx: click.Context, args: list[str]) -> str:
        """What to say about the words in ctx.args, which are more than the command takes."""
        return f"Got unexpected extra argument{'s' * (len(ctx.args) > 1)} ({' '.join(ctx.args)})"


def split_strengths(args: Sequence[str]) -> tuple[list[str], list[float | None]]:
    """The arguments without the strength after each --lora PATH, and these strengths; None if there is none.

    mflux's --lora-paths A B --lora-scales 1 0.5 becomes two --lora.
    """
    kept: list[str] = []
    strengths: list[float | None] = []
    rest = list(args)
    paths = _take(rest, "--lora-paths", "a path", lambda word: not word.startswith("-"))
    scales = [float(word) for word in _take(rest, "--lora-scales", "a number", _is_number)]
    if scales and len(scales) != len(paths):
        raise click.UsageError(
            f"--lora-scales needs one strength per file of --lora-paths, {len(paths)} in all, got {len(scales)}"
        )
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*_as_options(paths, kept, strengths, scales), word, *rest], strengths
        kept.append(word)
        if word == "--lora" and rest:
            kept.append(rest.pop(0))
        elif not word.startswith("--lora="):
            continue
        strengths.append(float(rest.pop(0)) if rest and _is_number(rest[0]) else None)
    return _as_options(paths, kept, strengths, scales), strengths


def _one_file(after: Iterable[str]) -> str:
    """What to say about the words after --lora PATH, if they do not belong there."""
    for word in after:
        if word.endswith(".safetensors"):
            return f"--lora takes one file; for several, repeat it, as in --lora A.safetensors --lora {word}"
        if re.match(r"[-+.,]?\d", word):
            return f"the strength of a LoRA must be a number such as 0.8, got {word!r}"
    return ""


def _as_options(paths: list[str], kept: list[str], strengths: list[float | None], scales: list[float]) -> list[str]:
    strengths += scales or [None] * len(paths)
    return kept + [word for path in paths for word in ("--lora", path)]


def _take(args: list[str], option: str, expected: str, belongs: Any) -> list[str]:
    """Remove an option that takes one or more words, and return them."""
    found: list[str] = []
    args[:] = chain.from_iterable(
        [option, word.removeprefix(f"{option}=")] if word.startswith(f"{option}=") else [word] for word in args
    )
    while option in args:
        start = end = args.index(option) + 1
        while end < len(args) and belongs(args[end]):
            end += 1
        if start == end:
            got = args[start] if start < len(args) else "nothing"
            raise click.UsageError(f"{option} must be followed by {expected}, got {got}")
        found += args[start:end]
        del args[start - 1 : end]
    return found


def _is_number(word: str) -> bool:
    try:
        return isfinite(float(word))
    except ValueError:
        return False


def lora_options(command: Any) -> Any:
    """The options --lora and --lora-partial."""
    paths = click.option(
        "--lora", "loras", metavar="PATH [SCALE]", multiple=True, type=LoraName(), callback=_with_strengths,
        help="Use this LoRA: a file, a Hugging Face id, or id:file. SCALE is its strength.  [default: 1; repeatable]",
    )  # fmt: skip
    partial = click.option(
        "--lora-partial", is_flag=True, help="Ignore keys of a LoRA that match no layer, instead of rejecting the LoRA."
    )
    return paths(partial(command))


def _with_strengths(ctx: click.Context, _: click.Parameter, paths: Sequence[str]) -> list[tuple[str, float | None]]:
    for path in paths:
        if paths.count(path) > 1:
            raise click.UsageError(
                f"--lora {path} was given {paths.count(path)} times; give it once, with one strength"
            )
    return list(zip(paths, ctx.meta[KEY], strict=True))


def name_paths(requests: Sequence[dict], paths: Sequence[str]) -> tuple[list[dict], dict[str, str]]:
    """JSON requests that name their LoRAs instead of giving paths, and the name of every path, including those in
    `paths`.

    An item of "loras" has a path, or the name of one given with --lora, and a strength.
    """
    names: dict[str, str] = {}

    def name(path: str) -> str:
        return names.setdefault(path, _free(path, names.values()))

    for path in paths:
        name(path)

    def by_name(use: Any) -> Any:
        if not isinstance(use, dict) or not isinstance(use.get("path"), str):
            return use
        rest = {key: value for key, value in use.items() if key != "path"}
        return {"name": name(os.path.expanduser(use["path"])), **rest}

    renamed = [
        {**own, "loras": [by_name(use) for use in own["loras"]]} if isinstance(own.get("loras"), list) else own
        for own in requests
    ]
    return renamed, names


def _free(path: str, taken: Collection[str]) -> str:
    """A name for a LoRA, after its file, that is not taken."""
    stem = Path(path.rpartition(":")[2]).stem or "lora"
    names = chain([stem], (f"{stem}-{i}" for i in count(2)))
    return next(name for name in names if name not in taken)


def load_loras(
    pipeline: ZImagePipeline,
    names: Mapping[str, str],
    given: Sequence[tuple[str, float | None]],
    old: Origin | None,
    partial: bool,
) -> None:
    """Load all LoRAs, and use those given with --lora and those of an old image, at its strengths if none is given."""
    for path, name in names.items():
        pipeline.load_lora(path, name, partial=partial)
    loaded = pipeline.complete(GenerateRequest("-", seed=0)).loras or ()
    known = {key: use.name for use in loaded for key in (use.sha256, use.name)}
    strengths: dict[str, float] = {}
    for use in (old.request.loras if old else None) or ():
        key = use.sha256 or use.name  # mflux records no SHA-256
        if key not in known:
            which = f"{use.name!r} (SHA-256 {use.sha256})" if use.sha256 else repr(use.name)
            raise RequestError(f"the image was generated with LoRA {which}; give its file with --lora FILE")
        strengths[known[key]] = use.strength
    for path, strength in given:
        name = names[path]
        if strength is not None or name not in strengths:
            strengths[name] = 1.0 if strength is None else strength
    pipeline.set_loras(strengths)
