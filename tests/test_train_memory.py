"""Training stays within its plan, and what cannot is refused."""

import gc
import re

import mlx.core as mx
import numpy as np
import pytest
from lanes import slow
from PIL import Image

from mlx_zimage import MemoryBudgetError, RequestError, ZImagePipeline
from mlx_zimage.memory import Planner
from mlx_zimage.sizes import parse_memory
from mlx_zimage.train import attention
from mlx_zimage.train.dataset import Example, read_dataset
from mlx_zimage.train.factors import arrays_of, new_factors
from mlx_zimage.train.loop import Planned, Stepped, train
from mlx_zimage.train.memory import best_plan, plan_training
from mlx_zimage.train.settings import RESOLUTION, Settings
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.library import planned

FULL_SIZE_FACTORS = 35_020_800  # of rank 16


@pytest.fixture(scope="module")
def pocket() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(POCKET, dtype="float32", keep=False)


def examples(side: int) -> list[Example]:
    return [Example(POCKET, (side, side), side, side, "", "a cat")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (384, 384, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red circle")
    return folder


def test_a_smaller_budget_streams_blocks_and_a_smaller_one_is_refused(pocket):
    whole = plan_training(pocket.planner, examples(256), 40, 10**5, 10**10)
    assert not whole.streamed
    blocks = pocket.planner.footprints["transformer"].blocks
    streamed = plan_training(pocket.planner, examples(256), 40, 10**5, whole.room - sum(blocks.values()) // 2)
    assert streamed.streamed and streamed.room < whole.room
    with pytest.raises(MemoryBudgetError, match=r"images of 256x256 .*--resolution \d+ would fit"):
        plan_training(pocket.planner, examples(256), 40, 10**5, 4 * streamed.room // 5)


# Bits, side, streamed, and the peak in GB of a step at rank 16 with 96 tokens: full size, random weights, an H200. The
# last two are of steps with four images.
MEASURED = [
    (4, 512, False, 5.53), (4, 1024, False, 8.46), (4, 512, True, 2.24), (4, 1024, True, 5.17),
    (8, 512, False, 8.53), (8, 1024, False, 11.47), (8, 512, True, 2.32), (8, 1024, True, 5.26),
    (None, 512, False, 13.82), (None, 1024, False, 16.75), (None, 512, True, 2.14), (None, 1024, True, 5.07),
    (4, 512, False, 5.67), (4, 512, True, 2.38),
]  # fmt: skip


@pytest.mark.parametrize("bits, side, streamed, gigabytes", MEASURED)
def test_the_plan_for_a_gpu_is_within_a_tenth_of_what_was_measured(monkeypatch, bits, side, streamed, gigabytes):
    for module in ("memory", "train.memory", "train.attention"):
        monkeypatch.setattr(f"mlx_zimage.{module}.backend", lambda: "cuda")
    planner = Planner(planned(bits), mx.bfloat16)
    plan = best_plan(planner, side, side, 96, FULL_SIZE_FACTORS, 0 if streamed else 10**12)
    assert bool(plan.streamed) == streamed
    assert gigabytes <= plan.room / 1e9 <= 1.1 * gigabytes


def test_a_lean_plan_needs_less_for_large_images_and_is_chosen_before_streaming(monkeypatch):
    monkeypatch.setattr("mlx_zimage.train.memory.backend", lambda: "metal")
    planner = Planner(planned(4), mx.bfloat16)
    whole = plan_training(planner, examples(1024), 96, FULL_SIZE_FACTORS, 10**11)
    lean = plan_training(planner, examples(1024), 96, FULL_SIZE_FACTORS, whole.room - 1)
    assert not whole.lean and lean.lean and not lean.streamed
    assert lean.room < 0.8 * whole.room
    monkeypatch.setattr("mlx_zimage.train.memory.backend", lambda: "cuda")
    on_cuda = plan_training(planner, examples(1024), 96, FULL_SIZE_FACTORS, 8 * 10**9)
    assert on_cuda.streamed and not on_cuda.lean


def test_a_budget_chooses_the_resolution_unless_one_is_given(images, tmp_path, monkeypatch):
    pipe = ZImagePipeline.from_pretrained(POCKET, dtype="float32", keep=False)
    tokens = len(pipe.tokenize("a red circle"))
    count = sum(array.size for array in arrays_of(new_factors(pipe.transformer.config, 4, (), 0)))
    monkeypatch.setattr("mlx_zimage.train.memory.LEAST_RESOLUTION", 64)

    def planned_with(**given) -> Planned:
        return next(train(pipe, read_dataset(images, 256), Settings(rank=4, **given), tmp_path / "lora.safetensors"))

    assert planned_with().resolution == RESOLUTION
    with pytest.raises(MemoryBudgetError) as refused:
        plan_training(pipe.planner, examples(128), tokens, count, 10**6)
    pipe.budget = parse_memory(re.search(r"at least ([\d.]+ MB)", str(refused.value))[1])
    assert planned_with().resolution == 128
    with pytest.raises(MemoryBudgetError, match=r"256x256 .* --resolution 128 would fit"):
        planned_with(resolution=256)


@pytest.mark.parametrize(
    "side, rank, accumulate, dtype",
    [(128, 4, 1, "float32"), slow(384, 4, 1, "float32"), (64, 32, 4, "float32"), (64, 32, 4, "bfloat16")],
)
def test_a_step_takes_as_much_memory_as_planned_within_a_tenth(images, tmp_path, side, rank, accumulate, dtype):
    settings = Settings(steps=2, rank=rank, resolution=side, accumulate=accumulate, extras=("adaln", "refiners"))
    found = read_dataset(images, side)
    gc.collect()
    others = mx.get_active_memory()  # models of other tests
    pocket = ZImagePipeline.from_pretrained(POCKET, dtype=dtype, keep=False)
    events = train(pocket, found, settings, tmp_path / "lora.safetensors", save_every=100)
    next(event for event in events if isinstance(event, Stepped))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    next(event for event in events if isinstance(event, Stepped))
    peak = mx.get_peak_memory()
    count = sum(array.size for array in arrays_of(new_factors(pocket.transformer.config, rank, settings.extras, 0)))
    planned = plan_training(pocket.planner, found, len(pocket.tokenize("a red circle")), count, pocket.budget)
    assert before < peak and 0.9 * planned.room < peak - others <= planned.room
    events.close()


def test_the_scores_of_two_pieces_of_any_image_are_planned():
    for length in (1, 500, 1120, 4200, 16500, 66000):
        q = mx.zeros((1, 30, length, 128))  # never evaluated
        longest = max(part.stop - part.start for part in attention._pieces(q, q))
        assert attention.scores_bytes(30, length) == 4 * 30 * min(2 * longest, length) * length


def test_another_file_is_not_overwritten(pocket, images, tmp_path):
    output = tmp_path / "lora.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(RequestError, match="choose another output"):
        next(train(pocket, read_dataset(images, 256), Settings(rank=4), output))
    assert output.read_bytes() == b"precious"
    output.unlink()
    given = read_dataset(images, 64), Settings(steps=1, rank=4, resolution=64), output
    list(train(pocket, *given))
    output.write_bytes(b"precious")
    with pytest.raises(RequestError, match="choose another output"):
        list(train(pocket, *given))
    assert output.read_bytes() == b"precious"
