from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..launched import launched_rank
from ..sizes import counted, rounded_up
from ..train.settings import EXTRAS, OBJECTIVES, RESOLUTION, SAVE_EVERY, Settings
from ..variants import TURBO
from .elsewhere import Command
from .models import DEFAULT_MODEL, first_run
from .notes import is_pocket
from .output import print_path, progress_bar, say
from .values import FilePath, LoraName, ModelName, yes_option

if TYPE_CHECKING:
    from ..train.loop import Planned

ADAPTER = "ostris/zimage_turbo_training_adapter:zimage_turbo_training_adapter_v2.safetensors"

# The id is longer than the column of the options: there it would be broken in two, and could not be copied.
EXAMPLES = f"""\b
Example: mlx-zimage train photos -o dog.safetensors --trigger sks --preview 'a sks dog'
Adapter for Turbo:
    {ADAPTER}
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("dataset", type=FilePath())
@click.option("-o", "--output", required=True, type=FilePath(dir_okay=False), help="LoRA file to write (.safetensors).")
@click.option(
    "-m",
    "--model",
    type=ModelName(converted=True),
    help=f"Model folder, Hugging Face id, or 'pocket'.  [default: {DEFAULT_MODEL}, converted]",
)
@click.option("--steps", type=int, help=f"Number of training steps.  [default: {Settings.steps:g}]")
@click.option(
    "--resolution",
    metavar="N",
    type=int,
    help=f"Scale images down to at most N x N pixels.  [default: {RESOLUTION}, or less if that does not fit in memory]",
)
@click.option("--trigger", metavar="WORD", help="Word that replaces [trigger] in captions.")
@click.option("--rank", type=int, help=f"Rank of the LoRA.  [default: {Settings.rank:g}]")
@click.option("--alpha", type=float, help="The LoRA is multiplied by alpha / rank.  [default: the rank]")
@click.option("--rate", type=float, help=f"Learning rate of AdamW.  [default: {Settings.rate:g}]")
@click.option("--decay", type=float, help=f"Weight decay of AdamW.  [default: {Settings.decay:g}]")
@click.option(
    "--clip",
    type=float,
    help=f"Maximum norm of a step's gradient; a larger one is scaled down.  [default: {Settings.clip:g}]",
)
@click.option(
    "--warm-up", type=int, help=f"Number of steps over which the rate rises to --rate.  [default: {Settings.warm_up:g}]"
)
@click.option(
    "--accumulate",
    type=int,
    help=f"Number of images per step.  [default: {Settings.accumulate:g}; with mlx.launch, one for each machine]",
)
@click.option(
    "--dropout",
    type=float,
    help=f"Fraction of images trained with an empty caption.  [default: {Settings.dropout:g}]",
)
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    help="How noise levels are chosen and weighted.  [default: weighted for Turbo, otherwise logit-normal]",
)
@click.option(
    "--also",
    "extras",
    multiple=True,
    type=click.Choice(EXTRAS),
    help="Train these too, besides the attention and feed-forward weights of the main layers.  [repeatable]",
)
@click.option(
    "--adapter",
    metavar="LORA",
    type=LoraName(),
    help="Apply this LoRA too, but only during training; one for Turbo is named below.",
)
@click.option(
    "--seed",
    type=int,
    help=f"Seed of the LoRA's initial weights, the order of images, and the noise.  [default: {Settings.seed}]",
)
@click.option(
    "--preview",
    "previews",
    multiple=True,
    metavar="PROMPT",
    help="Generate an image from PROMPT each time the LoRA is saved, to show its progress.  [repeatable]",
)
@click.option(
    "--save-every",
    metavar="N",
    type=click.IntRange(1),
    default=SAVE_EVERY,
    show_default=True,
    help="Save the LoRA, and generate the previews, every N steps.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    help="Compute dtype.  [default: bfloat16 on a GPU, float32 on a CPU]",
)
@click.option("--memory", metavar="SIZE", help="Memory budget, such as 12GB.  [default: based on this machine]")
@yes_option
@click.option("-q", "--quiet", is_flag=True, help="Do not show progress.")
def train(
    dataset: Path, output: Path, model: str | None, adapter: str | None, previews: tuple[str, ...], save_every: int,
    dtype: str | None, memory: str | None, yes: bool, quiet: bool, **given,
) -> None:  # fmt: skip
    """Train a LoRA on the images in the folder DATASET, and print its path.

    Each image has its caption in a .txt file of the same name, or in metadata.jsonl as {"file_name": ..., "text":
    ...}. Everything but the LoRA itself is written to a folder next to it, NAME-training: encoded images, a log
    (log.jsonl) and a plot of the loss (loss.svg), previews, and the state from which the same command resumes a stopped
    run.
    """
    from ..distributed import Group, preparing
    from ..networks import Phase
    from ..train.dataset import read_dataset
    from ..train.loop import Measured, Planned, Previewed, Stepped, Written, open_to_train
    from ..train.loop import train as run
    from ..train.output import check_name
    from ..train.record import Record

    check_name(output)
    values = {name: value for name, value in given.items() if value is not None}
    settings = Settings(**{**values, "extras": tuple(sorted(set(given["extras"])))})
    quiet, group = quiet or launched_rank() > 0, Group.launched()
    with preparing(group):
        examples = read_dataset(dataset, settings.resolution or RESOLUTION, settings.trigger)
        pipe = open_to_train(model or str(first_run(DEFAULT_MODEL, yes, quiet, memory)), dtype, memory)
    if adapter is None and pipe.variant == TURBO and not is_pocket(pipe.checkpoint):
        say(f"Training undoes Turbo's distillation; if images get soft, use --adapter {ADAPTER}", quiet)
    if group is not None and "accumulate" not in values:
        settings = replace(settings, accumulate=group.size)
    if group is not None and not group.leads:
        for _ in run(pipe, examples, settings, output, save_every, previews, adapter, group):
            pass
        return
    with closing(Record(output)) as record, progress_bar(quiet, total=settings.steps, unit="step") as bar:
        for event in run(pipe, examples, settings, output, save_every, previews, adapter, group):
            if isinstance(event, Planned):
                say(f"Training on {len(examples)} images, {_described(event)}.", quiet)
            elif isinstance(event, Measured):
                bar.initial = bar.n = settings.steps - event.steps
                if event.steps:
                    time = _rough(event.steps * event.step_s)
                    say(f"{counted(event.steps, 'step')} will take about {time}.", quiet)
            elif isinstance(event, Stepped):
                record.step(event)
                bar.set_description("training", refresh=False)
                bar.set_postfix_str(f"loss {event.loss:.4f}, rate {event.rate:.1e}", refresh=False)
                bar.update()
            elif isinstance(event, Phase):
                bar.set_description(f"{event.name} {event.done + 1}/{event.total}")
            elif isinstance(event, Previewed):
                say(f"Preview: {record.preview(event)}", quiet)
            elif isinstance(event, Written):
                record.plot()
    print_path(output)


def _rough(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"


def _described(planned: Planned) -> str:
    side, plan = planned.resolution, planned.plan
    blocks = counted(len(plan.streamed), "block")
    streamed = (
        f", {blocks} streamed from disk in each step (fewer with a model converted to fewer bits)"
        if plan.streamed
        else ""
    )
    return f"scaled down to at most {side}x{side}, within {rounded_up(planned.room)}{streamed}"
