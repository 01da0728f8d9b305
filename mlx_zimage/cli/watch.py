"""What a person sees of a request while it is drawn: a bar for each phase, and the picture growing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..generate import Finished
from ..images.preview import Album, Screen, Sheet, View, sketch
from ..pipeline import Phase
from ..sampling import Step
from .output import progress_bar, say

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
PHASES = {"scale": ("Fitting float16", "network"), "encode": ("Encoding", "layer"), "decode": ("Decoding", "block")}


class Watch:
    """Takes a request's events as they come: `with Watch(...) as watch: watch(event)`.

    views, which may be added to, are shown each step as `colours` tell it (see preview.colours_of), and the finished
    pictures. The bars follow each other on one line: float16's scale where it has to be found, the prompt's encoding,
    the steps, the decoding. That of the steps stays, if leave is set. Their clocks go on between events, which may be a
    minute apart.
    """

    def __init__(self, steps: int, quiet: bool, leave: bool, colours: np.ndarray | None = None):
        self.steps, self.quiet, self.leave, self.colours = steps, quiet, leave, colours
        self.views: list[View] = []
        self.over = threading.Event()

    def __enter__(self) -> Watch:
        self._open("Drawing", self.steps, "step")
        if not self.bar.disable:
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __call__(self, event: Phase | Step | Finished) -> None:
        if isinstance(event, Phase):
            self._phase(event)
        elif isinstance(event, Step):
            if self.name != "Drawing" or event.index < self.bar.n:  # begun again, in another dtype
                self._next("Drawing", self.steps, "step")
            self.bar.update()
            if self.colours is not None:
                preview = sketch(event.clean, self.colours)
                self._show(lambda view: view(preview))
        else:
            self._close()
            self._show(lambda view: view.finish(event.pixels))

    def say(self, message: str) -> None:
        """On a line of its own, above the bar."""
        with tqdm.external_write_mode(file=sys.stderr):
            say(message, self.quiet)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._close()
        for view in self.views:
            view.close()

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
            self._next("Drawing", self.steps, "step")

    def _next(self, name: str, total: int, unit: str) -> None:
        self._close()
        self._open(name, total, unit)

    def _open(self, name: str, total: int, unit: str) -> None:
        self.name, leave = name, self.leave and name == "Drawing"
        self.bar = progress_bar(self.quiet, desc=name, total=total, unit=unit, leave=leave, bar_format=BAR)

    def _close(self) -> None:
        """A bar that is not full goes in any case."""
        with tqdm.get_lock():  # a tick finds it open or closed
            self.bar.leave = self.bar.leave and self.bar.n == self.bar.total
            self.bar.close()

    def _tick(self) -> None:
        while not self.over.wait(1):
            with tqdm.get_lock():
                self.bar.refresh()


def add_views(
    watch: Watch, path: Path, name: str, grey: np.ndarray, preview: bool, folder: Path | None, terminal: str | None
) -> None:
    """Show previews in a terminal that understands `terminal`, else in a file beside path; and by name in a folder.

    grey is what the file holds before the first step.
    """
    if preview and terminal:
        watch.views.append(Screen(sys.stderr.buffer, terminal))
    elif preview:
        sheet = Sheet(path.with_name(f"{path.stem}.preview.png"))
        watch.views.append(sheet)
        sheet(grey)  # so that it may be opened at once
        watch.say(f"Preview, until the picture is finished: {sheet.path}")
    if folder:
        watch.views.append(Album(folder, name))
