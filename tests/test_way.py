"""Traces a request from the command line to the saved file: CONTRIBUTING.md describes its way through the modules."""

import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from click.testing import CliRunner

import mlx_zimage
from mlx_zimage.cli import main
from mlx_zimage.generate import Saved
from mlx_zimage.images.metadata import Origin
from mlx_zimage.request import GenerateRequest

PACKAGE = Path(mlx_zimage.__file__).parent


def flat(values: Iterable) -> Iterator:
    """The values, and those in lists and tuples."""
    for value in values:
        yield from flat(value) if type(value) in (list, tuple) else [value]


class Trace:
    """Records which files of the package call each other, and which files the request is passed to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.passed: list[tuple[str, str]] = []
        self._frames: set[FrameType] = set()  # a generator's frame is entered each time it resumes

    def __enter__(self) -> "Trace":
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _) -> None:
        file = self._file(frame)
        if event != "call" or file is None or frame in self._frames:
            return
        self._frames.add(frame)
        back = frame.f_back
        while back and self._file(back) is None:
            back = back.f_back
        caller = back and self._file(back)
        if caller == file:
            return
        self.calls.append((caller, file))
        code = frame.f_code
        given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        if any(isinstance(value, (GenerateRequest, Origin, Saved)) for value in flat(given)):
            self.passed.append((caller, file))

    def _file(self, frame: FrameType) -> str | None:
        path = frame.f_code.co_filename
        return path.removeprefix(f"{PACKAGE}/") if path.startswith(f"{PACKAGE}/") else None


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    """One image of the pocket model, from the finished request until its path is printed."""
    seen = Trace()
    file = tmp_path_factory.mktemp("way") / "a.png"
    with pytest.MonkeyPatch.context() as patch:
        run = importlib.import_module("mlx_zimage.generate").run

        def traced(*args, **options):
            with seen:
                yield from run(*args, **options)

        patch.setattr("mlx_zimage.generate.run", traced)
        options = ["--model", "pocket", "--size", "32x32", "--steps", "1", "--seed", "1", "-o", str(file), "-q"]
        result = CliRunner().invoke(main, ["generate", "a red circle", *options], catch_exceptions=False)
    assert result.exit_code == 0 and file.is_file()
    return seen


def test_a_request_is_passed_from_file_to_file_and_never_back(trace):
    # the request's own methods, the display of finished images, and what drives the pipeline's own generator
    own = {"request.py", "cli/watch.py", "turns.py"}
    assert [pair for pair in trace.passed if not own & set(pair)] == [
        ("cli/generate.py", "generate.py"),
        ("generate.py", "pipeline.py"),
        ("generate.py", "images/codec.py"),
        ("images/codec.py", "images/metadata.py"),
    ]


def test_the_pipeline_reaches_the_networks_through_one_module(trace):
    doors = {callee for caller, callee in trace.calls if caller == "pipeline.py"}
    values = {"request.py", "inputs.py", "scheduler.py", "weights/checkpoint.py", "models/vae.py"}  # configs, too
    assert doors - values == {"networks.py", "images/codec.py", "failures.py", "turns.py"}


def test_an_image_passes_through_at_most_30_files(trace):
    entered = {file for pair in trace.calls for file in pair if file and not file.startswith("cli/")}
    assert len(entered) <= 30, sorted(entered)
