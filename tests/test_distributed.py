"""Several ranks generate what one process does."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import ranks
import tiny
from compare import relative_error
from PIL import Image

from mlx_zimage import RequestError
from mlx_zimage.distributed import Group

PROMPT = {"prompt": "a fox in the snow", "seed": 3, "num_inference_steps": 4}
PHOTO = {"height": 80, "width": 96}
CALLS = {
    "padded": PROMPT | {"height": 80, "width": 112},  # 35 tokens, and a caption that is not a multiple of 32 either
    "not padded": PROMPT | {"height": 128, "width": 64},
    "two images": PROMPT | {"height": 64, "width": 96, "num_images_per_prompt": 2},
    "guided": PROMPT | {"height": 64, "width": 80, "guidance_scale": 3.0, "negative_prompt": "a dog"},
    "from an image": PROMPT | PHOTO | {"image": "photo", "strength": 0.5},
    "with a control image": PROMPT | PHOTO | {"control_image": "photo"},
    "upscaled": PROMPT | {"height": 64, "width": 64, "upscale": 2, "tile": 96},
    "decoded in strips": PROMPT | {"height": 768, "width": 64, "num_inference_steps": 1, "output_type": "np"},
}
# float32: products of fewer rows may be summed in another order, and keys come in another; one missing row is > 1e-3
TOLERANCE = 1e-5


@dataclass
class Rank:
    """An MLX group, without the others."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory) -> list[np.ndarray]:
    pipe = ranks.open_pipeline(tiny_folder, tmp_path_factory.mktemp("alone"))
    return ranks.results(pipe, [*CALLS.values()])


def begin(size: int, model: Path, folder: Path, calls: list[dict], **options) -> list[subprocess.Popen]:
    path = folder / "calls.json"
    path.write_text(json.dumps(calls))
    words = [sys.executable, ranks.__file__, str(model), str(path), str(folder / "out.npz"), json.dumps(options)]
    return ranks.start(size, folder, words)


@pytest.mark.parametrize(
    "size, speeds, least",
    [
        (2, None, 1),
        pytest.param(3, [2, 0.7, 1], 1, marks=pytest.mark.slow),
        pytest.param(3, None, 10, marks=pytest.mark.slow),  # some of the images are too small to be shared
        pytest.param(2, [1, 3], 1, marks=pytest.mark.long),
        pytest.param(3, None, 1, marks=pytest.mark.long),
        pytest.param(4, None, 1, marks=pytest.mark.long),
    ],
)
def test_several_ranks_compute_what_one_does(size, speeds, least, alone, tiny_folder, tmp_path):
    calls = [*CALLS.values()]
    for rank, (code, text) in enumerate(
        ranks.finish(begin(size, tiny_folder, tmp_path, calls, speeds=speeds, least=least))
    ):
        assert code == 0, f"rank {rank}: {text}"
    with np.load(tmp_path / "out.npz") as arrays:
        found = [arrays[name] for name in arrays.files]
    for name, one, several in zip(CALLS, alone, found, strict=True):
        assert relative_error(several, one) < TOLERANCE, name


def test_different_models_are_refused_on_every_rank(tmp_path):
    for rank in range(2):
        tiny.write_checkpoint(tmp_path / f"model{rank}", seed=rank)
    for code, text in ranks.finish(begin(2, tmp_path / "model{rank}", tmp_path, [PROMPT])):
        assert code != 0
        assert "GroupError: rank 1 has a different model from rank 0; all machines need the same one" in text


def test_a_rank_that_cannot_generate_ends_the_request_on_all(tiny_folder, tmp_path):
    first, second = ranks.finish(begin(2, tiny_folder, tmp_path, [CALLS["padded"]], memory={"1": "2MB"}))
    assert first[0] != 0 != second[0]
    assert "GroupError: another machine failed; its own message says why" in first[1]
    assert "MemoryBudgetError" in second[1]


def check_that_all_end(sign: int, rank: int, after: float, model: Path, folder: Path) -> None:
    """Send a signal to one of three ranks, some seconds after it opened the model; expect errors from the others."""
    calls = [CALLS["padded"] | {"num_inference_steps": 1000}] * 20  # more than there is time for
    processes = begin(3, model, folder, calls, limit=8)
    while not all((folder / f"out.npz.{i}").exists() for i in range(3)):
        time.sleep(0.1)
    time.sleep(after)
    processes[rank].send_signal(sign)
    others = [process for i, process in enumerate(processes) if i != rank]
    try:
        for code, text in ranks.finish(others, seconds=60):
            assert code != 0
            # once it has lost a rank, MLX's ring may also deliver numbers that look like another rank's failure
            assert "GroupError: " in text or "waited too long for the other" in text, text
    finally:
        processes[rank].kill()
        processes[rank].wait()
    assert not (folder / "out.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "rank"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)])
def test_a_rank_that_dies_or_stalls_ends_all(sign, rank, tiny_folder, tmp_path):
    check_that_all_end(sign, rank, 2, tiny_folder, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("attempt", range(20))
def test_a_rank_that_dies_or_stalls_at_any_moment_ends_all(attempt, tiny_folder, tmp_path):
    sign = [signal.SIGKILL, signal.SIGSTOP][attempt % 2]
    check_that_all_end(sign, attempt % 3, random.Random(attempt).uniform(0, 4), tiny_folder, tmp_path)


@pytest.mark.slow
def test_a_command_started_by_mlx_launch_prints_and_saves_once(light_folder, tmp_path):
    launch = Path(sys.executable).with_name("mlx.launch")
    words = ["generate", "a fox", "--model", str(light_folder), "--seed", "1", "--dtype", "float32", "--size", "64x64"]
    ours = [sys.executable, "-m", "mlx_zimage", *words]
    port = str(ranks.free_port(2))
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    together = subprocess.run(
        [str(launch), "-n", "2", "--backend", "ring", "-p", port, "--", *ours, "-o", "two.png"], **run
    )
    assert together.returncode == 0 and together.stdout.split() == ["two.png"], together.stderr
    assert together.stderr.count("Seed: 1") == 1
    assert subprocess.run([*ours, "-o", "one.png"], **run).returncode == 0
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png"))
    assert np.abs(one - two).max() <= 1  # a value on the border between two levels may be rounded either way
    refused = subprocess.run(
        [str(launch), "-n", "2", "--backend", "ring", "-p", port, "--", *ours, "--steps", "0"], **run
    )
    # by whichever rank is first: then mlx.launch may end the other before it can speak
    assert re.search(r"^Error( on rank 1)?: --steps must be from 1 to 1000, got 0$", refused.stderr, re.MULTILINE)


def test_ranks_of_uneven_speed_have_every_row_once():
    parts = [100, 28, 64]
    groups = [Group(Rank(rank, 3), [1, 2.5, 0.7]) for rank in range(3)]
    x = mx.arange(sum(parts))
    shares = [group.own(x, parts) for group in groups]
    assert [len(share) for share in shares] == list(groups[0].shares(parts))
    assert sorted(np.concatenate(shares).tolist()) == x.tolist()


@pytest.mark.parametrize("group", [Group(Rank(3, 4)), Group(Rank(2, 4), [1, 2, 3, 4])])
def test_every_rank_computes_all_of_a_small_image(group):
    assert group.among(2048) is group
    alone = group.among(1024)
    assert alone.mine(1000) == (0, 1000)
    assert alone.shares([1000, 24]) == ()


@pytest.mark.parametrize("speeds", [[1], [1, 2, 3], [1, 0], [1, -1], [1, float("inf")], [1, float("nan")]])
def test_speeds_are_positive_numbers_one_per_rank(speeds):
    with pytest.raises(RequestError, match="speeds must be 2 positive numbers, one per rank"):
        Group(Rank(0, 2), speeds)


def test_only_other_ranks_follow(pipe):
    with pytest.raises(RequestError, match=r"follow\(\) is for the other ranks of a group"):
        pipe.follow()
    pipe.close()  # nothing to end
