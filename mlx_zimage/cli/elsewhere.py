"""Commands that accept options of other programs and, where one is not supported, say what to type instead."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import click
from click.core import ParameterSource

from ..errors import RequestError

BITS = ("2", "3", "4", "5", "6", "8")
BY_BITS = "convert the model once, with `mlx-zimage convert z-image-turbo DEST --q-bits 8`"
BY_MEMORY = "use --memory 6GB, which determines what is streamed from disk and how images are decoded"
IMAGE = "use --image FILE"
STRENGTH = "use --strength, the fraction of the steps to run: 1 ignores the image"
# mflux counts the other way around: the higher, the closer to the image.
MFLUX_STRENGTH = "use --strength, which is the opposite: for mflux's --image-strength {}, use --strength {}"
NOT_NEEDED = "leave it out; the kind of model is known from its config files"
SOURCE = "name what to convert, and the new folder: `mlx-zimage convert SOURCE DEST`"
Q_BITS = "use --q-bits, such as --q-bits 8"
GUIDANCE = "use --guidance, where 0 is off"
ELSEWHERE: Mapping[str, Mapping[str, str]] = {  # by command: flags of other programs, and what to use instead
    "generate": {
        "--quantize": BY_BITS,
        "--path": "use --model, which takes a folder or an id, and --output for the image",
        "--model-path": "use --model, which takes a folder or an id",
        "--mlx-cache-limit-gb": BY_MEMORY,
        "--vae-tiling": BY_MEMORY,
        "--vae-tile-size": BY_MEMORY,
        "--vae-tiling-split": BY_MEMORY,
        "--float32": "use --dtype float32",
        "--compute-precision": "use --dtype bfloat16, float16 or float32",
        "--image-count": "use --count N to generate N images",
        "--num-images": "use --count N to generate N images",
        "--batch-size": "use --count N to generate N images, one after another",
        "--num-inference-steps": "use --steps",
        "--guidance-scale": GUIDANCE,
        "--cfg": GUIDANCE,
        "--make-conf": "every image stores its request; `generate --from IMAGE` generates it again",
        "--base-model": NOT_NEEDED,
        "--scheduler": "use --shift; examples/custom_schedule.py shows a custom schedule",
        "--pid-decode": "images are decoded by the model's own VAE",
        "--no-bake-lora": "leave it out; `generate` never writes LoRAs into the weights",
        "--lora-name": "use --lora, which takes a file, an id, or ID:FILE",
        "--lora-repo-id": "use --lora, which takes a file, an id, or ID:FILE",
        "--controlnet-image-path": "use --control FILE, or --control canny:FILE for a photo",
        "--controlnet-strength": "use --control-scale",
        "--controlnet": "use --control FILE, and --control-model for another ControlNet",
        "--vae-full-precision": "leave it out; --dtype float32 computes everything in float32",
        "--image-path": f"{IMAGE}, and --strength, which is 1 minus mflux's --image-strength",
        "--image-strength": MFLUX_STRENGTH.format("0.4", "0.6"),
        "--init-image": IMAGE,
        "--init-img": IMAGE,
        "--denoise": STRENGTH,
        "--denoising-strength": STRENGTH,
    },
    "convert": {
        "--quantize": Q_BITS,
        "--bits": Q_BITS,
        "--path": SOURCE,
        "--output": SOURCE,
        "--model": SOURCE,
        "-m": SOURCE,
        "--hf-path": SOURCE,
        "--mlx-path": SOURCE,
        "--base-model": NOT_NEEDED,
    },
}
GENERATE = 'mlx-zimage generate "a cat"'
COMMANDS_ELSEWHERE = {  # of other programs, and what to use instead
    **dict.fromkeys(("run", "create", "draw", "image", "txt2img"), f"to generate an image: {GENERATE}"),
    **dict.fromkeys(
        ("pull", "download", "fetch", "get"),
        "`mlx-zimage generate` offers to download the default model; `mlx-zimage convert ID DEST` downloads any other",
    ),
    **dict.fromkeys(("list", "ls"), "use `mlx-zimage models`"),
    **dict.fromkeys(("rm", "remove", "delete"), "use `mlx-zimage models rm NAME`"),
    **dict.fromkeys(("save", "quantize", "export"), "use `mlx-zimage convert SOURCE DEST --q-bits 8`"),
    **dict.fromkeys(("show", "inspect"), "use `mlx-zimage info SOURCE`"),
    "server": "use `mlx-zimage serve`",
    **dict.fromkeys(("edit", "img2img"), f"add an image: {GENERATE} --image FILE"),
    "upscale": f"to enlarge an image: {GENERATE} --image FILE --upscale 2",
    "inpaint": f"to regenerate a part of an image: {GENERATE} --image FILE --mask MASK",
    "outpaint": f"to extend an image: {GENERATE} --image FILE --outpaint left=256",
    **dict.fromkeys(("version", "-v", "-V"), "use `mlx-zimage --version`"),
    "login": "use `hf auth login`",
    "help": "use `mlx-zimage --help`",
}


class CommandGroup(click.Group):
    """A command that has commands: hints at what to type instead of one that does not exist."""

    def __init__(self, *args: Any, hints: Mapping[str, str], default: str = "", **options: Any):
        """hints maps a typed name to its hint; default is the hint for any other name, which replaces the {} in it."""
        super().__init__(*args, **options)
        self.hints, self.default = hints, default

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        hint = self.hints.get(name) or self.default.format(shlex.quote(name))
        if name not in self.commands and hint and not difflib.get_close_matches(name, self.commands):
            raise click.UsageError(f"No such command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


def no_such_command(name: str, known: Mapping[str, Any], ctx: click.Context) -> None:
    """Raise UsageError for what is not a command, unless it looks like a mistyped one, which click answers."""
    meant = "run" if name.startswith("mflux-generate") else name.removeprefix("mflux-")
    if name in known or (meant not in COMMANDS_ELSEWHERE and difflib.get_close_matches(name, known)):
        return
    if name.startswith("-") and name not in COMMANDS_ELSEWHERE:
        raise click.UsageError(f"No such option: {name}; options follow a command: {GENERATE} --steps 8", ctx)
    hint = COMMANDS_ELSEWHERE.get(meant) or f"to generate an image: mlx-zimage generate {shlex.quote(name)}"
    raise click.UsageError(f"No such command {name!r}; {hint}", ctx)


class Command(click.Command):
    """Names a value's option in errors as it was typed, and answers unsupported flags with what to use instead."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["typed"] = {word.partition("=")[0] for word in args}
        quiet = any("-q" in parameter.opts for parameter in self.params)
        if quiet and _bits_after("-q", args):
            advice = _with_bits(Q_BITS if self.name == "convert" else BY_BITS, "-q", args)
            raise click.UsageError(f"-q is --quiet and takes no number; {advice}", ctx)
        try:
            return super().parse_args(ctx, [*args])  # it takes words out of the list
        except click.NoSuchOption as error:
            name = error.option_name
            advice = ELSEWHERE.get(self.name or "", {}).get(name, "")
            if not advice:
                raise
            raise click.UsageError(f"No such option: {name}; {_with_bits(advice, name, args)}", ctx) from None
        except click.BadParameter as error:
            typed = [name for name in error.param.opts if name in ctx.meta["typed"]] if error.param else []
            if typed:
                error.param_hint = f"'{typed[0]}'"
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RequestError as error:
            raise type(error)(as_typed(str(error), options_given(ctx))) from error


def _bits_after(option: str, args: list[str]) -> str | None:
    """The number of bits typed after an option, if any."""
    return next((bits for word, bits in pairwise(args) if word == option and bits in BITS), None)


def _with_bits(advice: str, option: str, args: list[str]) -> str:
    """Advice with the number of bits that was typed after the option."""
    bits = _bits_after(option, args)
    return re.sub(r"--q-bits \d", f"--q-bits {bits}", advice) if bits else advice


def options_given(ctx: click.Context) -> dict[str, str]:
    """The options given on the command line as they were typed, by the names of their values."""
    given = {}
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if isinstance(parameter, click.Option) and source is ParameterSource.COMMANDLINE:
            typed = [name for name in parameter.opts if name in ctx.meta["typed"]]
            given[parameter.name or ""] = typed[0] if typed else max(parameter.opts, key=len)
    return given


def as_typed(message: str, given: Mapping[str, str]) -> str:
    """A message that begins with the names of one or two values, each replaced by the option that was typed."""
    if both := re.match(r"(\w+) and (\w+) were both given", message):
        first, second = (given.get(name, name) for name in both.groups())
        return f"{first} and {second} were both given{message[both.end() :]}"
    name, _, rest = message.partition(" ")
    if name in given:
        return f"{given[name]} {rest}"
    if name in ("width", "height") and "size" in given:
        return f"{given['size']}: {message}"
    return message


def words_after(option: str, args: list[str]) -> list[str]:
    """The words that follow `option` and its value."""
    return [word for given, _, word in zip(args, args[1:], args[2:], strict=False) if given == option]


def refuse_strength_of_mflux(ctx: click.Context, args: list[str]) -> None:
    """Refuse mflux's `--image FILE STRENGTH`, whose strength means the opposite of ours."""
    for strength in words_after("--image", args):
        if re.fullmatch(r"0?\.\d+|[01](\.0*)?", strength):
            ours = f"{1 - float(strength):g}"
            raise click.UsageError(f"--image takes a file only; {MFLUX_STRENGTH.format(strength, ours)}", ctx)


def join_seeds(args: list[str]) -> list[str]:
    """Turn --seed 1 2 3 into --seed 1,2,3."""
    joined: list[str] = []
    for i, word in enumerate(args):
        if word == "--":
            return joined + args[i:]
        if word.isdecimal() and joined[-2:-1] == ["--seed"]:
            joined[-1] += f",{word}"
        else:
            joined.append(word)
    return joined
