"""What the user sees while an image is generated: a progress bar per phase, and previews."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..generate import Finished
from ..images.preview import FileView, FolderView, TerminalView, View, sketch
from ..pipeline import Phase
from ..sampling import Step
from .output import progress_bar, say

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
PHASES = {
    "scale": ("Calibrating float16", "network"),
    "encode": ("Encoding", "layer"),
    "image": ("Encoding image", "block"),
    "decode": ("Decoding", "block"),
}


class Watch:
    """Shows a request's events as they arrive: `with Watch(...) as watch: watch(event)`.

    `views`, to which the caller may add, receive a preview of each step, made with `colours` (see preview.colours_of),
    and the finished images. The bars replace each other on one line: finding float16's scale if it is not cached,
    encoding the prompt, denoising, decoding. The denoising bar stays on screen if `leave` is set. Elapsed times keep
    ticking between events, which may be a minute apart.
    """

    def __init__(self, steps: int, quiet: bool, leave: bool, colours: np.ndarray | None = None):
        self.steps, self.quiet, self.leave, self.colours = steps, quiet, leave, colours
        self.views: list[View] = []
        self.over = threading.Event()

    def __enter__(self) -> Watch:
        self._open("Denoising", self.steps, "step")
        if not self.bar.disable:
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __call__(self, event: Phase | Step | Finished) -> None:
        if isinstance(event, Phase):
            self._phase(event)
        elif isinstance(event, Step):
            if self.name != "Denoising" or event.index < self.bar.n:  # restarted in another dtype
                self._next("Denoising", self.steps, "step")
            self.bar.update()
            if self.colours is not None:
                preview = sketch(event.clean, self.colours)
                self._show(lambda view: view(preview))
        else:
            self._close()
            self._show(lambda view: view.finish(event.pixels))

    def say(self, message: str) -> None:
        """Print a message on its own line, above the bar."""
        with tqdm.external_write_mode(file=sys.stderr):
            say(message, self.quiet)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for view in self.views:
            view.close()
        with suppress(OSError):  # the terminal may be gone, and that is what ended the work
            self._close()

    def _show(self, show: Callable[[View], None]) -> None:
        for view in self.views:
            with tqdm.external_write_mode(file=sys.stderr):
                show(view)

    def _phase(self, phase: Phase) -> None:
        if phase.done:
            self.bar.update()
        else:
            name, unit = PHASES[phase.name]
            self._next(name, phase.total, unit)
        if phase.done == phase.total and phase.name != "decode":
            self._next("Denoising", self.steps, "step")

    def _next(self, name: str, total: int, unit: str) -> None:
        self._close()
        self._open(name, total, unit)

    def _open(self, name: str, total: int, unit: str) -> None:
        self.name, leave = name, self.leave and name == "Denoising"
        self.bar = progress_bar(self.quiet, desc=name, total=total, unit=unit, leave=leave, bar_format=BAR)

    def _close(self) -> None:
        """Close the bar; an incomplete one is always removed."""
        with tqdm.get_lock():  # so that a tick never sees it half closed
            self.bar.leave = self.bar.leave and self.bar.n == self.bar.total
            self.bar.close()

    def _tick(self) -> None:
        while not self.over.wait(1):
            with tqdm.get_lock():
                self.bar.refresh()


def add_views(
    watch: Watch, path: Path, name: str, grey: np.ndarray, preview: bool, folder: Path | None, terminal: str | None
) -> None:
    """Add the requested previews to watch.

    The preview is shown in the terminal, with the protocol `terminal`, or else written next to path; grey is what that
    file contains before the first step. In folder, each step has a file of its own, named after `name`.
    """
    if preview and terminal:
        watch.views.append(TerminalView(sys.stderr.buffer, terminal))
    elif preview:
        file = FileView(path.with_name(f"{path.stem}.preview.png"))
        watch.views.append(file)
        file(grey)  # so that it can be opened right away
        watch.say(f"Preview until the image is finished: {file.path}")
    if folder:
        watch.views.append(FolderView(folder, name))
