"""What a person sees of a request while it is drawn: a bar for each phase, and the picture growing."""

from __future__ import annotations

import sys
import threading

import numpy as np
from tqdm import tqdm

from ..images.preview import sketch
from ..pipeline import Generated, Phase
from ..sampling import Step
from .output import progress_bar, say

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
PHASES = {"scale": ("Fitting float16", "network"), "encode": ("Encoding", "layer"), "decode": ("Decoding", "block")}


class Watch:
    """Takes a request's events as they come: `with Watch(...) as watch: watch(event)`.

    views, which may be added to, are shown each step as `colours` tell it (see preview.colours_of), and the finished
    pictures. The bars follow each other on one line: float16's scale where it has to be found, the prompt's encoding, the steps,
    the decoding. That of the steps stays, if leave is set. Their clocks go on between events, which may be a minute
    apart.
    """

    def __init__(self, steps: int, quiet: bool, leave: bool, colours: np.ndarray | None = None):
        self.steps, self.quiet, self.leave, self.colours = steps, quiet, leave, colours
        self.views = []
        self.bar = None
        self.over = threading.Event()

    def __enter__(self):
        self._open("Drawing", self.steps, "step")
        if not self.bar.disable:
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __call__(self, event: Phase | Step | Generated) -> None:
        if isinstance(event, Phase):
            self._phase(event)
            return
        if isinstance(event, Step):
            if self.name != "Drawing" or event.index < self.bar.n:  # begun again, in another dtype
                self._open("Drawing", self.steps, "step")
            self.bar.update()
        else:
            self._close()
        for view in self.views:
            with tqdm.external_write_mode(file=sys.stderr):
                if isinstance(event, Step):
                    view(sketch(event.clean, self.colours))
                else:
                    view.finish(event.pixels)

    def say(self, message: str) -> None:
        """On a line of its own, above the bar."""
        with tqdm.external_write_mode(file=sys.stderr):
            say(message, self.quiet)

    def __exit__(self, *_):
        self.over.set()
        self._close()
        for view in self.views:
            view.close()

    def _phase(self, phase: Phase) -> None:
        if phase.done:
            self.bar.update()
        else:
            name, unit = PHASES[phase.name]
            self._open(name, phase.total, unit)
        if phase.done == phase.total and phase.name != "decode":
            self._open("Drawing", self.steps, "step")

    def _open(self, name: str, total: int, unit: str) -> None:
        self._close()
        self.name, leave = name, self.leave and name == "Drawing"
        self.bar = progress_bar(self.quiet, desc=name, total=total, unit=unit, leave=leave, bar_format=BAR)

    def _close(self) -> None:
        """A bar that is not full goes in any case."""
        if self.bar is not None:
            with tqdm.get_lock():
                bar, self.bar = self.bar, None
            bar.leave = bar.leave and bar.n == bar.total
            bar.close()

    def _tick(self) -> None:
        while not self.over.wait(1):
            with tqdm.get_lock():
                if self.bar is not None:
                    self.bar.refresh()
