"""What a run leaves in its folder for people: a log, a plot of the loss, and previews."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from .. import atomic
from ..images.codec import encode
from .loop import Previewed, Stepped, folder_of
from .output import writing
from .previews import path_of

WIDTH, HEIGHT, MARGIN = 800, 400, 48  # of the plot
POINTS = 400  # at most


class Record:
    """The log (log.jsonl), the plot (loss.svg) and the previews (previews/) of the run that writes output."""

    def __init__(self, output: Path):
        self.folder = folder_of(output)
        self.log = self.folder / "log.jsonl"
        self._file: TextIO | None = None

    def step(self, event: Stepped) -> None:
        """Log a step. The first one replaces any rows for it and later steps, left by a run that was stopped."""
        row = {"step": event.step, "loss": event.loss, "norm": event.norm, "rate": event.rate}
        with writing(self.log):
            if self._file is None:
                kept = [row for row in self.rows() if row["step"] < event.step]
                text = "".join(f"{json.dumps(row)}\n" for row in kept)
                self.folder.mkdir(parents=True, exist_ok=True)
                atomic.write(self.log, lambda file: file.write_text(text), lasting=False)
                self._file = self.log.open("a")
            self._file.write(json.dumps(row | {"seconds": round(event.elapsed_s, 4)}) + "\n")
            self._file.flush()

    def rows(self) -> list[dict]:
        """The steps in the log, up to a line that was cut off or is not one of ours."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines() if self.log.exists() else ():
            try:
                row = json.loads(line)
                step, loss = row["step"], row["loss"]
            except (ValueError, TypeError, KeyError):
                break
            if type(step) is not int or not 0 < step < 2**63 or type(loss) is not float or not math.isfinite(loss):
                break
            found.append(row)
        return found

    def preview(self, event: Previewed) -> Path:
        """Save a preview; returns its path."""
        path = path_of(self.folder, event.step, event.index)
        content = encode(event.pixels, path.suffix)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return atomic.write(path, lambda file: file.write_bytes(content), lasting=False)

    def plot(self) -> Path:
        """Plot the losses so far; returns the path."""
        path = self.folder / "loss.svg"
        with writing(path):
            rows = self.rows()
            svg = plot([row["step"] for row in rows], [row["loss"] for row in rows])
            return atomic.write(path, lambda file: file.write_text(svg), lasting=False)

    def close(self) -> None:
        if self._file is not None:
            with writing(self.log):  # what could not be written is tried again
                self._file.close()


def plot(steps: Sequence[int], losses: Sequence[float]) -> str:
    """An SVG of losses over steps: the mean of each of at most POINTS groups, since single losses are mostly noise."""
    size = -(-len(steps) // POINTS) or 1
    groups = [range(i, min(i + size, len(steps))) for i in range(0, len(steps), size)]
    points = [(steps[group[-1]], sum(losses[i] for i in group) / len(group)) for group in groups]
    right, top = max((x for x, _ in points), default=1), max((y for _, y in points), default=1) or 1
    place = [
        f"{MARGIN + (WIDTH - 2 * MARGIN) * x / right:.1f},{HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * y / top:.1f}"
        for x, y in points
    ]
    low, far = HEIGHT - MARGIN, WIDTH - MARGIN
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
<path d="M{MARGIN},{MARGIN}V{low}H{far}" fill="none" stroke="gray"/>
<polyline points="{" ".join(place)}" fill="none" stroke="steelblue" stroke-width="1.5"/>
<text x="{MARGIN - 6}" y="{MARGIN + 5}" text-anchor="end">{top:.3g}</text>
<text x="{MARGIN - 6}" y="{low}" text-anchor="end">0</text>
<text x="{far}" y="{low + 18}" text-anchor="end">step {right}</text>
<text x="{MARGIN}" y="{MARGIN - 14}">loss</text>
</svg>
"""
