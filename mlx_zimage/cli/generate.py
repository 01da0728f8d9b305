from __future__ import annotations

import json
import secrets
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from .. import battery
from ..drafts import (
    MAX_IMAGES,
    Draft,
    Series,
    expand_short,
    fields_of_latents,
    lines_of,
    multiply,
    parse_seeds,
    parse_size,
    read_prompts,
    read_requests,
    read_text,
)
from ..errors import RequestError, ZImageError
from ..launched import launched_rank
from ..request import FEATHERS, RESAMPLE, RNGS, GenerateRequest, LoraUse, check_prompt_and_seed
from ..sizes import parse_memory
from ..tokenizer import most_ids
from ..variants import ALIASES
from .adapters import WithLoras, load_loras, lora_options, name_paths
from .controls import (
    check_old_controls,
    choose_control,
    control_notes,
    control_options,
    controls_given,
    load_control,
)
from .elsewhere import as_typed, join_seeds, options_given, refuse_strength_of_mflux
from .models import DEFAULT_MODEL, first_run
from .notes import notes
from .output import graphics, hub_bars, print_path, say, show_image
from .values import (
    FilePath,
    InputFile,
    ModelName,
    check_one_size,
    dtype_option,
    keep_option,
    memory_option,
    size_options,
    variant_option,
    yes_option,
)

if TYPE_CHECKING:
    from ..images.metadata import Origin
    from .given import Given

EXAMPLES = """\b
Example: mlx-zimage generate "a lighthouse at dusk" --size 3:2 --seed 7 -o lighthouse.png
Four seeds, one file each, with a live preview in the terminal:
    mlx-zimage generate "a lighthouse at dusk" --seed 1 2 3 4 -o "{prompt}-{seed}.webp" --preview
The same image with another seed:
    mlx-zimage generate --from lighthouse.png --seed 8
Start from an image:
    mlx-zimage generate "the same lighthouse in winter" --image lighthouse.png --strength 0.6
    mlx-zimage generate "a lighthouse and the sea" --image lighthouse.png --outpaint left=256,right=256
    mlx-zimage generate "a lighthouse at dusk" --image lighthouse.png --upscale 2
One prompt per line in, one JSON object per image out:
    mlx-zimage generate --prompt-file prompts.txt --json -q | jq -r .path
"""
SECTIONS = {  # of the help text, with the names of their options
    "Image": ("prompt_option", "prompt_file", "requests_file", "from_image", "size", "width", "height"),
    "Image to image": (
        *(
            "image_file",
            "strength",
            "mask_image",
            "mask_feather",
            "mask_grow",
            "mask_soft",
            "mask_resample",
            "outpaint",
            "upscale",
            "tile",
        ),
        "sample_posterior",
    ),
    "Seeds": ("seed", "count", "auto_seeds", "rng", "latents_file"),
    "Sampling": ("steps", "shift", "guidance_scale", "negative_prompt", "cfg_normalization", "cfg_truncation"),
    "LoRA": ("loras", "lora_partial"),
    "ControlNet": (
        *("control_files", "control_model", "control_scales", "control_start", "control_end", "control_kind"),
    ),
    "Model and memory": (
        *("source", "variant", "transformer", "text_encoder", "vae", "yes", "dtype", "memory", "keep", "wired"),
        *("battery_limit", "server"),
    ),
    "Output": ("output", "overwrite", "metadata", "preview_dir"),
}


EMPTY: Mapping[str, str] = {}


class Generate(WithLoras):
    """Accepts several seeds, hints at missing quotes, and groups the options in its help into sections."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        refuse_strength_of_mflux(ctx, args)
        return super().parse_args(ctx, join_seeds(args))

    def too_many(self, ctx: click.Context, args: list[str]) -> str:
        quoted = shlex.quote(" ".join([ctx.params["prompt"], *ctx.args]))
        options = " ..." if any(word.startswith("-") for word in args) else ""
        return f"Got several arguments; quote the prompt: mlx-zimage generate {quoted}{options}"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        records = {option.name: option.get_help_record(ctx) for option in options}
        sections = {title: [records.pop(name) for name in names] for title, names in SECTIONS.items()}
        sections["Display"] = list(records.values())  # the rest, including --help
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([row for row in rows if row])


@click.command(cls=Generate, epilog=EXAMPLES)
@click.argument("prompt", required=False)
@click.option("--prompt", "prompt_option", metavar="PROMPT", help="Same as the argument PROMPT; - for stdin.")
@click.option(
    "--prompt-file",
    type=InputFile(),
    help="Read prompts from a file, one per line; - for stdin. Lines starting with # are ignored.",
)
@click.option(
    "--requests",
    "requests_file",
    metavar="FILE.jsonl",
    type=InputFile(),
    help='Read JSON objects, one per line, such as {"prompt": "a cat", "seed": 1, "output": "cat.png"}; - for stdin.',
)
@click.option(
    "-m",
    "--model",
    "source",
    type=ModelName(),
    help="Model folder or file (from this program, diffusers, mflux, mlx-vlm, ComfyUI), Hugging Face id, ID:PATH for a "
    f"file or folder in its repository, 'z-image-turbo', 'z-image' or 'pocket'.  [default: {DEFAULT_MODEL}, converted]",
)
@variant_option
@click.option(
    "--transformer",
    metavar="OTHER",
    type=ModelName(),
    help="Take the transformer from OTHER: a folder, a file or an id.",
)
@click.option("--text-encoder", metavar="OTHER", type=ModelName(), help="Take the text encoder from OTHER.")
@click.option("--vae", metavar="OTHER", type=ModelName(), help="Take the VAE from OTHER.")
@click.option(
    "-o",
    "--output",
    type=FilePath(),
    default=Path("image.png"),
    show_default=True,
    help="Output file: .png, .jpg or .webp. {prompt}, {seed}, {n}, {width}, {height} and {steps} are filled in. "
    "Existing files are kept: new ones are named NAME-1, NAME-2, ...",
)
@click.option("--overwrite", is_flag=True, help="Overwrite existing files.")
@size_options
@click.option("--steps", type=int, help="Number of denoising steps.  [default: the model's]")
@click.option(
    "--seed",
    multiple=True,
    metavar="N...",
    help="Random seed; give several for one image each: 1 2 3 or 1,2,3.  [default: random; printed]",
)
@click.option("--count", type=int, default=1, metavar="N", help="Generate N images per seed: SEED, SEED+1, ...")
@click.option("--auto-seeds", type=int, metavar="N", help="Generate N images with random seeds.")
@click.option(
    "--latents",
    "latents_file",
    metavar="FILE.npy",
    type=FilePath(),
    help="Initial noise, shape (images, 16, height/8, width/8), instead of the seed's.",
)
@click.option(
    "--rng",
    type=click.Choice(RNGS),
    help="Noise generator: torch gives the same noise as diffusers and ComfyUI, mlx is MLX's own.  [default: torch]",
)
@click.option(
    "--shift", type=float, help="Timestep shift: higher spends more steps at high noise.  [default: the model's]"
)
@click.option(
    "--guidance",
    "guidance_scale",
    type=float,
    help="Guidance scale; 0 turns it off, which Turbo needs.  [default: the model's]",
)
@click.option("--negative-prompt", help="What to avoid in the image; only used with guidance above 0.")
@click.option(
    "--cfg-normalization",
    type=float,
    metavar="FACTOR",
    help="Limit the length of the guided velocity to FACTOR times that of the prompt's own velocity; 0 means no "
    "limit.  [default: 0]",
)
@click.option(
    "--cfg-truncation",
    type=float,
    metavar="TIME",
    help="Turn guidance off for steps after TIME, where 0 is noise and 1 is the finished image; unguided steps take "
    "half as long.  [default: 1]",
)
@click.option(
    "--image",
    "image_file",
    metavar="FILE",
    type=FilePath(),
    help="Start from this image instead of noise: PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF or HEIC. It also sets the "
    "size; if --size is different, the image is scaled and cropped.",
)
@click.option(
    "--strength",
    type=float,
    help="How much to change the image, above 0 and up to 1: the fraction of the steps to run. 1 ignores the image. "
    "mflux's --image-strength is the opposite, 1 minus this.  [default: 0.6]",
)
@click.option(
    "--mask",
    "mask_image",
    metavar="FILE",
    type=FilePath(),
    help="Regenerate only where this image is white, and leave the rest unchanged. It must be the same size as "
    "--image or the result. --strength is then 1 by default.",
)
@click.option(
    "--mask-feather",
    type=int,
    metavar="PIXELS",
    help="Width of the blend between old and new, inside the mask.  "
    f"[default: 1/{FEATHERS} of the shorter side: 16 at 1024x1024]",
)
@click.option("--mask-grow", type=int, metavar="PIXELS", help="Move the mask's edges outwards by PIXELS.  [default: 0]")
@click.option(
    "--mask-soft",
    is_flag=True,
    help="Regenerate grey parts of the mask in the later steps only, instead of rounding them to black or white.",
)
@click.option(
    "--mask-resample",
    type=int,
    metavar="N",
    help="Sample the latents again N times before each step, so that the part inside the mask better fits the prompt "
    f"and its surroundings. Each time takes as long as a step; 0 is what diffusers does.  [default: {RESAMPLE}]",
)
@click.option(
    "--outpaint",
    metavar="SIDES",
    help="Extend --image on these sides (left, top, right, bottom) by multiples of 16 pixels: left=256,top=128. --size "
    "is then the size of the whole result.",
)
@click.option(
    "--upscale",
    type=float,
    metavar="FACTOR",
    help="Enlarge --image by FACTOR, up to 8, and refine it; --strength is then 0.2 by default. Without --image, an "
    "image is generated first.",
)
@click.option(
    "--tile",
    type=int,
    metavar="PIXELS",
    help="Refine in overlapping tiles of at most PIXELS per side; 0 refines the whole image at once.  "
    "[default: the model's image size]",
)
@click.option(
    "--sample-posterior",
    is_flag=True,
    help="Sample the image's latents as diffusers does, instead of taking their mean.",
)
@lora_options
@control_options
@dtype_option
@memory_option
@keep_option
@click.option(
    "--wired",
    is_flag=True,
    help="Lock the resident weights in physical memory on macOS. Risky: kernel panics (the Mac restarts) have been "
    "reported with wired memory; use only if other programs push the model out of memory.",
)
@click.option(
    "-B",
    "--battery-limit",
    "--battery-percentage-stop-limit",
    type=click.IntRange(1, 99),
    metavar="PERCENT",
    help="Stop before the next image if the battery is at or below PERCENT.",
)
@click.option(
    "--server",
    envvar="MLX_ZIMAGE_SERVER",
    metavar="URL",
    help="Generate on this server, started by `mlx-zimage serve`, instead of loading the model here. --model and "
    "--lora then name the server's models and LoRAs, and the ControlNet is the server's own. MLX_ZIMAGE_SERVER does "
    "the same.",
)
@click.option(
    "--from",
    "-C",
    "--config-from-metadata",
    "--config-from-conf",
    "from_image",
    metavar="IMAGE",
    type=FilePath(),
    help="Start from the request that this program or mflux stored in IMAGE or a .json file; other options override "
    "it.",
)
@click.option(
    "--metadata/--no-metadata",
    " /--no-exif",
    default=True,
    help="Store the request in the image.  [default: yes]",
)
@yes_option
@click.option(
    "--preview",
    is_flag=True,
    help="Show a preview after each step: inline in iTerm2, WezTerm, kitty and Ghostty; in any other terminal, as "
    "NAME.preview.png, which is deleted when the image is finished.",
)
@click.option(
    "--preview-dir",
    "--stepwise-image-output-dir",
    metavar="FOLDER",
    type=FilePath(),
    help="Save the preview of each step in FOLDER as NAME-SEED-1.png, ...",
)
@click.option("--show", is_flag=True, help="Show images in the terminal (iTerm2, WezTerm, kitty, Ghostty).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image instead of its path.")
@click.option("-q", "--quiet", is_flag=True, help="Do not show progress or seeds.")
@click.pass_context
def generate(
    ctx: click.Context,
    prompt: str | None, prompt_option: str | None, prompt_file: BinaryIO | None, requests_file: BinaryIO | None,
    source: str | None, variant: str | None, transformer: str | None, text_encoder: str | None, vae: str | None,
    output: Path, overwrite: bool, size: str | None,
    seed: tuple[str, ...], count: int, auto_seeds: int | None, latents_file: Path | None, image_file: Path | None,
    sample_posterior: bool, mask_image: Path | None, mask_soft: bool, dtype: str | None,
    memory: str | None, keep: bool | None, wired: bool, battery_limit: int | None, from_image: Path | None,
    loras: list[tuple[str, float | None]], lora_partial: bool,
    control_files: tuple[str, ...], control_model: str | None, control_scales: tuple[float, ...],
    control_start: float | None, control_end: float | None, control_kind: str | None,
    metadata: bool, preview: bool, preview_dir: Path | None, show: bool, as_json: bool, quiet: bool, yes: bool,
    server: str | None,
    **values,
) -> None:  # fmt: skip
    """Generate one or more images from PROMPT and print their paths.

    All values are checked first; the model is then loaded once for all images. If the default model is not on this
    machine, the first run shows what it would download and convert, and asks whether to continue. Ctrl-C stops
    within a step; finished images are kept.
    """
    # Imported here so that --help and completion do not wait for MLX.
    from ..distributed import Group
    from ..generate import Files, Saved, described, open_model, run
    from ..images.files import make_folder
    from ..images.metadata import read_origin
    from ..images.preview import blank, colours_of
    from ..inputs import NONE, check_latents_size
    from ..weights.library import register
    from .given import Given
    from .remote import Remote
    from .watch import Watch, add_views

    old = read_origin(from_image) if from_image else None
    files_given = Given(latents_file, image=image_file, mask_image=mask_image)
    if prompt is not None and prompt_option is not None:
        raise RequestError("the prompt was given twice, as an argument and with --prompt; give one")
    given = options_given(ctx)
    by_line, file = _prompts(prompt_option if prompt is None else prompt, prompt_file, requests_file, old)
    prompts, lora_paths = name_paths([*by_line.values()], [path for path, _ in loras])
    places = [f"{file}, line {line}" if file else "" for line in by_line]
    for i, place in enumerate(places):
        with _located(place):
            prompts[i] = files_given.named(prompts[i])
    _warn_of_overridden(given, prompts if requests_file else [])
    flags = {"sample_posterior": sample_posterior or None, "mask_soft": mask_soft or None}
    base, ratio = _base(values | flags, size, old, files_given)
    shown = control_files, control_scales, control_start, control_end
    if control_files:
        base["controls"] = controls_given(files_given, *shown, old)
    elif any(value not in (None, ()) for value in shown) and not any("controls" in own for own in prompts):
        raise RequestError("--control-scale, --control-start and --control-end need --control FILE")
    elif old and not all("controls" in own for own in prompts):
        check_old_controls(old, from_image)
    if old:
        _check_combined(old, from_image, base)
        _check_old(old, from_image, files_given.digests, prompts)
    all_series = multiply(base, prompts, _seeds(seed, auto_seeds, old), output, ratio, count)
    total = sum(map(len, all_series))
    kinds: dict[str, list[tuple[str, Series]]] = {}  # which differ in more than prompts, seeds and files
    folders: set[Path] = set()  # that images can be written to
    for place, own, series in zip(places, prompts, all_series, strict=True):
        alike = kinds.setdefault(series.kind, [])
        alike.append((place, series))
        if series.output == alike[0][1].output and len(alike) > 1 and _is_valid_too(series):
            continue
        with _located(place, _names(given, own)):
            request = _check(series, folders)
            files_given.inputs(request).check_named(request.arrays)
            if latents_file and request.width and request.height and not request.upscale:
                check_latents_size(latents_file, files_given.latents, request.width, request.height)
    drafts = ((place, draft) for place, series in zip(places, all_series, strict=True) for draft in series)
    if server:
        remote = Remote(server, source, given)
        uses = _uses(lora_paths, loras, old)
        files = Files(overwrite)
        for place, draft in drafts:
            _check_battery(battery_limit)
            request = remote.request(draft)
            request = replace(request, loras=uses) if request.loras is None else request
            say(f"Seed: {request.seed}" + (f" ({draft.n} of {total})" if total > 1 else ""), quiet)
            with _located(_image(place, draft.n, total)):
                inputs = files_given.inputs(request)
                content, origin = remote.generate(request, draft.output.suffix, inputs, metadata, quiet)
                path = files.write(content, draft.path(origin.request))
            click.echo(json.dumps(described(path, origin))) if as_json else print_path(path)
            if show:
                show_image(path)
        return
    quiet = quiet or launched_rank() > 0
    if preview_dir:
        make_folder(preview_dir)
    if latents_file:
        for option in given.keys() & {"seed", "auto_seeds", "rng"}:
            _warn(f"{given[option]} changes nothing: --latents replaces the noise")
        if total > len(all_series):
            _warn("requests that differ only in their seeds will give the same image: --latents replaces the noise")
    if wired and sys.platform != "darwin":
        _warn("--wired changes nothing here: only macOS can lock the GPU's memory")
    budget = None if memory is None else parse_memory(memory)
    follows = any(series.values.get("controls") for series in all_series)
    known = source or (old.model if old else None)
    control_source = choose_control(control_model, control_kind, follows, known, yes, quiet)
    if source is None:
        source = _default_model(old, from_image, yes, quiet)
    elif source in ALIASES and not Path(source).exists():
        source = str(first_run(ALIASES[source], yes, quiet))
    parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    if quiet and not Path(source).is_dir():
        hub_bars(False)

    own_dtype, group = dtype or (old.dtype if old else "") or None, Group.launched()
    model = open_model(source, own_dtype, budget, keep, variant, wired, group=group, **parts)
    ctx.call_on_close(model.pipeline.close)
    register(Path(source))
    if old and not old.fingerprint:
        _warn(f"{from_image} was generated by {old.software}; the image will look different here")
    elif old and model.fingerprint != old.fingerprint:
        _warn(f"{source} is not the model that generated {from_image}; the image will differ")
    load_loras(model.pipeline, lora_paths, loras, old, lora_partial)
    load_control(model.pipeline, control_source, control_kind, old, from_image, quiet)
    if group is not None and not group.leads:
        model.pipeline.follow()
        return
    side = model.pipeline.sample_size

    def complete(draft: Draft) -> GenerateRequest:
        request = draft.request(side)
        return model.pipeline.complete(request, files_given.inputs(request))

    requests = []
    for (place, series), *others in kinds.values():
        with _located(place):
            request = complete(next(iter(series)))
            if latents_file:
                check_latents_size(latents_file, files_given.latents, *request.parts[0].extent[:2])
            inputs = files_given.inputs(request) if request.mask_image else NONE
            model.pipeline.plan(request, inputs)  # refuses what does not fit, masks too, before any work
            most = model.pipeline.most_tokens(request) if others else 0
        requests.append(request)
        for place, series in others:
            request = replace(request, prompt=series.values.get("prompt", request.prompt))
            requests.append(request)
            if most < min(request.max_sequence_length, most_ids(request.prompt)):
                with _located(place):
                    model.pipeline.plan(request)
    found = [note for request in dict.fromkeys(requests) for note in notes(request, model.pipeline.checkpoint)]
    found += [note for request in requests for note in control_notes(request, model.pipeline)]
    for message in dict.fromkeys(found):
        _warn(message)
    files = Files(overwrite, metadata)
    terminal = None if quiet else graphics()
    in_place = preview and terminal  # the finished image replaces the preview
    colours = colours_of(model.pipeline.encode_image) if preview or preview_dir else None
    for several in model.pipeline.in_rounds(drafts):
        _check_battery(battery_limit)
        works, paths = [], []
        for _, draft in several:
            request = complete(draft)
            works.append((request, files_given.inputs(request)))
            paths.append(draft.path(request))
            say(f"Seed: {request.seed}" + (f" ({draft.n} of {total})" if total > 1 else ""), quiet)
        (request, _), path = works[0], paths[0]
        width, height, _ = request.extent
        steps = model.pipeline.count_steps(request)
        grey = blank(width, height, request.num_images)
        with _located(_images(several, total)), Watch(steps, quiet, not in_place, colours) as watch:
            add_views(watch, path, f"{path.stem}-{request.seed}", grey, preview, preview_dir, terminal)
            for event in run(model, works, paths, files):
                watch(event)
                if isinstance(event, Saved):
                    click.echo(json.dumps(event.to_dict())) if as_json else print_path(event.path)
                    if show and not in_place:
                        show_image(event.path)


def _uses(names: Mapping[str, str], given: list[tuple[str, float | None]], old: Origin | None) -> tuple[LoraUse, ...]:
    """The LoRAs of an old image and those given with --lora, by name."""
    strengths = {use.name: use.strength for use in (old.request.loras if old else None) or ()}
    strengths |= {names[path]: 1.0 if strength is None else strength for path, strength in given}
    return tuple(LoraUse(*use) for use in strengths.items())


def _prompts(
    prompt: str | None, prompt_file: BinaryIO | None, requests_file: BinaryIO | None, old: Origin | None
) -> tuple[dict[int, dict], str]:
    """A dict of values per prompt, by the number of its line, and the name of the file with the lines, if any.

    The values take precedence over the options. The prompt - is read from stdin.
    """
    if sum((prompt == "-", _is_stdin(prompt_file), _is_stdin(requests_file))) > 1:
        raise RequestError("stdin can be read only once; give - for only one of PROMPT, --prompt-file and --requests")
    if prompt == "-":
        prompt = read_text(InputFile().convert("-", None, ctx=None), "stdin").strip()
    if prompt_file and (prompt is not None or requests_file):
        raise RequestError("--prompt-file cannot be combined with another prompt or --requests; give one")
    if prompt_file:
        lines, name = _lines(prompt_file)
        return read_prompts(lines, name), name
    own = {} if prompt is None else {"prompt": prompt}
    if requests_file:
        lines, name = _lines(requests_file)
        requests = {i: own | request for i, request in read_requests(lines, name).items()}
        if not old and (without := [i for i, request in requests.items() if "prompt" not in request]):
            raise RequestError(f"{name}, line {without[0]} has no prompt; add one, or give PROMPT for all objects")
        return requests, name
    if not own and not old:
        raise click.UsageError("Missing argument 'PROMPT'; give it, or use --prompt-file, --requests or --from.")
    return {1: own}, ""


@contextmanager
def _located(place: str, names: Mapping[str, str] = EMPTY) -> Iterator[None]:
    """Begin errors with the place that they are about, and name values as they were given."""
    try:
        yield
    except ZImageError as error:
        if not place:
            raise
        raise type(error)(f"{place}: {as_typed(str(error), names)}") from error


def _image(place: str, n: int, total: int) -> str:
    """Which of the images an error is about; "" if there is only one."""
    return ", ".join(part for part in (place, f"image {n} of {total}" if total > 1 else "") if part)


def _images(several: Sequence[tuple[str, Draft]], total: int) -> str:
    """Which of the images an error is about, when several are generated at once."""
    (place, first), (_, last) = several[0], several[-1]
    return _image(place, first.n, total) if first is last else f"images {first.n} to {last.n} of {total}"


def _is_stdin(file: BinaryIO | None) -> bool:
    return file is not None and getattr(file, "name", "<stdin>") == "<stdin>"


def _base(values: dict, size: str | None, old: Origin | None, given: Given) -> tuple[dict, tuple[int, int] | None]:
    """The values that all images share, and their aspect ratio if one was given."""
    # they are loaded with the model
    base = {**old.request.to_dict(), "loras": None, "controlnet": None} if old else {}
    check_one_size(size, values["width"], values["height"])
    sides, ratio = parse_size(size) if size else ({}, None)
    base |= {name: value for name, value in {**values, **sides}.items() if value is not None}
    base |= given.digests
    if given.latents is not None:
        known = fields_of_latents(given.latents.shape)
        sides = {} if base["image"] and base.get("upscale") else known  # they have the size of the enlarged image
        base = sides | base | {"num_images": known["num_images"]}
    return base, ratio


def _check(series: Series, folders: set[Path]) -> GenerateRequest:
    """A request of a series; RequestError unless all are valid, and their images can be written.

    folders are those that were checked before; this one's is added.
    """
    from ..images.files import check_name, check_output

    ends = replace(series, seeds=sorted({min(series.seeds), max(series.seeds)})) if len(series) > 1 else series
    (draft, request), *_ = [(draft, draft.request()) for draft in ends]
    request.check_image()
    path = draft.path(request)
    (check_name if path.parent in folders else check_output)(path)
    folders.add(path.parent)
    return request


def _is_valid_too(series: Series) -> bool:
    """Whether a series is valid, given that another one of its kind is."""
    prompt, embeds = series.values.get("prompt", ""), series.values.get("prompt_embeds")
    try:
        for seed in (series.seeds[0], series.seeds[-1]) if len(series) > 1 else series.seeds:
            check_prompt_and_seed(prompt, seed, embeds is not None)
    except ZImageError:
        return False
    return True


def _names(given: Mapping[str, str], own: dict) -> dict[str, str]:
    """How the values of one request were given, by their names: as an option, or a key of its object."""
    hidden = {"size", "width", "height"} if own.keys() & {"size", "width", "height"} else set()
    names = {name: option for name, option in given.items() if name not in own.keys() | hidden}
    return names | {field: key for field, key in (("guidance_scale", "guidance"), ("size", "size")) if key in own}


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _warn_of_overridden(given: Mapping[str, str], objects: list[dict]) -> None:
    """Warn of options that no request uses, since each has a value of its own."""
    keys = {"auto_seeds": "seed", "prompt_option": "prompt"}
    own = [expand_short(values)[0].keys() | values.keys() for values in objects]
    for name, option in given.items():
        if own and all(keys.get(name, name) in fields for fields in own):
            _warn(f"{option} changes nothing: each of the requests has its own {keys.get(name, name)}")


def _lines(stream: BinaryIO) -> tuple[Iterator[str], str]:
    name = "stdin" if _is_stdin(stream) else stream.name
    return lines_of(stream, name), name


def _seeds(given: tuple[str, ...], auto_seeds: int | None, old: Origin | None) -> list[int]:
    if given and auto_seeds is not None:
        raise RequestError("--seed cannot be combined with --auto-seeds; give one")
    if auto_seeds is not None and not 1 <= auto_seeds <= MAX_IMAGES:
        raise RequestError(f"--auto-seeds must be from 1 to {MAX_IMAGES}, got {auto_seeds}")
    seeds = [one for text in given for one in parse_seeds(text)]
    if not seeds:
        seeds = [old.request.seed] if old and not auto_seeds else [secrets.randbits(32) for _ in range(auto_seeds or 1)]
    return seeds


def _default_model(old: Origin | None, image: Path | None, yes: bool, quiet: bool) -> str:
    """The model to use when none was given. An image names its model, but only a known one is trusted."""
    if old and old.model == "pocket":
        return "pocket"
    stem = DEFAULT_MODEL.rpartition("/")[2]
    if old and old.model != DEFAULT_MODEL and not old.model.startswith(f"{stem}-"):
        raise RequestError(f"{image} was generated with the model {old.model!r}; pass its folder or id with --model")
    return str(first_run(DEFAULT_MODEL, yes, quiet))


def _check_battery(limit: int | None) -> None:
    if limit is None:
        return
    charge = battery.charge()
    if charge is not None and charge <= limit:
        raise ZImageError(
            f"stopped: the battery is at {charge}%, and --battery-limit is {limit}; charge it or lower the limit"
        )


def _check_combined(old: Origin, path: Path | None, base: dict) -> None:
    """Refuse --mask, --outpaint or --upscale for an old image that was made with another of them."""
    ways = {"mask_image": "--mask", "outpaint": "--outpaint", "upscale": "--upscale"}
    old_ways = [option for name, option in ways.items() if getattr(old.request, name) is not None]
    new_ways = [option for name, option in ways.items() if base.get(name) is not None and option not in old_ways]
    if old_ways and new_ways:
        raise RequestError(
            f"{path} was generated with {old_ways[0]}, which cannot be combined with {new_ways[0]}; start from the "
            f"finished image instead, with --image and a prompt"
        )


def _check_old(old: Origin, path: Path | None, digests: Mapping[str, str | None], prompts: list[dict]) -> None:
    """Require the files that an old image was generated from, unless each of the prompts has its own."""
    from .given import FILE_OPTIONS

    arrays = old.request.arrays
    for name, what in (("latents", "a latents file"), ("image", "an image"), ("mask_image", "a mask")):
        is_unnamed = name == "image" and old.request.strength is not None and old.request.upscale is None  # by mflux
        if (arrays[name] is None and not is_unnamed) or all(name in own for own in prompts):
            continue
        if digests[name] is None:
            raise RequestError(f"{path} was generated from {what}; pass that file with {FILE_OPTIONS[name]}")
        if arrays[name] not in (None, digests[name]):
            option = FILE_OPTIONS[name]
            warnings.warn(
                f"{option} is not the file that {path} was generated from; the result will differ", stacklevel=1
            )
