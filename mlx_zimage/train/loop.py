"""A run of training: from a folder of images to a LoRA, step by step.

    for event in train(pipe, examples, settings, Path("lora.safetensors")):
        ...

`train` yields events as things happen: Planned, Phases while images and captions are encoded, Measured before the first
step, a Stepped after each step, a Written when a LoRA is written, and a Previewed for each preview. Whoever holds the
loop owns progress and logs, and leaving it stops the run; the same call resumes from the last state that was saved, and
ends with the same file (on a GPU, within its rounding). On several machines, all make the same call: see `machines`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np
from filelock import FileLock, Timeout

from .. import atomic
from ..distributed import Group
from ..errors import LockedError, ModelNotFoundError, NumericsError, OutputError, RequestError
from ..machine import default_dtype
from ..memory import Plan
from ..models.transformer import TransformerConfig
from ..networks import Networks, Phase
from ..pipeline import ZImagePipeline
from ..request import TOKENS, check_prompt
from ..sizes import size
from ..version import __version__
from ..weights.checkpoint import fingerprint
from ..weights.hub import name_of
from ..weights.lora import Lora, find_lora, read_lora
from ..weights.store import checksum
from .dataset import TRIGGER, Example, order_of
from .encoded import Encoded, latent_shape
from .factors import Factors, arrays_of, new_factors
from .gradients import Gradients, Sample
from .machines import Machines
from .memory import plan_training, resolution_within
from .objective import default_objective, draw
from .optimizer import AdamW, clipped, sum_of, warmed_up
from .output import FREE, check_name, is_ours, read_state, stored, write_factors, write_state, writing
from .previews import Previewed, Previews
from .settings import RESOLUTION, SAVE_EVERY, Settings, check_count

START_AGAIN = "start again with a lower rate or alpha, or in float32, and with another output"
ENCODED = "encoded"  # in a run's folder
HELD = 3 * 4  # bytes per trained value between steps: the factors and two moments, in float32


@dataclass(frozen=True)
class Planned:
    """What a run trains on: images of at most resolution x resolution pixels, within a memory plan. The whole run needs
    `room` bytes."""

    resolution: int
    plan: Plan
    room: int


@dataclass(frozen=True)
class Measured:
    """The number of steps ahead, and the seconds that each takes on average, estimated from one or two images."""

    steps: int
    step_s: float


@dataclass(frozen=True)
class Stepped:
    """A finished step, counted from 1: the mean of its losses, the gradient's norm before clipping, and its rate."""

    step: int
    loss: float
    norm: float
    rate: float
    elapsed_s: float


@dataclass(frozen=True)
class Written:
    """The LoRA as it is after a step, written to a file."""

    step: int
    path: Path


def folder_of(output: Path) -> Path:
    """The folder of the run that writes output: what it resumes from, what was encoded, and its log."""
    return output.with_name(f"{output.stem}-training")


def state_of(output: Path) -> Path:
    """The file that the run which writes output resumes from."""
    return folder_of(output) / "state.safetensors"


def open_to_train(model: str, dtype: str | None = None, memory: str | int | None = None) -> ZImagePipeline:
    """A pipeline that trains in dtype: by default the machine's, but bfloat16 in place of float16."""
    name = dtype or default_dtype()
    return ZImagePipeline.from_pretrained(model, "bfloat16" if not dtype and name == "float16" else name, memory, False)


@dataclass(frozen=True)
class Run:
    """The inputs and output of a run."""

    pipe: ZImagePipeline
    examples: Sequence[Example]
    settings: Settings
    output: Path
    adapter: Lora | None = None

    @property
    def folder(self) -> Path:
        return folder_of(self.output)

    @property
    def state(self) -> Path:
        return state_of(self.output)

    def lora(self, step: int) -> Path:
        """The LoRA as it is after a step."""
        return self.folder / f"{self.output.stem}-{step:06}.safetensors"

    @cached_property
    def order(self) -> list[int]:
        """The index of each example, as many times as it is repeated in one pass."""
        return order_of(self.examples)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each example's latents."""
        return [latent_shape(self.pipe.checkpoint.vae.config, example) for example in self.examples]

    @cached_property
    def checksum(self) -> str:
        """The SHA-256 of the transformer's weights."""
        return checksum(self.pipe.checkpoint.transformer, self.folder)

    @cached_property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to be resumed."""
        dataset = [[e.digest, e.width, e.height, e.caption, e.repeats] for e in self.examples]
        own = {name: value for name, value in self.settings.to_dict().items() if name not in FREE}
        return {
            **own,
            "base_sha256": self.checksum,
            "adapter": None if self.adapter is None else self.adapter.sha256,
            "dtype": str(self.pipe.dtype),
            "dataset": hashlib.sha256(json.dumps(dataset).encode()).hexdigest(),
        }

    def write(self, path: Path, factors: Factors) -> None:
        """Write a LoRA."""
        checkpoint = self.pipe.checkpoint
        model = name_of(checkpoint.folder)
        with self.pipe.networks.guarded():
            write_factors(path, factors, self.settings, checkpoint.transformer.config, model, self.identity)


def train(
    pipe: ZImagePipeline,
    examples: Sequence[Example],
    settings: Settings,
    output: Path,
    save_every: int = SAVE_EVERY,
    previews: Sequence[str] = (),
    adapter: str | Path | None = None,
    group: Group | None = None,
) -> Iterator[Planned | Phase | Measured | Stepped | Written | Previewed]:
    """Train a LoRA on examples, and write it to output; resumes the run if there is one. See the module.

    Every save_every steps the LoRA is written to the run's folder as well, and an image is generated with it from each
    prompt in previews, with seed i for prompt i. A run that is stopped loses the steps since the last of these; when it
    is resumed, previews of that step that are not in the run's folder are generated again. adapter is a LoRA, as
    `load_lora` takes it, that is applied in training only: for Turbo, one that undoes its distillation, so that
    training does not.

    The machines of a group divide the images of each step among themselves, at least one per machine. pipe must have
    been opened without a group. Rank 0 writes the LoRA and generates the previews; every machine keeps what is encoded
    in a folder next to output.
    """
    output = Path(output)
    check_name(output)
    check_count("save_every", save_every)
    if not examples:
        raise RequestError("there are no examples; train on those that read_dataset returns")
    if pipe.group is not None:
        raise RequestError("each machine trains with a pipeline of its own: open it without a group")
    machines = Machines(group)
    machines.check_accumulate(settings.accumulate)
    with machines.joined():
        yield from _train(pipe, examples, settings, output, save_every, previews, adapter, machines)


def _train(
    pipe: ZImagePipeline,
    examples: Sequence[Example],
    settings: Settings,
    output: Path,
    save_every: int,
    previews: Sequence[str],
    adapter: str | Path | None,
    machines: Machines,
) -> Iterator[Planned | Phase | Measured | Stepped | Written | Previewed]:
    if pipe.dtype == mx.float16:
        raise RequestError("gradients exceed float16's range; train in bfloat16 or float32")
    settings = replace(settings, objective=settings.objective or default_objective(pipe.variant))
    networks = pipe.networks
    config = networks.transformer.config
    new = new_factors(config, settings.rank, settings.extras, settings.seed)
    tokens = max(_tokens(networks, example) for example in examples)
    count = sum(array.size for array in arrays_of(new))
    over = None if adapter is None else _read_adapter(adapter, config)
    with writing(output):
        _check_output(output, examples, machines.leads)
    loras = {} if over is None else {over.sha256: over}
    held = networks.extras_of(loras, dict.fromkeys(loras, 1.0))["transformer"].held
    budget, resolution = pipe.budget - held, settings.resolution
    if resolution is None:
        resolution = resolution_within(pipe.planner, RESOLUTION, tokens, count, budget)
    resolution = machines.agreed(min, resolution)
    examples = [example.within(resolution) for example in examples]
    plan = plan_training(pipe.planner, examples, tokens, count, budget)
    planned = Planned(resolution, plan, plan.room + held)
    run = Run(pipe, examples, replace(settings, resolution=resolution), output, over)
    for prompt in previews:
        check_prompt(prompt, "prompt of a preview")
    prompts = [prompt.replace(TRIGGER, settings.trigger or TRIGGER) for prompt in previews]
    shown = Previews(pipe, prompts if machines.leads else (), resolution, HELD * count)
    shown.check({"": Lora(output, "", {"transformer": stored(new, settings.scale, config)})} | loras, {"": 1.0})
    del new  # it would stay in memory during all steps; `_steps` makes the same again
    with writing(output):
        _check_space(run, count, tokens, save_every, machines.leads)
    _check_writable(run)
    encoded = Encoded(networks, run.folder / ENCODED, budget - shown.held)
    with _locked(run) if machines.leads else nullcontext(), _attached(networks, over):
        yield from _steps(run, planned, shown, encoded, save_every, machines)


def _steps(
    run: Run, planned: Planned, shown: Previews, encoded: Encoded, save_every: int, machines: Machines
) -> Iterator[Planned | Phase | Measured | Stepped | Written | Previewed]:
    """Resume a checked run, or start it, and finish it."""
    settings, networks, plan = run.settings, run.pipe.networks, planned.plan
    config = networks.transformer.config
    new = new_factors(config, settings.rank, settings.extras, settings.seed)
    state = read_state(run.state, new, run.identity) if machines.leads else None
    factors, optimizer = state or (new, AdamW.new(new))
    if optimizer.step > settings.steps:
        raise RequestError(
            f"steps is {settings.steps}, but the run in {run.folder} has already finished {optimizer.step}; give at "
            f"least as many, or another output to start a new run"
        )
    machines.check_same(
        {"version of mlx-zimage": __version__},
        model=(run.checksum, fingerprint(run.pipe.checkpoint)),
        dataset=run.identity["dataset"],
        adapter=run.identity["adapter"],
        configuration=(run.identity, settings.steps, save_every),
    )
    factors, optimizer = machines.from_first(factors, optimizer)
    del new, state
    yield planned
    yield from machines.each(run.pipe.turns.take(encoded.encode(run.examples)))
    if optimizer.step:
        yield from machines.each(_missed(run, shown, optimizer.step, factors) if machines.leads else ())
    transformer = networks.transformer
    gradients = Gradients(
        config, networks.overlays["transformer"], settings.scale, transformer.product, transformer.most, plan.lean
    )
    step_s, patient = 0.0, False
    if optimizer.step < settings.steps:
        with _computing(run, plan):
            measured = _measured(run, encoded, gradients, factors)
        step_s, longest_s = (
            machines.agreed(max, image_s * len(machines.own(settings.accumulate))) for image_s in measured
        )
        machines.expect(longest_s)
    yield Measured(settings.steps - optimizer.step, step_s)
    for step in range(optimizer.step, settings.steps):
        begin, rate = time.perf_counter(), warmed_up(settings.rate, step, settings.warm_up)
        with _computing(run, plan):
            factors, loss, norm = one_step(run, encoded, gradients, factors, optimizer, rate, machines, patient)
        patient = False
        done = step + 1
        yield Stepped(done, loss, norm, rate, time.perf_counter() - begin)
        if done % save_every == 0 or done == settings.steps:
            path = run.lora(done)
            if not all(mx.isfinite(array).all() for array in arrays_of(factors)):
                raise NumericsError(f"the LoRA is not finite after step {done}; {START_AGAIN}")
            if machines.leads:
                write_state(run.state, factors, optimizer, run.identity)
                run.write(path, factors)
                yield Written(done, path)
            yield from machines.each(shown.generate(path, done))
            patient = True  # with rank 0, which reads the weights again after previews
    if machines.leads:
        run.write(run.output, factors)
        yield Written(optimizer.step, run.output)


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Within the block, other processes are refused the same run.

    This process is not: after a run was left, a notebook may still hold it while the next call resumes it.
    """
    # whoever requests the next event may close it
    lock = FileLock(run.folder / ".lock", timeout=0, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(
            f"{run.output} is being trained already; wait for that run, stop it, or choose another output"
        ) from None
    except OSError:  # network disks may have no locks
        pass
    try:
        for left in run.folder.rglob(f"{atomic.ASIDE}*"):  # by a run that was killed
            with suppress(OSError):
                left.unlink()
        yield
    finally:
        lock.release()


@contextmanager
def _attached(networks: Networks, lora: Lora | None) -> Iterator[None]:
    """Within the block, a LoRA is attached, if there is one; it stays so if it was before."""
    if lora is None or all(networks.overlays[name].has(lora.sha256) for name in lora.deltas):
        yield
        return
    networks.attach(lora)
    try:
        yield
    finally:
        networks.detach(lora)


@contextmanager
def _computing(run: Run, plan: Plan) -> Iterator[None]:
    """Within the block, only the transformer is in memory, and has the adapter."""
    networks = run.pipe.networks
    with run.pipe.turns.computing(), networks.guarded(), networks.running(plan):
        networks.release("text_encoder", "vae")  # which previews may have left there
        networks.set_loras({} if run.adapter is None else {run.adapter.sha256: 1.0})
        yield


def _tokens(networks: Networks, example: Example) -> int:
    """The number of tokens of a caption; RequestError if the model cannot read it, or not all of it."""
    check_prompt(example.caption, f"caption of {example.file}")
    count = len(networks.tokenizer.encode(example.caption))
    if count > TOKENS:
        raise RequestError(
            f"the caption of {example.file} has {count} tokens, but the model reads only {TOKENS}; shorten it"
        )
    return count


def _read_adapter(source: str | Path, config: TransformerConfig) -> Lora:
    try:
        return read_lora(find_lora(source), {"transformer": config})
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{error}; to train without an adapter, leave it out") from error


def _check_output(output: Path, examples: Sequence[Example], leads: bool) -> None:
    """Refuse an output whose files belong to something else, as far as this machine writes them."""
    if leads and output.exists():
        if not state_of(output).exists():
            raise RequestError(f"{output} already exists, and has no training run to resume; choose another output")
        if not is_ours(output):
            raise RequestError(
                f"{output} was not written by training; move it elsewhere to resume the run, or choose another output"
            )
    if any(example.file.parent.resolve().is_relative_to(folder_of(output).resolve()) for example in examples):
        raise RequestError(
            f"the images are in {folder_of(output)}, the folder for this run's own files; choose another output"
        )


def _check_space(run: Run, count: int, tokens: int, save_every: int, leads: bool) -> None:
    """Refuse a run whose files might not fit on the disk; count is the number of trained values.

    Only the machine that leads writes states and LoRAs.
    """
    existing = run.output.absolute()
    while not existing.exists():
        existing = existing.parent
    images = sum(4 * math.prod(shape) for shape in run.shapes)
    captions = (1 + len(run.examples)) * tokens * run.pipe.transformer.config.cap_feat_dim * 4
    states = 2 * HELD * count  # the old one and the new
    loras = (run.settings.steps // save_every + 2) * 2 * count
    needed, free = images + captions + (states + loras) * leads, shutil.disk_usage(existing).free
    if needed > free and not run.state.exists():
        raise OutputError(
            f"training writes up to {size(needed)} next to {run.output}, but only {size(free)} is free there; free "
            f"some space, or raise --save-every"
        )


def _check_writable(run: Run) -> None:
    """Refuse an output that cannot be written, before anything is computed."""
    own = run.folder, run.folder / ENCODED
    for folder in own:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    for folder in (*own, run.output.parent):
        with writing(folder), tempfile.TemporaryFile(dir=folder):
            pass


def _missed(run: Run, shown: Previews, step: int, factors: Factors) -> Iterator[Written | Phase | Previewed]:
    """What a run that was stopped may lack for a step whose state was saved: the LoRA, and previews."""
    run.write(run.lora(step), factors)
    yield Written(step, run.lora(step))
    if not shown.are_in(run.folder, step):
        yield from shown.generate(run.lora(step), step)


def _measured(run: Run, encoded: Encoded, gradients: Gradients, factors: Factors) -> tuple[float, float]:
    """Seconds that the gradients of an image take, on average and at most: of all sizes, two are measured."""
    sizes = [math.prod(run.shapes[i]) for i in run.order]
    seconds = {}
    for values in sorted({min(sizes), max(sizes)}):
        example = run.examples[run.order[sizes.index(values)]]
        latents, begin = encoded.latents(example), 0.0
        one = Sample(latents, encoded.caption(example.caption), mx.zeros_like(latents), sigma=0.5)
        for _ in range(2):  # the first time, weights are read and functions compiled
            begin = time.perf_counter()
            gradients(factors, one)  # discarded
        seconds[values] = time.perf_counter() - begin
    return float(np.interp(np.mean(sizes), list(seconds), list(seconds.values()))), seconds[max(sizes)]


def one_step(
    run: Run,
    encoded: Encoded,
    gradients: Gradients,
    factors: Factors,
    optimizer: AdamW,
    rate: float,
    machines: Machines,
    patient: bool,
) -> tuple[Factors, float, float]:
    """The factors after one more step at this rate, its mean loss, and its gradient's norm.

    patient is how machines wait for another's gradients; see `Group.exchange`.
    """
    machines.between()
    settings, total, loss = run.settings, Factors(), 0.0
    first = optimizer.step * settings.accumulate
    samples = (sample(run, encoded, first + i) for i in machines.own(settings.accumulate))
    for value, found in machines.each((gradients(factors, one) for one in samples), patient):
        loss += float(value)
        total = sum_of(total, found)
        del found  # not kept in memory while the next one is computed
    total, loss = machines.summed(total, loss)
    total, norm = clipped(total, settings.clip, 1 / settings.accumulate)
    if not math.isfinite(norm):
        raise NumericsError(f"the gradient of step {optimizer.step + 1} is not finite; {START_AGAIN}")
    return optimizer.apply(factors, total, rate, settings.decay), loss / settings.accumulate, norm


def sample(run: Run, encoded: Encoded, index: int) -> Sample:
    """What gradient `index` of a run, counted from 0, is computed from."""
    settings = run.settings
    assert settings.objective is not None
    drawn = draw(settings.seed, index, run.order, run.shapes, settings.objective, settings.dropout)
    example = run.examples[drawn.example]
    caption = encoded.caption("" if drawn.drops_caption else example.caption)
    return Sample(encoded.latents(example), caption, mx.array(drawn.noise), drawn.sigma, drawn.weight)
