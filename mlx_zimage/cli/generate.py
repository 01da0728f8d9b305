from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

import click

from ..errors import RequestError, ZImageError
from ..jobs import count_up, multiply, parse_seeds, parse_size, read_prompts, read_requests, read_text
from ..request import LATENT_PIXELS, RNGS
from .models import DEFAULT_MODEL, first_run
from .output import graphics, hub_bars, print_path, say, show_picture

BY_BITS = "the model is converted once, as in `mlx-zimage convert Tongyi-MAI/Z-Image-Turbo DEST --q-bits 4`"
BY_MEMORY = "--memory 6GB keeps to a budget, and chooses what to read as needed and how to decode"
NO_LORA = "LoRAs are not applied; a checkpoint that has one merged into it can be converted"
FROM_TEXT = "pictures are drawn from a prompt only"
ELSEWHERE = {  # flags of mflux and others that have another name here
    "--quantize": BY_BITS,
    "--mlx-cache-limit-gb": BY_MEMORY,
    "--vae-tiling": BY_MEMORY,
    "--vae-tile-size": BY_MEMORY,
    "--float32": "--dtype float32 computes in it",
    "--compute-precision": "--dtype chooses bfloat16, float16 or float32",
    "--image-count": "--count N draws N pictures",
    "--num-images": "--count N draws N pictures",
    "--batch-size": "--count N draws N pictures, one after the other",
    "--num-inference-steps": "--steps says how often the transformer is called",
    "--guidance-scale": "--guidance is its name here",
    "--cfg": "--guidance is its name here, and counts from 0",
    "--make-conf": "every picture carries its request, and `generate --from PICTURE` draws it again",
    "--base-model": "--model takes a folder or an id, whose configs tell what it is",
    "--scheduler": "--shift bends the schedule, and examples/custom_schedule.py draws by one of one's own",
    "--lora": NO_LORA,
    "--lora-paths": NO_LORA,
    "--lora-scales": NO_LORA,
    "--image": FROM_TEXT,
    "--image-path": FROM_TEXT,
    "--image-strength": FROM_TEXT,
}
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
    "Model and machine": ("model", "yes", "dtype", "memory", "keep", "battery_limit"),
    "Files": ("output", "overwrite", "metadata", "preview_dir"),
}
ANY_SIDE = 1024  # stands in for the model's size until it is open, to check all values before that


def _parse(parse):
    def callback(ctx, parameter, value):
        return None if value is None else parse(value)

    return callback


class Generate(click.Command):
    """Takes what other programs' users type: several values after one --seed, and a word on flags that are not here."""

    def parse_args(self, ctx, args):
        if any(word == "-q" and bits in ("3", "4", "5", "6", "8") for word, bits in pairwise(args)):
            raise click.UsageError(f"-q is --quiet and takes no number: {BY_BITS}", ctx)
        try:
            return super().parse_args(ctx, join_seeds(args))
        except click.NoSuchOption as error:
            if error.option_name in ELSEWHERE:
                raise click.UsageError(
                    f"There is no {error.option_name}: {ELSEWHERE[error.option_name]}", ctx
                ) from None
            raise

    def format_options(self, ctx, formatter):
        records = {
            option.name: option.get_help_record(ctx) for option in self.get_params(ctx) if option.opts[0][0] == "-"
        }
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([records.pop(name) for name in names])
        with formatter.section("On the screen"):  # what is left: --help too
            formatter.write_dl(list(records.values()))


def join_seeds(args: list[str]) -> list[str]:
    """--seed 1 2 3 as --seed 1,2,3."""
    joined = []
    for i, word in enumerate(args):
        if word == "--":
            return joined + args[i:]
        if word.isdecimal() and joined[-2:-1] == ["--seed"]:
            joined[-1] += f",{word}"
        else:
            joined.append(word)
    return joined


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
    "-m", "--model", help=f"A model folder, a Hugging Face id, or 'pocket'.  [default: {DEFAULT_MODEL}, converted]"
)
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
@click.option("--steps", type=int, help="How often the transformer is called.  [default: 8]")
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
@click.option("--shift", type=float, help="Bends the schedule towards noise.  [default: the model's, 3.0]")
@click.option("--guidance", "guidance_scale", type=float, help="0 is off; Turbo needs 0.  [default: 0]")
@click.option("--negative-prompt", help="What to steer away from; used when guidance is above 0.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
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
    prompt, prompt_option, prompt_file, requests_file, model, output, overwrite, size, seeds, count, auto_seeds,
    latents_file, dtype, memory, keep, battery_limit, from_picture, metadata, preview, preview_dir, show, as_json,
    quiet, yes, **values,
):  # fmt: skip
    """Draw a picture of PROMPT, or several, and print their paths.

    All values are checked before the model is opened, which is once for all pictures. Where no model is on this
    machine, the first call tells what it would fetch and convert, and asks. Ctrl-C stops within a step; pictures that
    are finished stay.
    """
    from ..images.codec import check_latents_size, read_latents
    from ..images.files import check_output, make_folder
    from ..images.metadata import fingerprint, read_origin
    from ..memory import parse_memory

    old = read_origin(from_picture) if from_picture else None
    latents = read_latents(latents_file) if latents_file else None
    if prompt is not None and prompt_option is not None:
        raise RequestError("the prompt is given twice, as the argument and as --prompt")
    prompts = _prompts(prompt_option if prompt is None else prompt, prompt_file, requests_file, old)
    base, ratio = _base(values, size, old, latents)
    jobs = list(multiply(base, prompts, _seeds(seeds, count, auto_seeds, old), output, ratio))
    for job in jobs:
        try:
            request = job.request(ANY_SIDE)
            check_output(job.path(request))
        except RequestError as error:
            if not requests_file and not prompt_file:
                raise
            raise RequestError(f"picture {job.n} of {len(jobs)}: {error}") from error
        if latents is not None:
            check_latents_size(latents_file, latents, request)
    if preview_dir:
        make_folder(preview_dir)
    _check_latents_of(old, from_picture, latents)
    memory = None if memory is None else parse_memory(memory)
    model = model or _model_of(old, from_picture, yes, quiet)

    from ..images.preview import colours_of
    from ..pipeline import ZImagePipeline
    from .watch import Watch

    if quiet and not Path(model).is_dir():
        hub_bars(False)
    dtype = dtype or (old.dtype if old else None)
    pipeline = ZImagePipeline.from_pretrained(model, dtype=dtype, memory=memory, keep=keep)
    maker = {
        "model": Path(model).resolve().name if Path(model).is_dir() else model,
        "fingerprint": fingerprint(pipeline.checkpoint),
        "latents": _digest(latents),
    }
    if old and maker["fingerprint"] != old.fingerprint:
        warnings.warn(f"{model} is not the model that drew {from_picture}; the picture will differ", stacklevel=1)
    for job in jobs:
        pipeline.plan(job.request(pipeline.sample_size))  # what does not fit is refused before any work
    written = set()
    terminal = None if quiet else graphics()
    colours = colours_of(pipeline.vae) if preview or preview_dir else None
    for job in jobs:
        _check_battery(battery_limit)
        request = job.request(pipeline.sample_size)
        path = job.path(request)
        say(f"Seed: {request.seed}" + (f" ({job.n} of {len(jobs)})" if len(jobs) > 1 else ""), quiet)
        with Watch(request.steps, quiet, not (preview and terminal), colours) as watch:
            _add_views(watch, path, request, preview, preview_dir, terminal)
            for saved, origin, clock in draw(
                pipeline, request, latents, path, maker, metadata, overwrite, written, watch
            ):
                print_json(saved, origin, clock) if as_json else print_path(saved)
                if show and not (preview and terminal):
                    show_picture(saved)


def draw(pipeline, request, latents, path, maker, metadata, overwrite, written, watch):
    """Draw a request and save its pictures, yielding each one's path, Origin and Clock; watch sees every event.

    written holds the paths of this call: they are not written over.
    """
    from ..images.files import save
    from ..images.metadata import Origin
    from ..pipeline import Generated, Phase
    from ..sampling import Step

    clock = Clock()
    for event in pipeline.events(request, latents):
        if isinstance(event, Phase) and event.name in clock.before:
            clock.prepared(event.name)
        elif isinstance(event, Step):
            clock.step(event.index)
        elif isinstance(event, Generated):
            clock.decoded(event.plan.peak)
            origin = Origin(request, index=event.index, dtype=event.dtype, **maker)
            saved = save(event.pixels, path, overwrite and path not in written, origin if metadata else None)
            written.add(saved)
        watch(event)
        if isinstance(event, Generated):
            yield saved, origin, clock


def _add_views(watch, path, request, preview, folder, terminal) -> None:
    """Where a request's previews are shown."""
    import numpy as np

    from ..images.preview import Album, Screen, Sheet

    if preview and terminal:
        watch.views.append(Screen(sys.stderr.buffer, terminal))
    elif preview:
        sheet = Sheet(path.with_name(f"{path.stem}.preview.png"))
        watch.views.append(sheet)
        size = request.height // LATENT_PIXELS, request.num_images * request.width // LATENT_PIXELS
        sheet(np.full((*size, 3), 128, np.uint8))  # grey, so that it may be opened at once
        watch.say(f"Preview, until the picture is finished: {sheet.path}")
    if folder:
        watch.views.append(Album(folder, f"{path.stem}-{request.seed}"))


class Clock:
    """Seconds that one request takes, and the memory it needs at most, measured and predicted."""

    def __init__(self):
        import mlx.core as mx

        mx.reset_peak_memory()
        self.peak = mx.get_peak_memory
        self.begin = self.last = time.perf_counter()
        self.before = {"scale": 0.0, "encode": 0.0}  # the phases before the steps
        self.steps: list[float] = []
        self.decode = 0.0
        self.predicted = 0

    def prepared(self, phase: str):
        self.before[phase] += self._lap()

    def step(self, index: int):
        del self.steps[index:]  # those of a picture that was begun again
        self.steps.append(self._lap())

    def decoded(self, predicted: int):
        self.decode = self._lap()
        self.predicted = predicted

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self.last = now - self.last, now
        return lap

    def to_dict(self) -> dict:
        """The first step's time has the reading of the transformer in it; encoding a known prompt takes none, nor does
        finding float16's scale in any other dtype, or of a known model."""
        first, *rest = self.steps
        return {
            "seconds": round(self.last - self.begin, 4),
            **{f"{phase}_seconds": round(seconds, 4) for phase, seconds in self.before.items()},
            "first_step_seconds": round(first, 4),
            "step_seconds": round(sum(rest) / len(rest), 4) if rest else None,
            "decode_seconds": round(self.decode, 4),
            "peak_memory_gb": round(self.peak() / 1e9, 4),
            "predicted_peak_memory_gb": round(self.predicted / 1e9, 4),
        }


def print_json(path: Path, origin, clock: Clock) -> None:
    fields = json.loads(origin.to_json())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    click.echo(json.dumps({"path": os.fspath(path), "sha256": sha256, **fields, **clock.to_dict()}))


def _prompts(prompt, prompt_file, requests_file, old) -> list[dict]:
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


def _base(values, size, old, latents) -> tuple[dict, tuple[int, int] | None]:
    """The values that all pictures share, and their aspect if one was given."""
    base = old.request.to_dict() if old else {}
    sides, ratio = size or ({}, None)
    if size and (values["width"] or values["height"]):
        raise RequestError("--size and --width or --height contradict each other; give one")
    if ratio:
        base = {name: value for name, value in base.items() if name not in ("width", "height")}
    base |= {name: value for name, value in {**values, **sides}.items() if value is not None}
    if latents is not None:
        count, _, h, w = latents.shape
        own = {} if ratio else {"width": w * LATENT_PIXELS, "height": h * LATENT_PIXELS}
        base = own | base | {"num_images": count}
    return base, ratio


def _read(stream) -> tuple[str, str]:
    name = getattr(stream, "name", "stdin")
    return read_text(stream, name), name


def _seeds(given, count, auto_seeds, old) -> list[int]:
    if given and auto_seeds is not None:
        raise RequestError("--seed and --auto-seeds contradict each other; give one")
    if auto_seeds is not None and not 1 <= auto_seeds <= 100_000:
        raise RequestError(f"auto-seeds must be from 1 to 100000, got {auto_seeds}")
    seeds = [seed for text in given for seed in parse_seeds(text)]
    if not seeds:
        seeds = [old.request.seed] if old and not auto_seeds else [secrets.randbits(32) for _ in range(auto_seeds or 1)]
    return count_up(seeds, count)


def _model_of(old, picture, yes, quiet) -> str:
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
    from .. import battery

    charge = battery.charge()
    if charge is not None and charge <= limit:
        raise ZImageError(f"the battery is at {charge}%, and --battery-limit is {limit}: no more pictures are drawn")


def _check_latents_of(old, picture, latents) -> None:
    if old is None or old.latents is None:
        return
    if latents is None:
        raise RequestError(f"{picture} was drawn from latents of its own; give their file with --latents")
    if _digest(latents) != old.latents:
        warnings.warn(f"these are not the latents that {picture} was drawn from; the picture will differ", stacklevel=1)


def _digest(latents) -> str | None:
    return None if latents is None else hashlib.sha256(latents.astype("<f4").tobytes()).hexdigest()
