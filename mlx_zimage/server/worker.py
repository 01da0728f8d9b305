"""The worker: a child process that owns the models. If MLX ends it, the server keeps running and starts another.

The main thread opens models and generates, one job at a time: MLX's streams belong to the thread that created them. A
second thread reads the pipe, so that a job that cannot fit is refused, and a cancelled one stops, while another runs.

    python -m mlx_zimage.server.worker DESCRIPTOR
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Collection
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from ..detectors import is_downloaded, is_installed
from ..distributed import PATIENCE, Group
from ..errors import CheckpointError, DeviceError, GroupError, ModelNotFoundError, RequestError, ZImageError
from ..failures import explained
from ..generate import Finished, OpenModel, events, open_model
from ..images.codec import encode, enlarge
from ..images.masks import read_mask
from ..images.metadata import parameters
from ..images.preview import colours_of, sketch
from ..images.source import digest, read_image
from ..inputs import Inputs
from ..request import CONTROLS, LATENT_PIXELS, SIZE_MULTIPLE, GenerateRequest
from ..sampling import Step
from ..weights.manifest import sha256
from .loras import lora_files
from .messages import (
    Accepted,
    Cancel,
    Done,
    Failed,
    Image,
    Job,
    Loaded,
    Model,
    Note,
    Options,
    Preview,
    Progress,
    Ready,
    Started,
)

PAUSE = 0.2  # seconds for which a group without a job does nothing: waiting in MLX's ring keeps a core busy
SMALLEST = GenerateRequest("a", SIZE_MULTIPLE, SIZE_MULTIPLE, seed=0, steps=1)
PATH = re.compile(r"(?<![\w/.])~?(?:/[^\s/:'\"]+)*/([^\s/:'\"]+)")


class Served:
    """The models that are served, of which one at a time has weights and LoRAs in memory."""

    def __init__(self, options: Options):
        self.options = options
        self.group: Group | None = None
        self.attaching = Lock()  # LoRAs must not change while a plan is made
        self.models: dict[str, OpenModel] = {}
        self.loaded: str | None = None  # the model that may have weights in memory
        self.loras: dict[str, dict[Path, int]] = {}  # by model: those that are attached, and when their files changed

    def open_models(self) -> None:
        """Open the models, on every machine of a group."""
        self.group = Group.launched()
        if self.group is not None:
            self.group.check_same({"list of models": ", ".join(self.options.models)})
        for name, source in self.options.models.items():
            self.models[name] = open_model(source, memory=self.options.memory, group=self.group)
            self.models[name].pipeline.plan(SMALLEST)  # refuses a budget in which no image can be generated
            self.loras[name] = {}
        self.load_controlnet()
        if self.group is not None:
            nets = [model.pipeline.controlnet for model in self.models.values()]
            self.group.check_same({}, ControlNet=[net and net.fingerprint for net in nets])

    def load_controlnet(self) -> None:
        """Load the ControlNet into the models that it fits, of which there must be at least one; pocket has its own."""
        source, misfit = self.options.controlnet, None
        for name, model in self.models.items():
            try:
                if source is not None:
                    model.pipeline.load_controlnet(source, self.options.control_kind)
                elif self.options.models[name] == "pocket":
                    model.pipeline.load_controlnet("pocket")
            except CheckpointError as error:
                misfit = error
        if misfit and not any(model.pipeline.controlnet for model in self.models.values()):
            raise misfit

    def files_of(self, request: GenerateRequest) -> dict[Path, float]:
        """The files of a request's LoRAs, and their strengths."""
        uses = request.loras or ()
        files = lora_files(self.options.lora_dir) if uses else {}
        found: dict[Path, float] = {}
        for use in uses:
            file = files.get(use.name)
            if file is None:
                raise RequestError(f"the LoRA {use.name!r} is no longer in the server's folder")
            if file in found:
                raise RequestError(f"the request uses LoRA {use.name!r} twice; give its strength once")
            for other in found:
                if file.stat().st_size == other.stat().st_size and sha256(file) == sha256(other):
                    raise RequestError(f"the LoRAs {other.stem!r} and {use.name!r} are the same; use only one of them")
            if use.sha256 not in (None, use.sha256 and sha256(file)):
                raise RequestError(
                    f"the server's LoRA {use.name!r} does not have SHA-256 {use.sha256}; to use it anyway, leave "
                    f"out the SHA-256"
                )
            found[file] = use.strength
        return found

    def unload(self) -> None:
        """Free the memory of the loaded model's weights and LoRAs; it stays open, with its prompts' embeddings."""
        if self.loaded:
            with self.attaching:
                self.attach(self.loaded, ())
            self.models[self.loaded].pipeline.networks.release()
            mx.clear_cache()
            self.loaded = None

    def attach(self, name: str, files: Collection[Path]) -> None:
        """Load these LoRAs into a model, and unload all others."""
        pipeline, attached = self.models[name].pipeline, self.loras[name]
        changed = {file: file.stat().st_mtime_ns for file in files}
        for file in [file for file, then in attached.items() if changed.get(file) != then]:
            pipeline.unload_lora(file.stem)
            del attached[file]
        for file in changed.keys() - attached.keys():
            pipeline.load_lora(file, file.stem)
            attached[file] = changed[file]

    def without_paths(self, message: str) -> str:
        sources = [self.options.lora_dir, self.options.controlnet, *self.options.models.values()]
        for root in (Path(source) for source in sources if source):
            if root.is_absolute():
                message = message.replace(f"{root}{os.sep}", "").replace(str(root), root.name)
        return PATH.sub(r"\1", message)


class Worker(Served):
    """Runs jobs in order, in the thread that created it. In a group, it is rank 0 and instructs the others."""

    def __init__(self, connection: Connection, options: Options):
        super().__init__(options)
        self.connection = connection
        self.sending = Lock()
        self.changed = Condition()  # guards the next two
        self.waiting: dict[int, Job] = {}
        self.running: int | None = None
        self.colours: dict[str, np.ndarray] = {}  # by model, for previews

    def run(self) -> None:
        """Open the models, then run jobs until the server closes the pipe."""
        try:
            with explained():
                self.open_models()
        except ZImageError as error:  # the server's own user reads it
            self.send(Failed(None, type(error).__name__, str(error)))
            return
        self.send(Ready(tuple(described(name, model) for name, model in self.models.items())))
        Thread(target=self.listen, daemon=True).start()
        try:
            with explained():
                while True:
                    self.run_next()
        except GroupError as error:
            self.send(Failed(None, type(error).__name__, str(error)))
            sys.exit(1)

    def run_next(self) -> None:
        """Wait for a job and run it, or unload the model if none comes within idle_s seconds."""
        idle_s = self.options.idle_s if self.loaded else None
        end = None if idle_s is None else time.monotonic() + idle_s
        while True:
            left = None if end is None else max(end - time.monotonic(), 0)
            with self.changed:
                waits = left if self.group is None else PAUSE if left is None else min(PAUSE, left)
                found = self.changed.wait_for(lambda: self.waiting, waits)
                job = self.waiting.pop(next(iter(self.waiting))) if found else None
                self.running = job.id if job else None
            if job is not None or left == 0 or self.group is None:
                break
            self.instruct(do="pause")
        if job is None:
            self.unload()
            return
        try:
            self.generate(job)
        finally:
            self.running = None

    def instruct(self, **what: Any) -> None:
        """Have the other machines of a group do something: see `Follower`."""
        if self.group is not None:
            self.group.send({"instruction": np.array(json.dumps(what))})

    def send(self, message: object) -> None:
        with self.sending:
            self.connection.send(message)

    # ---- the thread that reads the pipe

    def listen(self) -> None:
        try:
            while True:
                message = self.connection.recv()
                if isinstance(message, Cancel):
                    with self.changed:
                        self.waiting.pop(message.id, None)
                        if self.running == message.id:
                            self.running = None  # which the other thread sees before its next step
                else:
                    self.check(message)
        except (EOFError, OSError):
            os._exit(0)  # the server is gone; a step in progress cannot be interrupted

    def check(self, job: Job) -> None:
        """Queue a job if it is valid and fits in memory, with its LoRAs: those that are attached are another job's."""
        pipeline = self.models[job.model].pipeline
        try:
            fields, inputs = read(job)
            extras = pipeline.lora_extras(self.files_of(GenerateRequest(**fields, seed=job.seeds[-1])))
            with self.attaching:
                request = pipeline.complete(GenerateRequest(**{**fields, "loras": ()}, seed=job.seeds[-1]), inputs)
                check_downloaded(request)
                pipeline.plan(request, inputs, extras)
                steps = pipeline.count_steps(request)
            prompts = [request.prompt, request.negative_prompt][: 1 + request.guided]
            tokens = sum(len(pipeline.tokenize(text, request.max_sequence_length)) for text in prompts)
        except Exception as error:
            self.send(self.failure(job.id, error))
            return
        largest = request.refinement or request
        width, height, _ = largest.extent
        images = len(job.seeds)
        self.send(Accepted(job.id, width, height, request.extent[2], tokens, images * steps * width * height))
        with self.changed:
            self.waiting[job.id] = job
            self.changed.notify()

    def failure(self, id: int, error: Exception) -> Failed:
        """What the client may know about an error: no path of this machine, and nothing about a bug but its kind."""
        if not isinstance(error, ZImageError):
            traceback.print_exception(error)
            return Failed(id, "Exception", f"a bug in mlx-zimage ({type(error).__name__}); the server's log has more")
        return Failed(id, type(error).__name__, self.without_paths(str(error)))

    # ---- the thread that generates

    def generate(self, job: Job) -> None:
        self.send(Started(job.id))
        try:
            with explained():
                complete = self.images(job)
        except Exception as error:
            self.send(self.failure(job.id, error))
            if isinstance(error, GroupError):
                raise
            if isinstance(error, DeviceError):
                sys.exit(1)  # after some failures the GPU accepts no more work from a process
        else:
            self.send(Done(job.id, cancelled=not complete))

    def images(self, job: Job) -> bool:
        """Generate a job's images; False if it was cancelled."""
        model = self.ready(job.model)
        fields, inputs = read(job)
        with self.attaching:
            self.attach(job.model, self.files_of(GenerateRequest(**fields, seed=job.seeds[0])))
        if self.group is not None:
            request = model.pipeline.complete(GenerateRequest(**fields, seed=job.seeds[0]), inputs)
            self.instruct(do="prepare", model=job.model, request=request.to_dict())
            for rank, problem in enumerate(self.group.exchange("")):
                if problem:
                    raise RequestError(f"machine {rank} of the group cannot generate this: {problem}")
        before = 0
        for index, seed in enumerate(job.seeds):
            request = model.pipeline.complete(GenerateRequest(**fields, seed=seed), inputs)
            steps = model.pipeline.count_steps(request)
            shown = preview_steps(steps, job.previews)
            colours = self.colours_of(job.model) if shown else None
            with closing(events(model, request, inputs)) as running:
                for event in running:
                    if self.running != job.id:
                        return False
                    if isinstance(event, Step):
                        self.send(Progress(job.id, before + event.index + 1, steps * len(job.seeds)))
                        if colours is not None and event.index in shown:
                            content = preview(event, colours, job)
                            self.send(Preview(job.id, index, shown.index(event.index), content))
                    elif isinstance(event, Finished):
                        self.send(finished(job, index, event))
            before += steps
        return True

    def ready(self, name: str) -> OpenModel:
        """A model, after unloading the one that was used before: each may take the whole budget."""
        if self.loaded != name:
            self.unload()
            self.loaded = name
            self.send(Loaded(name))
        return self.models[name]

    def unload(self) -> None:
        if self.loaded:
            super().unload()
            self.instruct(do="unload")
            self.send(Loaded(None))

    def colours_of(self, name: str) -> np.ndarray:
        if name not in self.colours:
            self.colours[name] = colours_of(self.models[name].pipeline.encode_image)
        return self.colours[name]


class Follower(Served):
    """Rank 1, 2, ... of a group: prepares for the worker's jobs and shares them, until the group ends."""

    def run(self) -> None:
        """GroupError if the group loses a machine, as when the server ends."""
        with explained():
            self.open_models()
            assert self.group is not None
            while given := self.receive(self.group):
                if "instruction" not in given:
                    assert self.loaded
                    self.models[self.loaded].pipeline.follow_one(given)
                    continue
                what = json.loads(str(given["instruction"]))
                do = what.pop("do")
                if do == "pause":
                    time.sleep(PAUSE)
                elif do == "unload":
                    self.unload()
                else:
                    self.group.exchange(self.prepare(**what))

    def receive(self, group: Group) -> dict[str, np.ndarray]:
        with group.computing(PATIENCE):  # the worker says something at least every PAUSE
            return group.receive()

    def prepare(self, model: str, request: dict[str, Any]) -> str:
        """Load a job's model and LoRAs. Returns why the job cannot run on this machine, or an empty string."""
        try:
            wanted = GenerateRequest.from_dict(request)
            if self.loaded != model:
                self.unload()
                self.loaded = model
            check_downloaded(wanted)
            self.attach(model, self.files_of(wanted))
            self.models[model].pipeline.plan(wanted)
        except Exception as error:
            if not isinstance(error, ZImageError):
                traceback.print_exception(error)
            return self.without_paths(str(error)) or type(error).__name__
        return ""


def described(name: str, model: OpenModel) -> Model:
    variant, net = model.pipeline.variant, model.pipeline.controlnet
    own = variant.steps, model.pipeline.sample_size, variant.takes_guidance, variant.guidance_scale
    if net is None:
        return Model(name, variant.name, *own, model.fingerprint)
    steps = (not variant.takes_guidance and net.steps) or variant.steps
    kinds = tuple(filter(is_installed, CONTROLS))
    return Model(name, variant.name, *own, model.fingerprint, net.name, steps, net.scale, kinds)


def check_downloaded(request: GenerateRequest) -> None:
    """Refuse control images whose networks are not downloaded yet: no client may make others wait for a download."""
    for kind in (use.prepare for use in request.controls):
        if not is_downloaded(kind):
            raise ModelNotFoundError(
                f"the server has not downloaded what it needs to make control images of kind {kind}; run `mlx-zimage "
                f"generate PROMPT --control {kind}:FILE` there once"
            )


def read(job: Job) -> tuple[dict[str, Any], Inputs]:
    """All fields of a job's request except its seed, and its images."""
    mask: Pillow.Image | None = None
    if job.mask is not None:
        mask = read_mask(job.mask, transparent=job.marks == "transparent")
        mask = ImageOps.invert(mask) if job.marks == "black" else mask
    fields, shown = {"loras": (), **job.fields}, []
    try:
        shown = [None if content is None else read_image(content) for content in job.controls]
    except RequestError as error:
        raise RequestError(f"control: {error}") from error
    if shown:
        uses = zip(fields["controls"], shown, strict=True)
        fields["controls"] = [use if image is None else {**use, "image": digest(image)} for use, image in uses]
    return fields, Inputs(image=job.image, mask_image=mask, control_images=[image for image in shown if image])


def preview_steps(steps: int, previews: int) -> list[int]:
    """The steps, counted from 0, after which a preview is shown: spread evenly, the last one excluded."""
    return sorted({(i + 1) * steps // (previews + 1) - 1 for i in range(previews)} - {-1, steps - 1})


def preview(step: Step, colours: np.ndarray, job: Job) -> bytes:
    return encode(enlarge(sketch(step.clean, colours), LATENT_PIXELS), job.ending, quality=job.quality)


def finished(job: Job, index: int, image: Finished) -> Image:
    content = encode(image.pixels, job.ending, image.origin if job.metadata else None, job.quality)
    return Image(job.id, index, content, json.loads(image.origin.to_json()), parameters(image.origin))


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach the whole group; the server ends this process
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    try:
        worker = Worker(connection, connection.recv())
        warnings.showwarning = lambda message, *rest: worker.send(Note(worker.without_paths(str(message))))
        worker.run()
    except (EOFError, BrokenPipeError):
        pass  # the server is gone


if __name__ == "__main__":
    main(int(sys.argv[1]))
