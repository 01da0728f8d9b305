"""Each program of examples/ is run as a person would run it, in an empty folder, on the pocket checkpoint."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args: str) -> str:
        result = subprocess.run([sys.executable, EXAMPLES / name, *args], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    return run


def colour(file: str, x: int, y: int) -> np.ndarray:
    return np.asarray(Image.open(file), dtype=int)[y, x]


def test_one_picture(run):
    assert run("one_picture.py") == "picture.png, drawn from seed 1\n"
    red, _, blue = colour("picture.png", 64, 64)
    assert red > blue + 100


def test_batch(run):
    assert run("batch.py") == "sheet.png\n"
    assert Image.open("sheet.png").size == (2 * 128, 2 * 128)
    assert colour("sheet.png", 5, 5)[2] > 150 > 60 > colour("sheet.png", 5, 250).max(), "blue above, black below"


def test_progress(run):
    lines = run("progress.py").splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"step {i} of 8" for i in range(1, 9)]
    assert lines[-1].startswith("picture (128, 128, 3) after")


def test_custom_schedule(run):
    assert "sigmas 1.000, 0.924, 0.707, 0.383, 0.000\n" in run("custom_schedule.py")
    own, cosine = (np.asarray(Image.open(f"{name}.png"), dtype=int) for name in ("own", "cosine"))
    assert 0 < np.abs(own - cosine).mean() < 40  # of 255: the same scene, drawn a little differently


def test_latents(run):
    assert run("latents.py").endswith("between-0.png\nbetween-1.png\nbetween-2.png\n")
    assert np.load("clean.npy").shape == (3, 16, 16, 16)
    red, _, blue = colour("between-1.png", 5, 5)
    assert red > blue + 100, "yellow behind"


def test_peaks(run):
    pocket = str(EXAMPLES.parent / "mlx_zimage/pocket")
    header, *rows = run("peaks.py", pocket, "32", "32:14MB").splitlines()
    kept, streamed = (row.split() for row in rows)
    assert "kept" in kept and "streamed" in streamed
    assert kept[-1] == streamed[-1], "the same latents"
    ratio = header.split().index("ratio")
    assert float(kept[ratio]) >= 1
    assert float(streamed[ratio + 1]) >= 1  # "3 streamed" is two words


def test_every_example_is_run_by_a_test():
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    for program in EXAMPLES.glob("*.py"):
        if program.name == "full_size.py":
            continue  # writes a checkpoint of 33 GB
        assert f'"{program.name}"' in tests or f"/{program.name}" in tests, program.name
