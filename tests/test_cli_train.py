"""`mlx-zimage train`: one command from a folder of images to a LoRA, which resumes where it was killed."""

import json
import random
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mlx_zimage.cli import main

ENDED = 60  # seconds


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"[trigger] {i}")
    return folder


def words(images: Path, model: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", str(model), "--resolution", "64", "--rank", "4", "--trigger", "sks", "--dtype", "float32"]
    return ["train", str(images), "-o", str(output), *given, *more]


def test_train_writes_a_lora_a_log_a_plot_and_previews(images, tiny_folder, tmp_path):
    output = tmp_path / "dog.safetensors"
    more = ("--steps", "6", "--save-every", "3", "--preview", "a sks dog", "--preview", "a cat")
    done = CliRunner().invoke(main, words(images, tiny_folder, output, *more))
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{output}\n"
    described = (
        r"Training on 3 images, scaled down to at most 64x64, within [\d.]+ MB\..*6 steps will take about [\d.]+ h"
    )
    assert re.search(described, done.stderr, re.DOTALL)
    folder = tmp_path / "dog-training"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["loss"] > 0 and row["norm"] > 0 and row["rate"] == 1e-4 for row in rows)
    plot = ET.fromstring((folder / "loss.svg").read_text())
    line = plot.find("{*}polyline")
    assert line is not None and len(line.get("points", "").split()) == 6
    previews = sorted(path.name for path in (folder / "previews").iterdir())
    assert previews == ["000003-0.png", "000003-1.png", "000006-0.png", "000006-1.png"]
    assert (folder / "dog-000006.safetensors").exists()
    info = CliRunner().invoke(main, ["lora", "info", str(output), "--model", str(tiny_folder)])
    assert "sks" in info.stdout


@pytest.mark.parametrize(
    "more, said",
    [
        (("--rank", "0"), "rank must be"),
        (("--resolution", "100"), "resolution must be"),
        (("--memory", "1MB"), "cannot be trained on within"),
        (("--dtype", "float16"), "'float16' is not one of"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(images, tiny_folder, tmp_path, more, said):
    done = CliRunner().invoke(main, words(images, tiny_folder, tmp_path / "lora.safetensors", *more))
    assert done.exit_code != 0 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("Error") == 1
    assert not list(tmp_path.iterdir())


def killed_anywhere(images: Path, model: Path, folder: Path, kills: int, seed: int) -> None:
    """Run a training whole, and one that is killed so many times; their files must be the same."""
    more = ("--steps", "12", "--save-every", "2", "--accumulate", "2")
    program = [sys.executable, "-m", "mlx_zimage"]

    def start(name: str) -> subprocess.Popen:
        command = [*program, *words(images, model, folder / name / "lora.safetensors", *more)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    assert start("whole").wait(ENDED) == 0
    log, chance, hit = folder / "killed" / "lora-training" / "log.jsonl", random.Random(seed), 0
    for _ in range(kills):
        before = log.read_text() if log.exists() else ""
        process = start("killed")
        while process.poll() is None and (log.read_text() if log.exists() else "") == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))  # some steps and files later, or in the middle of one
        process.send_signal(signal.SIGKILL)
        hit += process.wait(ENDED) == -signal.SIGKILL
    assert start("killed").wait(ENDED) == 0
    assert hit
    whole, other = (folder / name / "lora.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == other.read_bytes()
    logs = [(path.parent / "lora-training" / "log.jsonl").read_text().splitlines() for path in (whole, other)]
    found = [[(json.loads(row)["step"], json.loads(row)["loss"]) for row in log] for log in logs]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_and_writes_the_same_file(images, tiny_folder, tmp_path):
    killed_anywhere(images, tiny_folder, tmp_path, kills=2, seed=0)


@pytest.mark.long
def test_a_run_that_is_killed_twenty_times_resumes_and_writes_the_same_file(images, tiny_folder, tmp_path):
    killed_anywhere(images, tiny_folder, tmp_path, kills=20, seed=1)
