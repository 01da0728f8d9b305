"""Training stays within its plan, and what cannot is refused."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from lanes import slow
from PIL import Image

from mlx_zimage import MemoryBudgetError, RequestError, ZImagePipeline
from mlx_zimage.train.dataset import Example, read_dataset
from mlx_zimage.train.factors import arrays_of, new_factors
from mlx_zimage.train.loop import Stepped, train
from mlx_zimage.train.memory import plan_training
from mlx_zimage.train.settings import Settings
from mlx_zimage.weights.hub import POCKET


@pytest.fixture(scope="module")
def pocket() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(POCKET, dtype="float32", keep=False)


def examples(side: int) -> list[Example]:
    return [Example(POCKET, side, side, "", "a cat")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (256, 256, 3), np.uint8)
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
        plan_training(pocket.planner, examples(256), 40, 10**5, streamed.room // 2)


@pytest.mark.parametrize("side", [128, slow(256)])
def test_a_step_takes_no_more_memory_than_planned(pocket, images, tmp_path, side):
    settings = Settings(steps=2, rank=4, resolution=side)
    found = read_dataset(images, side)
    gc.collect()
    others = mx.get_active_memory()  # models of other tests
    events = train(pocket, found, settings, tmp_path / "lora.safetensors", save_every=100)
    next(event for event in events if isinstance(event, Stepped))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    next(event for event in events if isinstance(event, Stepped))
    peak = mx.get_peak_memory()
    count = sum(array.size for array in arrays_of(new_factors(pocket.transformer.config, 4, (), 0)))
    planned = plan_training(pocket.planner, found, len(pocket.tokenize("a red circle")), count, pocket.budget)
    assert before < peak <= others + planned.room
    events.close()


def test_a_full_disk_is_noticed_before_training(pocket, images, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(OSError, match=r"free there; free some space"):
        next(train(pocket, read_dataset(images, 256), Settings(rank=4), tmp_path / "lora.safetensors"))
    assert not list(tmp_path.iterdir())


def test_another_file_is_not_overwritten(pocket, images, tmp_path):
    output = tmp_path / "lora.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(RequestError, match="choose another output"):
        next(train(pocket, read_dataset(images, 256), Settings(rank=4), output))
    assert output.read_bytes() == b"precious"
