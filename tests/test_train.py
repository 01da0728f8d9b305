"""Training teaches a LoRA what it is shown, and an interrupted run ends with the same file as an uninterrupted one."""

import errno
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from mlx_zimage import (
    CheckpointError,
    GenerateRequest,
    LockedError,
    MemoryBudgetError,
    ModelNotFoundError,
    NumericsError,
    OutputError,
    RequestError,
    ZImagePipeline,
)
from mlx_zimage.networks import Phase
from mlx_zimage.train import loop, objective
from mlx_zimage.train.dataset import read_dataset
from mlx_zimage.train.factors import arrays_of, new_factors
from mlx_zimage.train.loop import Measured, Planned, Previewed, Run, Stepped, Written, _check_space, train
from mlx_zimage.train.previews import Previews
from mlx_zimage.train.record import Record
from mlx_zimage.train.settings import Settings
from mlx_zimage.weights.component import read_metadata
from mlx_zimage.weights.hub import POCKET


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Four images of 32x32 and 48x32 pixels, with captions."""
    folder = tmp_path_factory.mktemp("images")
    for i, width in enumerate((32, 48, 32, 48)):
        pixels = np.random.default_rng(i).integers(0, 255, (32, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"[trigger] number {i}")
    return folder


@pytest.fixture
def pipe(tiny_folder) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")


def settings(**changed) -> Settings:
    return Settings(**{"steps": 6, "rank": 4, "rate": 1e-3, "trigger": "sks", "resolution": 64, **changed})


def run(pipe, images, output, save_every: int = 2, **changed) -> list:
    own = settings(**changed)
    return list(train(pipe, read_dataset(images, own.resolution, own.trigger), own, output, save_every))


def test_a_run_that_stopped_anywhere_ends_with_the_same_file(pipe, images, tmp_path, tiny_folder):
    changed = {"accumulate": 2, "warm_up": 3, "dropout": 0.3}
    whole = run(pipe, images, tmp_path / "whole" / "lora.safetensors", **changed)
    losses = [event.loss for event in whole if isinstance(event, Stepped)]
    output = tmp_path / "parts" / "lora.safetensors"
    own, found = settings(**changed), {}
    for stop in (1, 2, 3):  # each part stops after so many steps, which may not have been saved
        again = ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")
        events = train(again, read_dataset(images, 64, "sks"), own, output, 2)
        steps = (event for event in events if isinstance(event, Stepped))
        found |= {event.step: event.loss for event in itertools.islice(steps, stop)}
        events.close()
    again = ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")
    found |= {e.step: e.loss for e in run(again, images, output, **changed) if isinstance(e, Stepped)}
    assert [found[i + 1] for i in range(6)] == losses
    assert output.read_bytes() == (tmp_path / "whole" / "lora.safetensors").read_bytes()


def test_a_run_is_not_resumed_with_other_settings(pipe, images, tmp_path):
    output = tmp_path / "lora.safetensors"
    run(pipe, images, output, steps=2)
    of_the_run = f"the run in {tmp_path / 'lora-training'}; use the same"
    for changed, error in (
        ({"rank": 2}, f"^rank is 2, but 4 for {of_the_run} rank"),
        ({"alpha": 8.0}, f"^alpha is 8.0, but not set for {of_the_run} alpha"),
        ({"extras": ("adaln",)}, rf"^--also \(extras in Python\) is adaln, but not set for {of_the_run} --also"),
        ({"warm_up": 1}, rf"^--warm-up \(warm_up in Python\) is 1, but 0 for {of_the_run} --warm-up"),
    ):
        with pytest.raises(RequestError, match=error):
            run(pipe, images, output, **changed)
    others = Path(shutil.copytree(images, tmp_path / "others"))
    (others / "0.txt").write_text("another [trigger]")
    with pytest.raises(RequestError, match=f"^the dataset differs from that of {of_the_run} dataset"):
        run(pipe, others, output)
    longer = run(pipe, images, output, steps=3)
    assert [event.step for event in longer if isinstance(event, Stepped)] == [3]


def test_a_run_that_has_more_steps_is_not_resumed_with_fewer_and_a_finished_one_writes_its_file_again(
    pipe, images, tmp_path
):
    output = tmp_path / "lora.safetensors"
    run(pipe, images, output, steps=3)
    content = output.read_bytes()
    with pytest.raises(RequestError, match=r"^steps is 2, but the run in .*lora-training has already finished 3; give"):
        run(pipe, images, output, steps=2)
    assert output.read_bytes() == content
    output.unlink()
    found = [event for event in run(pipe, images, output, steps=3) if isinstance(event, Measured | Stepped)]
    assert found == [Measured(0, 0.0)]
    assert output.read_bytes() == content


def test_a_lora_missing_when_a_run_stopped_is_written_when_it_is_resumed(pipe, images, tmp_path):
    run(pipe, images, tmp_path / "lora.safetensors", steps=2)
    file = tmp_path / "lora-training" / "lora-000002.safetensors"
    before = mx.load(str(file))
    mx.eval(before)
    file.unlink()
    events = run(pipe, images, tmp_path / "lora.safetensors", steps=4)
    assert Written(2, file) in events
    after = mx.load(str(file))
    assert after.keys() == before.keys() and all(mx.array_equal(after[name], before[name]) for name in before)


def test_previews_missing_when_a_run_stopped_are_generated_when_the_run_is_resumed(pipe, images, tmp_path):
    own, output = settings(steps=2), tmp_path / "lora.safetensors"
    dataset, prompts = read_dataset(images, 64, "sks"), ["a red circle", "a cat"]
    events = train(pipe, dataset, own, output, 2, prompts)
    found = [next(event.pixels for event in events if isinstance(event, Previewed))]
    events.close()  # before the second one
    (tmp_path / "lora-training" / "lora-000002.safetensors").unlink()
    record = Record(output)
    again = [event for event in train(pipe, dataset, own, output, 2, prompts) if isinstance(event, Previewed)]
    assert [event.index for event in again] == [0, 1] and np.array_equal(again[0].pixels, found[0])
    for event in again:
        record.preview(event)
    assert not any(isinstance(event, Previewed) for event in train(pipe, dataset, own, output, 2, prompts))


@pytest.mark.parametrize(
    "prompts, budget, error, said",
    [
        (["a cat", ""], 10**10, RequestError, "^preview '': the prompt is empty"),
        (
            ["a cat"],
            30 * 10**6,
            MemoryBudgetError,
            "previews do not fit in memory alongside what training already uses: 1",
        ),
    ],
)
def test_previews_that_cannot_be_generated_are_refused_before_training(images, tmp_path, prompts, budget, error, said):
    pocket = ZImagePipeline.from_pretrained(POCKET, dtype="float32", keep=False)
    pocket.budget = budget
    own = settings(resolution=512)
    with pytest.raises(error, match=said):
        list(train(pocket, read_dataset(images, 64, "sks"), own, tmp_path / "lora.safetensors", 2, prompts))
    assert not list(tmp_path.iterdir())
    assert pocket.budget == budget


def test_previews_are_generated_within_what_training_leaves_of_the_budget(pipe, monkeypatch):
    shown, seen, budget = Previews(pipe, ["a cat"], 64, 1000), [], pipe.budget
    monkeypatch.setattr(pipe, "plan", lambda request, loras: seen.append(pipe.budget))
    shown.check({}, {})
    monkeypatch.setattr(pipe, "load_lora", lambda path: "own")
    monkeypatch.setattr(pipe, "unload_lora", seen.append)
    monkeypatch.setattr(pipe, "stream", lambda request: iter([seen.append(pipe.budget)]))
    events = shown.generate(Path("lora.safetensors"), 2)
    next(events)
    events.close()  # in the middle
    assert seen == [budget - 1000, budget - 1000, "own"] and pipe.budget == budget


def test_a_preview_that_is_not_finite_is_named_and_says_how_to_go_on(pipe, images, tmp_path, monkeypatch):
    def fail(request):
        raise NumericsError("the latents are not finite")

    monkeypatch.setattr(pipe, "stream", fail)
    said = r"^preview 'a cat': the latents .*\. To go on without previews, run the same command again without --preview"
    events = train(pipe, read_dataset(images, 64, "sks"), settings(), tmp_path / "lora.safetensors", 2, ["a cat"])
    with pytest.raises(NumericsError, match=said):
        list(events)


@pytest.mark.parametrize("damage", ["a bit", "the number of steps", "the metadata", "the end"])
def test_a_damaged_state_is_refused(pipe, images, tmp_path, damage):
    output = tmp_path / "lora.safetensors"
    run(pipe, images, output, steps=2)
    state = tmp_path / "lora-training" / "state.safetensors"
    content = bytearray(state.read_bytes())
    if damage == "a bit":
        content[-2] ^= 0x40  # in the exponent of a number
    elif damage == "the end":
        del content[-5:]
    else:
        arrays, metadata = mx.load(str(state), return_metadata=True)
        mx.eval(arrays)
        changed = metadata | {"step": "-5"} if damage == "the number of steps" else {"step": "2", "run": "[]"}
        mx.save_safetensors(str(tmp_path / "other.safetensors"), arrays, changed)
        content = (tmp_path / "other.safetensors").read_bytes()
    state.write_bytes(content)
    said = r"state\.safetensors is damaged .*; to start again, delete .*lora-training, and the LoRA next to it"
    with pytest.raises(CheckpointError, match=said):
        run(pipe, images, output, steps=4)


def test_a_lora_that_is_not_finite_is_not_written(pipe, images, tmp_path):
    said = r"^the LoRA is not finite after step 1; start again with a lower rate or alpha, or in float32, and with ano"
    with pytest.raises(NumericsError, match=said):
        run(pipe, images, tmp_path / "lora.safetensors", steps=1, rate=1e38)
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"encoded"}


def test_the_folder_of_a_run_is_not_that_of_its_images(pipe, images, tmp_path):
    others = Path(shutil.copytree(images, tmp_path / "dog-training"))
    with pytest.raises(RequestError, match=r"^the images are in .*dog-training, the folder for this run's own files;"):
        run(pipe, others, tmp_path / "dog.safetensors")
    assert sorted(others.iterdir()) == sorted(others / file.name for file in images.iterdir())


def test_what_a_killed_run_left_behind_is_removed(pipe, images, tmp_path):
    left = tmp_path / "lora-training" / ".mlx-zimage-0123456789abcdef.safetensors"
    left.parent.mkdir()
    left.touch()
    run(pipe, images, tmp_path / "lora.safetensors", steps=1)
    assert not left.exists()


def test_previews_have_the_trigger_word(pipe, images, tmp_path, watch):
    prompts = watch(Previews, "_request")
    list(
        train(pipe, read_dataset(images, 64, "sks"), settings(steps=1), tmp_path / "a.safetensors", 1, ["a [trigger]"])
    )
    assert {request.prompt for request in prompts} == {"a sks"}


def test_a_caption_that_is_not_unicode_is_refused_by_name(pipe, images, tmp_path):
    first, *others = read_dataset(images, 64, "sks")
    with pytest.raises(RequestError, match=r"^the caption of .*0\.png is not valid Unicode at character 2"):
        list(train(pipe, [replace(first, caption="a \udcff"), *others], settings(), tmp_path / "lora.safetensors"))


def test_nothing_to_train_on_and_never_saving_are_refused(pipe, images, tmp_path):
    with pytest.raises(RequestError, match="there are no examples"):
        list(train(pipe, [], settings(), tmp_path / "lora.safetensors"))
    with pytest.raises(RequestError, match="save_every must be a whole number from 1"):
        list(train(pipe, read_dataset(images, 64, "sks"), settings(), tmp_path / "lora.safetensors", 0))


@pytest.mark.parametrize("rank", [2, 40])
def test_previews_need_as_much_as_was_checked_with_an_adapter(pipe, images, tmp_path, rank, monkeypatch):
    adapter = tmp_path / "adapter.safetensors"
    down, up = mx.random.normal((24, 48), key=mx.random.key(0)), mx.random.normal((48, 24), key=mx.random.key(1))
    layers = [f"diffusion_model.layers.{i}.attention.{name}" for i in range(2) for name in ("to_q", "to_k", "to_v")]
    tensors = [{f"{layer}.lora_A.weight": down + 0, f"{layer}.lora_B.weight": up + 0} for layer in layers]
    mx.save_safetensors(str(adapter), {name: array for own in tensors for name, array in own.items()})
    needed, plan = [], pipe.networks.plan

    def recorded(*args, **options):
        found = plan(*args, **options)
        needed.append(found.room)
        return found

    monkeypatch.setattr(pipe.networks, "plan", recorded)
    own = settings(steps=2, rank=rank)
    events = train(pipe, read_dataset(images, 64, "sks"), own, tmp_path / "lora.safetensors", 2, ["a cat"], adapter)
    for event in events:
        if isinstance(event, Planned):
            checked = needed.pop()
    assert needed[-1] == checked


@pytest.mark.parametrize("keep", [None, True])
def test_only_the_transformer_is_in_memory_during_steps(pipe, images, tmp_path, keep):
    pipe.keep = keep
    pipe("a fox", width=32, height=32, num_inference_steps=1)
    others = [pipe.networks.runners[name] for name in ("text_encoder", "vae")]
    assert all(runner._kept for runner in others)
    own, examples = settings(steps=4), read_dataset(images, 64, "sks")
    for event in train(pipe, examples, own, tmp_path / "lora.safetensors", 2, ["a red circle"]):
        if isinstance(event, Stepped):
            assert not any(runner._kept for runner in others)


def test_captions_are_encoded_and_previews_generated_without_the_loras_of_the_pipeline(pipe, images, tmp_path):
    key = "text_encoder.model.layers.0.self_attn.q_proj"
    wide, narrow = pipe.checkpoint.text_encoder.shapes["model.layers.0.self_attn.q_proj.weight"]
    lora = {f"{key}.lora_A.weight": mx.ones((2, narrow)), f"{key}.lora_B.weight": mx.ones((wide, 2))}
    mx.save_safetensors(str(tmp_path / "other.safetensors"), lora)
    own, examples = settings(steps=2), read_dataset(images, 64, "sks")

    def results(name: str) -> list:
        events = list(train(pipe, examples, own, tmp_path / name, 2, ["a cat"]))
        losses = [event.loss for event in events if isinstance(event, Stepped)]
        return [*losses, *(event.pixels.tolist() for event in events if isinstance(event, Previewed))]

    plain = results("plain.safetensors")
    name = pipe.load_lora(tmp_path / "other.safetensors")
    changed = pipe("a cat", width=64, height=64, seed=0, output_type="np").images[0]
    assert results("lora.safetensors") == plain
    pipe.unload_lora(name)
    without = pipe("a cat", width=64, height=64, seed=0, output_type="np").images[0]
    assert not np.array_equal(changed, without)


def test_an_image_that_changes_before_it_is_encoded_is_refused(pipe, images, tmp_path):
    others = Path(shutil.copytree(images, tmp_path / "others"))
    examples = read_dataset(others, 64, "sks")
    Image.new("RGB", (32, 32)).save(others / "2.png")
    with pytest.raises(RequestError, match=r"2\.png was changed after it was read; run the same command again"):
        list(train(pipe, examples, settings(), tmp_path / "lora.safetensors"))


def test_encoding_is_planned_beside_the_state_that_a_run_resumes_from(pipe, images, tmp_path, monkeypatch):
    budgets, plan = [], pipe.planner.plan

    def recorded(work, budget, keep=None):
        budgets.append(budget)
        return plan(work, budget, keep)

    monkeypatch.setattr(pipe.planner, "plan", recorded)
    run(pipe, images, tmp_path / "lora.safetensors", steps=2)
    count = sum(array.size for array in arrays_of(new_factors(pipe.transformer.config, 4, (), 0)))
    assert budgets == [pipe.budget - 12 * count]


def test_a_run_is_not_started_by_two_processes_at_once(pipe, images, tmp_path):
    output = tmp_path / "lora.safetensors"
    (tmp_path / "lora-training").mkdir()
    with (
        FileLock(tmp_path / "lora-training" / ".lock"),  # as another process has it
        pytest.raises(LockedError, match=r"lora\.safetensors is being trained already; wait for that run, stop it, or"),
    ):
        run(pipe, images, output)
    left = train(pipe, read_dataset(images, 64, "sks"), settings(), output)
    next(left)
    run(pipe, images, output)


def test_a_disk_without_locks_can_be_trained_on(pipe, images, tmp_path, monkeypatch):
    lock = Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr("fcntl.flock", lock)
    run(pipe, images, tmp_path / "lora.safetensors", steps=1)
    assert lock.called


def test_a_request_while_captions_are_encoded_ends_the_run(pipe, images, tmp_path):
    with pytest.raises(RequestError, match="a later request on this pipeline has ended this one"):
        for event in train(pipe, read_dataset(images, 64, "sks"), settings(), tmp_path / "lora.safetensors"):
            if isinstance(event, Phase):
                pipe("a cat", width=32, height=32, num_inference_steps=1)


def test_an_adapter_that_was_loaded_before_stays_loaded(pipe, images, tmp_path):
    run(pipe, images, tmp_path / "adapter.safetensors", steps=1, rate=0.1)
    given = {"width": 32, "height": 32, "num_inference_steps": 1, "seed": 0, "output_type": "np"}
    pipe.load_lora(tmp_path / "adapter.safetensors")
    before = pipe("a cat", **given).images
    examples = read_dataset(images, 64, "sks")
    list(train(pipe, examples, settings(steps=1), tmp_path / "a.safetensors", adapter=tmp_path / "adapter.safetensors"))
    assert np.array_equal(pipe("a cat", **given).images, before)


def test_an_output_of_another_type_is_refused(pipe, images, tmp_path):
    with pytest.raises(RequestError, match=r"the output must be a \.safetensors file, got .*lora"):
        run(pipe, images, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_images_are_no_larger_than_the_resolution_of_the_settings(pipe, tmp_path, watch):
    for i in range(2):
        Image.new("RGB", (128, 64)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a cat")
    latents = watch(loop, "sample")
    own = Settings(steps=1, rank=4, resolution=64)
    list(train(pipe, read_dataset(tmp_path, 512), own, tmp_path / "lora.safetensors"))
    assert {one.latents.shape[1:3] for one in latents} == {(6, 10)}  # of 80x48 pixels


def test_the_time_of_a_step_is_that_of_an_average_image(pipe, images, tmp_path, monkeypatch):
    now = 0.0

    def gradients(self, factors, sample):
        nonlocal now
        now += 1 + sample.latents.size  # seconds
        return mx.zeros(()), {}

    monkeypatch.setattr("mlx_zimage.train.loop.Gradients.__call__", gradients)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    events = train(pipe, read_dataset(images, 64, "sks"), settings(), tmp_path / "lora.safetensors")
    measured = next(event for event in events if isinstance(event, Measured))
    assert measured.step_s == 1 + 16 * (4 * 4 + 4 * 6) / 2  # values of latents


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_encoded(pipe, images, tmp_path):
    (tmp_path / "lora-training").write_text("")
    with pytest.raises(OutputError, match=r"^could not write .*lora-training: .*; fix that, and run the same"):
        run(pipe, images, tmp_path / "lora.safetensors")


def test_a_disk_that_is_too_full_is_refused_before_anything_is_encoded(pipe, images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Mock(free=1000))
    with pytest.raises(OutputError, match=r"^training writes up to .* next to .*, but only .* --save-every$"):
        run(pipe, images, tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())
    # what machines write that do not lead
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Mock(free=10**5))
    of_follower = Run(pipe, read_dataset(images, 64, "sks"), settings(), tmp_path / "lora.safetensors")
    _check_space(of_follower, 10**5, 10, 2, leads=False)
    with pytest.raises(OutputError, match="--save-every"):
        _check_space(of_follower, 10**5, 10, 2, leads=True)


def test_a_caption_that_is_longer_than_the_model_reads_is_refused_by_name(pipe, images, tmp_path):
    others = Path(shutil.copytree(images, tmp_path / "others"))
    (others / "2.txt").write_text("[trigger] " + "red " * 600)
    with pytest.raises(RequestError, match=r"^the caption of .*2\.png has \d+ tokens, but the model reads only 512"):
        run(pipe, others, tmp_path / "lora.safetensors")


def test_float16_is_refused_since_gradients_exceed_its_range(images, tmp_path, tiny_folder):
    narrow = ZImagePipeline.from_pretrained(tiny_folder, dtype="float16")
    with pytest.raises(RequestError, match="train in bfloat16 or float32"):
        run(narrow, images, tmp_path / "lora.safetensors")


def test_nothing_is_encoded_again_and_the_encoders_are_unloaded(pipe, images, tmp_path, tiny_folder):
    output = tmp_path / "lora.safetensors"
    first = [event for event in run(pipe, images, output, steps=1) if isinstance(event, Phase)]
    assert {phase.name for phase in first} == {"captions", "images"}
    assert not pipe.networks.runners["vae"]._kept and not pipe.networks.runners["text_encoder"]._kept
    again = ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")
    assert not any(isinstance(event, Phase) for event in run(again, images, output, steps=2))


def test_the_file_is_used_like_any_other_lora_and_says_how_it_was_made(pipe, images, tmp_path):
    output = tmp_path / "lora.safetensors"
    run(pipe, images, output, rate=0.03, alpha=8.0, extras=("adaln", "refiners"))
    metadata = read_metadata(output)
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert json.loads(metadata["mlx_zimage.settings"])["alpha"] == 8.0
    assert json.loads(metadata["mlx_zimage.settings"])["dtype"] == "float32"
    assert len(metadata["mlx_zimage.base_sha256"]) == 64
    request = GenerateRequest("sks number 1", width=32, height=32, seed=0, steps=2)
    (*_, plain) = pipe.stream(request)
    pipe.load_lora(output)
    (*_, adapted) = pipe.stream(request)
    assert np.abs(adapted.unit - plain.unit).max() > 0.01


def test_an_adapter_takes_part_in_training_and_not_in_previews(pipe, images, tmp_path):
    adapter = tmp_path / "adapter.safetensors"
    down, up = mx.random.normal((4, 48), key=mx.random.key(0)), mx.random.normal((48, 4), key=mx.random.key(1))
    layer = "diffusion_model.layers.1.attention.to_v"
    mx.save_safetensors(str(adapter), {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
    examples = read_dataset(images, 64, "sks")
    own = settings(steps=2, rate=1e-30, decay=0.0)  # factors that stay as they are

    def events(name, **given):
        return list(train(pipe, examples, own, tmp_path / name, 2, ["a fox"], **given))

    without, with_it = events("without.safetensors"), events("with.safetensors", adapter=adapter)
    begun = train(pipe, examples, own, tmp_path / "begun.safetensors", adapter=adapter)
    next(begun)
    assert pipe.networks.overlays["transformer"]._deltas
    begun.close()
    assert not pipe.networks.overlays["transformer"]._deltas
    losses = [[e.loss for e in found if isinstance(e, Stepped)] for found in (without, with_it)]
    previews = [[e.pixels for e in found if isinstance(e, Previewed)] for found in (without, with_it)]
    assert losses[0] != losses[1]
    with pytest.raises(ModelNotFoundError, match="to train without an adapter, leave it out"):
        events("other.safetensors", adapter=tmp_path / "none.safetensors")
    assert np.array_equal(previews[0], previews[1])
    with pytest.raises(RequestError, match="the adapter differs from that of the run in"):
        events("with.safetensors")
    plain = pipe(prompt="a fox", width=64, height=64, seed=0, output_type="np").images[0]
    assert np.array_equal(np.round(plain * 255).astype(np.uint8), previews[0][0])


def test_steps_reduce_the_loss(pipe, images, tmp_path):
    """The tiny model is random, so all that it can learn is to output less."""
    events = run(pipe, images, tmp_path / "lora.safetensors", steps=24, rank=16, rate=0.03, objective="uniform")
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])


@pytest.mark.slow
def test_four_images_are_learned_to_a_tenth_of_the_loss(tmp_path):
    """Plain colours that pocket does not know, with captions that mean something else to it."""
    folder = tmp_path / "images"
    folder.mkdir()
    known = {"a red circle": "teal", "a blue star": "sienna", "a green square": "khaki", "a black ring": "slategray"}
    for i, (caption, color) in enumerate(known.items()):
        Image.new("RGB", (64, 64), color).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    own = Settings(200, 16, rate=3e-3, warm_up=20, dropout=0.0, objective="logit-normal", extras=("adaln", "refiners"))
    pocket = ZImagePipeline.from_pretrained(POCKET, dtype="float32", keep=False)
    events = train(pocket, read_dataset(folder, 64), own, tmp_path / "lora.safetensors", save_every=200)
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:8])


def test_a_rank_larger_than_a_matrix_is_refused_before_anything_is_encoded(pipe, images, tmp_path):
    with pytest.raises(RequestError, match=r"rank must be from 1 to 48, .* got 49"):
        run(pipe, images, tmp_path / "lora.safetensors", rank=49)
    assert not list(tmp_path.iterdir())


def test_a_rank_whose_lora_would_be_refused_is_refused_before_training():
    config = ZImagePipeline.from_pretrained(POCKET, dtype="float32").transformer.config
    with pytest.raises(RequestError, match=r"^a LoRA of rank 192 would have [\d,]+ values, more than the whole"):
        new_factors(config, 192, ("adaln", "refiners"), 0)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"steps": 0}, "steps must be"),
        ({"rate": float("nan")}, "rate must be"),
        ({"dropout": 2}, "dropout must be"),
        ({"objective": "sideways"}, "objective must be"),
        ({"extras": ("vae",)}, "extras must be"),
        ({"resolution": 100}, "resolution must be"),
        ({"resolution": "64"}, "resolution must be"),
        ({"rate": "1"}, "rate must be"),
        ({"dropout": True}, "dropout must be"),
        ({"trigger": 3}, "trigger must be"),
        ({"clip": None}, "clip must be"),
        ({"rate": 10**400}, "rate must be"),
        ({"extras": 3}, "extras must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"accumulate": 10**20}, "accumulate must be a whole number from 1 to 2147483647"),
    ],
)
def test_wrong_settings_are_refused(changed, said):
    with pytest.raises(RequestError, match=said):
        settings(**changed)


# ---- noise levels


def test_every_example_is_drawn_as_often_as_it_is_repeated():
    order, shapes = [0, 1, 1, 2], [(1, 2, 2, 4)] * 3
    drawn = [objective.draw(3, i, order, shapes, "uniform", 0.0).example for i in range(40)]
    for start in range(0, 40, 4):
        assert sorted(drawn[start : start + 4]) == order
    assert len({tuple(drawn[start : start + 4]) for start in range(0, 40, 4)}) > 2  # shuffled anew


@pytest.mark.parametrize("name, mean", [("weighted", 0.5005), ("uniform", 0.5), ("logit-normal", 0.64)])
def test_noise_levels_have_their_distribution(name, mean):
    random = np.random.default_rng(0)
    sigmas, weights = np.array([objective.level(name, random) for _ in range(20000)]).T
    assert sigmas.min() >= 0 and sigmas.max() <= 1
    assert sigmas.mean() == pytest.approx(mean, abs=0.008)  # 4 standard errors
    assert weights.mean() == pytest.approx(1, abs=0.01)


def test_a_draw_depends_on_its_number_alone():
    given = [0, 1, 2], [(1, 4, 4, 16)] * 3, "weighted", 0.5
    first, second = (objective.draw(1, 7, *given) for _ in range(2))
    assert mx.array_equal(mx.array(first.noise), mx.array(second.noise)) and first.sigma == second.sigma
    assert not np.array_equal(first.noise, objective.draw(1, 8, *given).noise)
