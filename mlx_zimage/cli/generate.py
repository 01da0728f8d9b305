from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from .. import battery
from ..dtypes import FLOATS
from ..errors import RequestError, ZImageError
from ..jobs import (
    count_up,
    fields_of_latents,
    multiply,
    parse_seeds,
    parse_size,
    read_prompts,
    read_requests,
    read_text,
)
from ..request import RNGS
from ..sizes import parse_memory
from ..variants import VARIANTS
from .elsewhere import ForgivingCommand
from .models import DEFAULT_MODEL, first_run
from .output import graphics, hub_bars, print_path, say, show_picture

if TYPE_CHECKING:
    from ..images.metadata import Origin
    from ..inputs import Inputs

EXAMPLES = """\b
Example: mlx-zimage generate "a lighthouse at dusk" --size 3:2 --seed 7 -o lighthouse.png
Four seeds, named after them, the picture growing in the terminal:
    mlx-zimage generate "a lighthouse at dusk" --seed 1 2 3 4 -o "{prompt}-{seed}.webp" --preview
The same picture with another seed:
    mlx-zimage generate --from lighthouse.png --seed 8
A prompt a line; an object a picture for the next program:
    mlx-zimage generate --prompt-file prompts.txt --json -q | jq -r .path
"""
SECTIONS = {  # of the help text, with the names of their options
    "What to draw": ("prompt_option", "prompt_file", "requests_file", "from_picture", "size", "width", "height"),
    "Seeds": ("seeds", "count", "auto_seeds", "rng", "latents_file"),
    "How to draw": ("steps", "shift", "guidance_scale", "negative_prompt"),
    "Model and machine": ("source", "variant", "yes", "dtype", "memory", "keep", "battery_limit"),
    "Files": ("output", "overwrite", "metadata", "preview_dir"),
}
Size = tuple[dict, tuple[int, int] | None]  # as parse_size gives it


def _parse(parse: Callable[[str], Any]):
    def callback(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
        return None if value is None else parse(value)

    return callback


class Generate(ForgivingCommand):
    """Its help has a section for each kind of option."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        records = {option.name: option.get_help_record(ctx) for option in options}
        sections = {title: [records.pop(name) for name in names] for title, names in SECTIONS.items()}
        sections["On the screen"] = list(records.values())  # what is left: --help too
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([row for row in rows if row])


@click.command(cls=Generate, epilog=EXAMPLES)
@click.argument("prompt", required=False)
@click.option("--prompt", "prompt_option", metavar="PROMPT", help="The same as the argument PROMPT.")
@click.option(
    "--prompt-file",
    type=click.File("rb"),
    help="Prompts, one a line; - is stdin. Lines that begin with # are passed over.",
)
@click.option(
    "--requests",
    "requests_file",
    metavar="FILE.jsonl",
    type=click.File("rb"),
    help='JSON objects, one a line, such as {"prompt": "a cat", "seed": 1, "output": "cat.png"}; - is stdin.',
)
@click.option(
    "-m",
    "--model",
    "source",
    help=f"A model folder, a Hugging Face id, or 'pocket'.  [default: {DEFAULT_MODEL}, converted]",
)
@click.option("--variant", type=click.Choice(list(VARIANTS)), help="Which model it is.  [default: recognized]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("image.png"),
    show_default=True,
    help="The picture's file: .png, .jpg or .webp. {prompt}, {seed}, {n}, {width}, {height} and {steps} are filled in. "
    "If the file exists, NAME-1, NAME-2, ... is written.",
)
@click.option("--overwrite", is_flag=True, help="Write over files that exist.")
@click.option(
    "--size",
    callback=_parse(parse_size),
    metavar="W:H|WxH",
    help="An aspect such as 3:2, with about as many pixels as the model's own size, or pixels such as 1280x720.",
)
@click.option("--width", type=int, help="In pixels, a multiple of 16.  [default: the model's]")
@click.option("--height", type=int, help="In pixels, a multiple of 16.  [default: the model's]")
@click.option("--steps", type=int, help="How often the transformer is called.  [default: the model's]")
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    metavar="N...",
    help="The same seed draws the same picture; several draw one each: 1 2 3 or 1,2,3.  [default: chosen, and told]",
)
@click.option("--count", type=int, default=1, help="Pictures per seed: its own and those of the seeds that follow it.")
@click.option("--auto-seeds", type=int, metavar="N", help="Pictures of N seeds chosen at random.")
@click.option(
    "--latents",
    "latents_file",
    metavar="FILE.npy",
    type=click.Path(path_type=Path),
    help="The initial noise itself, (pictures, 16, height/8, width/8), in place of the seed's.",
)
@click.option(
    "--rng",
    type=click.Choice(RNGS),
    help="Whose noise a seed gives: PyTorch's, as in diffusers and ComfyUI, or MLX's own.  [default: torch]",
)
@click.option("--shift", type=float, help="Bends the schedule towards noise.  [default: the model's]")
@click.option("--guidance", "guidance_scale", type=float, help="0 is off; Turbo needs 0.  [default: the model's]")
@click.option("--negative-prompt", help="What to steer away from; used when guidance is above 0.")
@click.option(
    "--dtype",
    type=click.Choice(sorted(FLOATS)),
    help="What to compute in.  [default: bfloat16 on a GPU, float16 on M1 and M2, float32 on a CPU]",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="What may be used, such as 6GB; what does not fit is read from disk as needed.  [default: what suits this "
    "machine]",
)
@click.option(
    "--keep/--stage",
    " /--low-ram",
    default=None,
    help="Whether all of the model stays in memory between pictures, or each part goes when its work is done.  "
    "[default: it stays if it fits]",
)
@click.option(
    "-B",
    "--battery-limit",
    "--battery-percentage-stop-limit",
    type=click.IntRange(1, 99),
    metavar="PERCENT",
    help="On a battery that is no fuller, stop before the next picture.",
)
@click.option(
    "--from",
    "-C",
    "--config-from-metadata",
    "--config-from-conf",
    "from_picture",
    metavar="PICTURE",
    type=click.Path(path_type=Path),
    help="Begin with the request that PICTURE carries; other options change it.",
)
@click.option(
    "--metadata/--no-metadata",
    " /--no-exif",
    default=True,
    help="Whether pictures carry their request.  [default: yes]",
)
@click.option("-y", "--yes", is_flag=True, help="Where no model is here yet, fetch and convert it without asking.")
@click.option(
    "--preview",
    is_flag=True,
    help="Show the picture growing: in the terminal, if it is iTerm2, WezTerm, kitty or Ghostty, in the place that the "
    "finished picture then takes; elsewhere in the file NAME.preview.png, which goes when the picture is finished.",
)
@click.option(
    "--preview-dir",
    "--stepwise-image-output-dir",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Keep the preview of each step there, as NAME-SEED-1.png and so on.",
)
@click.option("--show", is_flag=True, help="Show pictures in the terminal: iTerm2, WezTerm, kitty, Ghostty.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per picture instead of its path.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no seeds on stderr; warnings and errors remain.")
def generate(
    prompt: str | None, prompt_option: str | None, prompt_file: BinaryIO | None, requests_file: BinaryIO | None,
    source: str | None, variant: str | None, output: Path, overwrite: bool, size: Size | None,
    seeds: tuple[str, ...], count: int, auto_seeds: int | None, latents_file: Path | None, dtype: str | None,
    memory: str | None, keep: bool | None, battery_limit: int | None, from_picture: Path | None, metadata: bool,
    preview: bool, preview_dir: Path | None, show: bool, as_json: bool, quiet: bool, yes: bool, **values,
) -> None:  # fmt: skip
    """Draw a picture of PROMPT, or several, and print their paths.

    All values are checked before the model is opened, which is once for all pictures. Where no model is on this
    machine, the first call tells what it would fetch and convert, and asks. Ctrl-C stops within a step; pictures that
    are finished stay.
    """
    # Here, so that --help and completion do not wait for MLX.
    from ..generate import Files, Saved, open_model, run
    from ..images.files import check_output, make_folder
    from ..images.metadata import read_origin
    from ..images.preview import blank, colours_of
    from ..inputs import Inputs, check_latents_size, read_latents
    from .watch import Watch, add_views

    old = read_origin(from_picture) if from_picture else None
    inputs = Inputs(read_latents(latents_file) if latents_file else None)
    if prompt is not None and prompt_option is not None:
        raise RequestError("the prompt is given twice, as the argument and as --prompt")
    prompts = _prompts(prompt_option if prompt is None else prompt, prompt_file, requests_file, old)
    base, ratio = _base(values, size, old, inputs)
    jobs = list(multiply(base, prompts, _seeds(seeds, count, auto_seeds, old), output, ratio))
    for job in jobs:
        try:
            request = job.request()
            check_output(job.path(request))
            inputs.check_named(request.latents)
        except RequestError as error:
            if not requests_file and not prompt_file:
                raise
            raise RequestError(f"picture {job.n} of {len(jobs)}: {error}") from error
        if latents_file and request.width and request.height:
            check_latents_size(latents_file, inputs.latents, request.width, request.height)
    if preview_dir:
        make_folder(preview_dir)
    if old:
        _check_latents_of(old, from_picture, inputs.digest)
    budget = None if memory is None else parse_memory(memory)
    source = source or _model_of(old, from_picture, yes, quiet)
    if quiet and not Path(source).is_dir():
        hub_bars(False)

    model = open_model(source, dtype or (old.dtype if old else None), budget, keep, variant)
    if old and model.fingerprint != old.fingerprint:
        warnings.warn(f"{source} is not the model that drew {from_picture}; the picture will differ", stacklevel=1)
    defaults = model.pipeline.defaults
    requests = [model.pipeline.complete(job.request(**defaults)) for job in jobs]
    for request in requests:
        if latents_file:
            check_latents_size(latents_file, inputs.latents, *request.extent[:2])
        model.pipeline.plan(request)  # what does not fit is refused before any work
    files = Files(overwrite, metadata)
    terminal = None if quiet else graphics()
    in_place = preview and terminal  # the finished picture takes the preview's place
    colours = colours_of(model.pipeline.encode_image) if preview or preview_dir else None
    for job, request in zip(jobs, requests, strict=True):
        _check_battery(battery_limit)
        path = job.path(request)
        say(f"Seed: {request.seed}" + (f" ({job.n} of {len(jobs)})" if len(jobs) > 1 else ""), quiet)
        width, height, steps = request.extent
        grey = blank(width, height, request.num_images)
        with Watch(steps, quiet, not in_place, colours) as watch:
            add_views(watch, path, f"{path.stem}-{request.seed}", grey, preview, preview_dir, terminal)
            for event in run(model, request, path, files, inputs):
                watch(event)
                if isinstance(event, Saved):
                    click.echo(json.dumps(event.to_dict())) if as_json else print_path(event.path)
                    if show and not in_place:
                        show_picture(event.path)


def _prompts(
    prompt: str | None, prompt_file: BinaryIO | None, requests_file: BinaryIO | None, old: Origin | None
) -> list[dict]:
    """What to draw, one dict of values a picture; each is stronger than the options."""
    if prompt_file and (prompt is not None or requests_file):
        raise RequestError("a file of prompts stands alone: give no other prompt or requests with it")
    if prompt_file:
        return read_prompts(*_read(prompt_file))
    own = {} if prompt is None else {"prompt": prompt}
    if requests_file:
        text, name = _read(requests_file)
        requests = [own | request for request in read_requests(text, name)]
        if not old and not all("prompt" in request for request in requests):
            raise RequestError(f"{name}: each object needs a prompt, or give one for all")
        return requests
    if not own and not old:
        raise click.UsageError("Missing argument 'PROMPT'; or give --prompt-file, --requests or --from.")
    return [own]


def _base(values: dict, size: Size | None, old: Origin | None, inputs: Inputs) -> tuple[dict, tuple[int, int] | None]:
    """The values that all pictures share, and their aspect if one was given."""
    base = old.request.to_dict() if old else {}
    sides, ratio = size or ({}, None)
    if size and (values["width"] or values["height"]):
        raise RequestError("--size and --width or --height contradict each other; give one")
    if ratio:
        base = {name: value for name, value in base.items() if name not in ("width", "height")}
    base |= {name: value for name, value in {**values, **sides}.items() if value is not None}
    base["latents"] = inputs.digest
    if inputs.latents is not None:
        known = fields_of_latents(inputs.latents.shape)
        base = ({} if ratio else known) | base | {"num_images": known["num_images"]}
    return base, ratio


def _read(stream: BinaryIO) -> tuple[str, str]:
    name = getattr(stream, "name", "stdin")
    return read_text(stream, name), name


def _seeds(given: tuple[str, ...], count: int, auto_seeds: int | None, old: Origin | None) -> list[int]:
    if given and auto_seeds is not None:
        raise RequestError("--seed and --auto-seeds contradict each other; give one")
    if auto_seeds is not None and not 1 <= auto_seeds <= 100_000:
        raise RequestError(f"auto-seeds must be from 1 to 100000, got {auto_seeds}")
    seeds = [seed for text in given for seed in parse_seeds(text)]
    if not seeds:
        seeds = [old.request.seed] if old and not auto_seeds else [secrets.randbits(32) for _ in range(auto_seeds or 1)]
    return count_up(seeds, count)


def _model_of(old: Origin | None, picture: Path | None, yes: bool, quiet: bool) -> str:
    """The model to draw with where none was named. A picture may name one, but only a known one is trusted."""
    if old and old.model == "pocket":
        return "pocket"
    stem = DEFAULT_MODEL.rpartition("/")[2]
    if old and old.model != DEFAULT_MODEL and not old.model.startswith(f"{stem}-"):
        raise RequestError(f"{picture} was drawn with the model {old.model!r}; say where it is with --model")
    return str(first_run(DEFAULT_MODEL, yes, quiet))


def _check_battery(limit: int | None) -> None:
    if limit is None:
        return
    charge = battery.charge()
    if charge is not None and charge <= limit:
        raise ZImageError(f"the battery is at {charge}%, and --battery-limit is {limit}: no more pictures are drawn")


def _check_latents_of(old: Origin, picture: Path | None, digest: str | None) -> None:
    if old.latents is None:
        return
    if digest is None:
        raise RequestError(f"{picture} was drawn from latents of its own; give their file with --latents")
    if digest != old.latents:
        warnings.warn(f"these are not the latents that {picture} was drawn from; the picture will differ", stacklevel=1)
