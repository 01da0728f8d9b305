"""`mlx-zimage train`: one command from a folder of images to a LoRA, which resumes where it was killed."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import ranks
from click.testing import CliRunner
from PIL import Image

from mlx_zimage import OutputError, RequestError
from mlx_zimage.cli import main
from mlx_zimage.errors import GroupError
from mlx_zimage.train.loop import Stepped
from mlx_zimage.train.record import Record
from mlx_zimage.weights.component import read_metadata

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
    described = r"Training on 3 images, scaled down to at most 64x64, within [\d.]+ MB\..*6 steps will take about 1 min"
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
        (("--memory", "1MB"), "does not fit within"),
        (("--dtype", "float16"), "'float16' is not one of"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(images, tiny_folder, tmp_path, more, said):
    done = CliRunner().invoke(main, words(images, tiny_folder, tmp_path / "lora.safetensors", *more))
    assert done.exit_code != 0 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("Error") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n',
        b"[1]\n",
        b"\xff\n",
        b'{"step": "1", "loss": 0.5}\n',
        b'{"step": 1, "loss": "0.5"}\n',
        b'{"step": 1%s, "loss": 0.5}\n' % (400 * b"0"),
        b'{"step": 1, "loss": NaN}\n',
    ],
)
def test_a_log_of_another_program_is_replaced(content, tmp_path):
    record = Record(tmp_path / "lora.safetensors")
    record.folder.mkdir()
    record.log.write_bytes(content)
    record.step(Stepped(1, 0.5, 1.0, 1e-4, 0.1))
    record.plot()
    record.close()
    assert [row["step"] for row in record.rows()] == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_is_named_also_when_it_is_closed(tmp_path):
    with (
        pytest.raises(OutputError, match=r"^could not write .*log\.jsonl: No space"),
        closing(Record(tmp_path / "lora.safetensors")) as record,
    ):
        record._file = open("/dev/full", "a")  # noqa: SIM115
        record.step(Stepped(1, 0.5, 1.0, 1e-4, 0.1))


def test_a_record_that_cannot_be_written_is_named_and_says_how_to_continue(tmp_path):
    record = Record(tmp_path / "lora.safetensors")
    (record.folder / "loss.svg").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"^could not write .*loss\.svg: .*; fix that, and run the same command"):
        record.plot()


# ---- on several machines


def trained_by_two(images: Path, model: Path, folder: Path, *more: str) -> list[tuple[int, str]]:
    """Train on two ranks, each with its own output: the exit code and the output of each."""
    given = words(images, model, folder / "rank{rank}" / "lora.safetensors", "-q", *more)
    return ranks.finish(ranks.start(2, folder, [sys.executable, "-m", "mlx_zimage", *given]))


def state_of(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "lora-training" / "state.safetensors"))


def losses_of(folder: Path) -> list[float]:
    log = folder / "lora-training" / "log.jsonl"
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_two_machines_train_what_one_does(images, tiny_folder, tmp_path):
    more = ("--steps", "3", "--accumulate", "3", "--save-every", "2", "--preview", "a cat")  # two images and one
    alone = CliRunner().invoke(main, words(images, tiny_folder, tmp_path / "alone" / "lora.safetensors", *more))
    assert alone.exit_code == 0, alone.output
    (first, text), (second, silence) = trained_by_two(images, tiny_folder, tmp_path, *more)
    assert first == second == 0, text + silence
    assert text == f"{tmp_path / 'rank0' / 'lora.safetensors'}\n" and silence == ""
    assert sorted(path.suffix for path in (tmp_path / "rank1" / "lora-training").iterdir()) == ["", ".sum"]  # caches
    one, two = (state_of(tmp_path / name) for name in ("alone", "rank0"))
    assert one.keys() == two.keys()
    for part in ("factors", "first", "second"):
        own, ours = (np.concatenate([state[name].flatten() for name in one if part in name]) for state in (one, two))
        # Gradients are added in another order, measured 3e-7. By the norm, since AdamW takes steps of one size in every
        # direction, and a gradient near zero may have either sign.
        assert np.linalg.norm(ours - own) < 1e-5 * np.linalg.norm(own), part
    assert losses_of(tmp_path / "rank0") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-5)
    assert (tmp_path / "rank0" / "lora-training" / "previews" / "000003-0.png").exists()


@pytest.mark.slow
def test_two_machines_resume_from_the_first_ones_state(images, tiny_folder, tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    more = ("--save-every", "2")
    for name, steps in (("whole", "4"), ("parts", "2"), ("parts", "4")):
        for code, text in trained_by_two(images, tiny_folder, tmp_path / name, "--steps", steps, *more):
            assert code == 0, text
    whole, parts = ((tmp_path / name / "rank0" / "lora.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    settings = json.loads(read_metadata(tmp_path / "whole" / "rank0" / "lora.safetensors")["mlx_zimage.settings"])
    assert settings["accumulate"] == 2  # one image for each


@pytest.mark.slow
def test_different_datasets_and_too_few_images_are_refused_on_every_machine(images, tiny_folder, tmp_path):
    for rank in range(2):
        shutil.copytree(images, tmp_path / f"images{rank}")
    (tmp_path / "images1" / "0.txt").write_text("another [trigger]")
    for code, text in trained_by_two(tmp_path / "images{rank}", tiny_folder, tmp_path):
        assert code == GroupError.exit_code
        assert re.search(
            r"rank 1 \(.*\) has a different dataset from rank 0 \(.*\); all machines need the same one", text
        )
    for code, text in trained_by_two(images, tiny_folder, tmp_path, "--accumulate", "1"):
        assert code == RequestError.exit_code
        assert "accumulate must be at least 2, one image for each machine, got 1" in text
    assert not list(tmp_path.glob("rank?/*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_dies_ends_the_training_on_all(rank, images, tiny_folder, tmp_path):
    given = words(images, tiny_folder, tmp_path / "rank{rank}" / "lora.safetensors", "-q", "--steps", "100000")
    processes = ranks.start(2, tmp_path, [sys.executable, "-m", "mlx_zimage", *given])
    log = tmp_path / "rank0" / "lora-training" / "log.jsonl"
    while not log.exists() and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    processes[rank].kill()
    (other,) = ranks.finish([processes[1 - rank]], 2 * ENDED)  # MLX may not notice: then the watchdog ends it
    processes[rank].communicate()
    assert other[0] == GroupError.exit_code, other[1]
    assert not list(tmp_path.glob("rank?/*.safetensors"))


def killed_anywhere(images: Path, model: Path, folder: Path, kills: int, seed: int) -> None:
    """Train once uninterrupted, and once killed `kills` times; the files must be the same."""
    steps = 8 * (kills + 1)
    more = ("--steps", str(steps), "--save-every", "2", "--accumulate", "2", "--preview", "a cat")
    program = [sys.executable, "-m", "mlx_zimage"]

    def start(name: str) -> subprocess.Popen:
        command = [*program, *words(images, model, folder / name / "lora.safetensors", *more)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    assert start("whole").wait(10 * ENDED) == 0
    log, chance = folder / "killed" / "lora-training" / "log.jsonl", random.Random(seed)
    for _ in range(kills):
        before = log.read_text() if log.exists() else ""
        process = start("killed")
        while process.poll() is None and (log.read_text() if log.exists() else "") == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))  # some steps and files later, or in the middle of one
        process.send_signal(signal.SIGKILL)
        assert process.wait(ENDED) == -signal.SIGKILL, "it ended before it was killed: it needs more steps"
    assert start("killed").wait(10 * ENDED) == 0
    whole, other = (folder / name / "lora.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == other.read_bytes()
    previews = [sorted((path.parent / "lora-training" / "previews").glob("0*")) for path in (whole, other)]
    assert [path.name for path in previews[0]] == [f"{step:06}-0.png" for step in range(2, steps + 1, 2)]
    assert [path.read_bytes() for path in previews[0]] == [path.read_bytes() for path in previews[1]]
    logs = [(path.parent / "lora-training" / "log.jsonl").read_text().splitlines() for path in (whole, other)]
    found = [[(json.loads(row)["step"], json.loads(row)["loss"]) for row in log] for log in logs]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_and_writes_the_same_file(images, tiny_folder, tmp_path):
    killed_anywhere(images, tiny_folder, tmp_path, kills=2, seed=0)


@pytest.mark.long
def test_a_run_that_is_killed_twenty_times_resumes_and_writes_the_same_file(images, tiny_folder, tmp_path):
    killed_anywhere(images, tiny_folder, tmp_path, kills=20, seed=1)
