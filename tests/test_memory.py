"""Memory plans: measured peaks stay within them, and images do not depend on them."""

import gc
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from lanes import slow
from mlx.utils import tree_flatten

from mlx_zimage import GenerateRequest, MemoryBudgetError, RequestError, ZImagePipeline, bounds, machine
from mlx_zimage.cli import main
from mlx_zimage.dtypes import FLOATS
from mlx_zimage.machine import backend
from mlx_zimage.memory import Planner, Workload
from mlx_zimage.models.layers import sum_dtype
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.sampling import Step
from mlx_zimage.sizes import counted, parse_memory
from mlx_zimage.weights.blocks import READS_AHEAD, Blocks
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.component import READERS, Component


@pytest.fixture(scope="module")
def planner():
    return Planner(open_checkpoint("pocket"), mx.float32)


def request(**values) -> GenerateRequest:
    settings = {"prompt": "a red circle", "width": 128, "height": 128, "seed": 1, "steps": 2}
    return GenerateRequest(**settings | values)


def generate(memory: str | int, dtype: str = "float32", **values) -> tuple[np.ndarray, np.ndarray, int, int]:
    """A request's latents and pixels, the measured peak, and the planned bound."""
    pipe = ZImagePipeline.from_pretrained("pocket", dtype=dtype, memory=memory)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for event in pipe.stream(request(**values)):
        if isinstance(event, Step):
            latents = np.array(event.latents)
    return latents, event.pixels, mx.get_peak_memory() - before, pipe.plan(request(**values)).room


def smallest(planner: Planner, width: int = 128, height: int = 128, tokens: int = 20) -> int:
    """The smallest budget for which there is a plan, found by bisection."""
    low, high = 1, 10**12
    while high - low > 1000:
        middle = (low + high) // 2
        try:
            planner.plan(Workload(width, height, 1, tokens, 8), middle)
            high = middle
        except MemoryBudgetError:
            low = middle
    return high


@pytest.mark.parametrize(
    ("memory", "values"),
    [
        ("1GB", {"width": 64, "height": 64}),
        slow("1GB", {}),
        slow("40MB", {}),
        slow("25MB", {}),
        slow("20MB", {"width": 64, "height": 64}),
        slow("1GB", {"width": 192, "height": 128}),
        slow("40MB", {"width": 192, "height": 128}),
        slow("15MB", {"width": 96, "height": 64}),
        slow("100MB", {"num_images": 2}),
        slow("30MB", {"num_images": 2}),
        slow("40MB", {"num_images": 2, "width": 64, "height": 64}),
        slow("12MB", {"num_images": 2, "width": 48, "height": 48}),
        slow("100MB", {"prompt": "a star " * 80}),
        slow("100MB", {"prompt": "a star " * 80, "width": 16, "height": 16}),
        slow("60MB", {"steps": 100, "width": 16, "height": 16}),
        ("30MB", {"steps": 10, "width": 16, "height": 16}),
        slow("35MB", {"width": 2048, "height": 16}),
        slow("22MB", {"width": 1008, "height": 16}),
        slow("14MB", {"width": 16, "height": 1008}),
        slow("13MB", {"width": 256, "height": 16}),
        slow("13MB", {"width": 16, "height": 512}),
        slow("19MB", {"dtype": "bfloat16"}),
        ("11MB", {"dtype": "bfloat16", "width": 64, "height": 64}),
        slow("15MB", {"dtype": "bfloat16", "width": 512, "height": 16}),
        slow("45MB", {"dtype": "bfloat16", "width": 256}),
    ],
)
def test_the_measured_peak_stays_within_the_plan_and_the_budget(memory, values):
    *_, measured, planned = generate(memory, **values)
    assert measured <= planned <= parse_memory(memory)


def test_streaming_gives_the_same_bits_as_resident_weights(planner):
    # so small that weights take more than the work
    resident = planner.plan(Workload(48, 48, 1, 20, 8), 10**10)
    tight = smallest(planner, 48, 48) * 11 // 10
    streamed = planner.plan(Workload(48, 48, 1, 20, 8), tight)
    assert resident.keep and not resident.streamed
    assert streamed.streamed and not streamed.keep
    latents, pixels, *_ = generate(10**10, width=48, height=48)
    streamed_latents, streamed_pixels, measured, _ = generate(tight, width=48, height=48)
    assert measured <= tight
    assert np.array_equal(latents, streamed_latents)
    assert_hardly_differ(pixels, streamed_pixels)


@pytest.mark.metal
@pytest.mark.parametrize("dtype", FLOATS)
def test_streaming_every_block_gives_the_same_bits_in_every_dtype(monkeypatch, dtype):
    """Whatever fits in this machine's memory: the plan is made to stream."""
    request = GenerateRequest("a red circle", 48, 48, seed=1, steps=2)
    pipe = ZImagePipeline.from_pretrained("pocket", dtype=dtype)
    plan = pipe.plan(request)
    assert not plan.streamed
    kept = [step.latents for step in pipe.denoise(request)]
    blocks = frozenset(name for runner in pipe.networks.runners.values() for name in runner.weights.config.blocks)
    monkeypatch.setattr(pipe.networks, "plan", lambda *_: replace(plan, keep=False, streamed=blocks))
    streamed = [step.latents for step in pipe.denoise(request)]
    assert all(mx.array_equal(*pair) for pair in zip(kept, streamed, strict=True))


@pytest.mark.parametrize(
    ("size", "strips"), [((6, 8), (2**18, 2**16, 2**14)), slow((24, 40), (2**20, 2**18, 2**16))], ids=str
)
def test_decoding_in_strips_changes_only_the_products_last_bits(on_cpu, size, strips):
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32")
    latents = mx.random.normal((*size, 16), key=mx.random.key(5))
    whole = pipe.decode(latents)
    for strip_bytes in strips:
        pipe.vae.strip_bytes = strip_bytes
        assert_hardly_differ(whole, pipe.decode(latents))


def assert_hardly_differ(pixels: np.ndarray, others: np.ndarray) -> None:
    """Statistics do not depend on strips; only products may, since some BLAS sum in another order for few rows."""
    differences = np.abs(pixels.astype(int) - others)
    assert differences.max() <= 1 and differences.mean() < 1e-4


def test_the_caller_decides_whether_the_model_stays_in_memory(planner):
    work = 48, 48, 1, 20, 8
    assert planner.plan(Workload(*work), 10**10).keep
    staged = planner.plan(Workload(*work), 10**10, keep=False)
    assert not staged.keep and not staged.streamed
    kept = planner.plan(Workload(*work), 10**10, keep=True).peak
    weights = sum(planner.footprints[name].total for name in ("text_encoder", "transformer"))
    for budget in (10**6, staged.peak, weights):
        with pytest.raises(
            MemoryBudgetError, match=r"with the model kept in memory: .* let networks be unloaded after use, or convert"
        ):
            planner.plan(Workload(*work), budget, keep=True)
    assert planner.plan(Workload(*work), kept, keep=True).keep


def test_leaving_a_staged_run_frees_its_memory():
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", keep=False)
    before = mx.get_active_memory()
    for _ in pipe.denoise(request(width=48, height=48)):
        during = mx.get_active_memory() - before
        break
    weights = sum(pipe.planner.footprints["transformer"].blocks.values())
    assert during > weights
    assert mx.get_active_memory() - before < weights / 4, "the schedule's modulations and the prompt's embeddings stay"


@pytest.mark.parametrize(("keep", "lean"), [(True, False), (True, True), (False, False)])
def test_encoding_waits_for_each_layer_when_memory_is_scarce(keep, lean, planner, monkeypatch):
    walk, waits = Blocks.walk, []

    def noted(self, *args, wait=False, **kwargs):
        if self.weights.name == "text_encoder":
            waits.append(wait)
        return walk(self, *args, wait=wait, **kwargs)

    monkeypatch.setattr(Blocks, "walk", noted)
    small = request(width=16, height=16, steps=1)
    tokens = len(ZImagePipeline.from_pretrained("pocket").tokenize(small.prompt))
    work = Workload(16, 16, 1, tokens, 1)
    # the smallest budget that allows such a plan, whose blocks then have to be lean
    budget = planner.best(work, 1, keep).room if lean else 10**10
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", memory=budget, keep=keep)
    assert pipe.plan(small).lean == lean
    list(pipe.denoise(small))
    assert waits == [lean or not keep]


@pytest.mark.parametrize(("prompts", "words", "budget"), [(12, 100, None), slow(40, 450, 25 * 10**6)])
def test_cached_prompts_stay_within_the_budget(planner, prompts, words, budget):
    settings = {"width": 16, "height": 16, "steps": 1}
    requests = [request(prompt=f"{n}" + " star" * words, **settings) for n in range(prompts)]
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32")
    tokens = max(len(pipe.tokenize(one.prompt)) for one in requests)
    budget = budget or smallest(planner, 16, 16, tokens) + 5 * tokens * pipe.transformer.config.cap_feat_dim * 4
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", memory=budget)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for one in requests:
        list(pipe.denoise(one))
    # at most 32 are cached, however much memory is left
    assert 1 < len(pipe.networks._embeddings) < min(prompts, 32), "as many as fit"
    assert mx.get_peak_memory() - before <= budget
    assert pipe.networks._remembered <= budget - pipe.plan(requests[-1]).room


@pytest.mark.parametrize(("steps", "share"), [(15, 1 / 10), slow(500, 1 / 10)])
def test_a_schedule_is_dropped_with_a_staged_model(steps, share):
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", keep=False)
    before = mx.get_active_memory()
    list(pipe.denoise(request(width=16, height=16, steps=steps)))
    mx.clear_cache()
    assert mx.get_active_memory() - before < pipe.planner.modulations(steps) * share


def test_one_schedule_is_cached_at_a_time():
    settings = {"prompt": "a", "width": 16, "height": 16}
    budget = (
        ZImagePipeline.from_pretrained("pocket", dtype="float32", keep=True).plan(request(steps=400, **settings)).room
    )
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", keep=True, memory=budget)
    mx.clear_cache()
    before = mx.get_active_memory()
    for steps in (400, 399):
        next(pipe.denoise(request(steps=steps, **settings)))
    mx.reset_peak_memory()
    next(pipe.denoise(request(steps=400, **settings)))
    assert mx.get_peak_memory() - before <= budget


def test_deleting_a_pipeline_frees_its_weights():
    before = mx.get_active_memory()
    gc.disable()  # must not depend on the cycle collector
    try:
        pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", keep=True)
        for _ in pipe.denoise(request(width=16, height=16, steps=1)):
            during = mx.get_active_memory() - before
        weights = sum(pipe.planner.footprints["transformer"].blocks.values())
        del pipe, _
        assert mx.get_active_memory() - before < weights / 4 < during
    finally:
        gc.enable()


def limits(calls: list) -> list:
    return [call for call in calls if call != "synchronize"]


@pytest.mark.parametrize("keep", [True, False])
def test_only_resident_weights_are_wired_and_only_during_the_steps(monkeypatch, keep):
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", keep=keep, wired=True)
    calls = []
    monkeypatch.setattr(machine, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": 10**9})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: calls.append(limit) or 7)
    monkeypatch.setattr(mx, "synchronize", lambda: calls.append("synchronize"))
    for step in pipe.denoise(request(width=48, height=48)):
        if step.index == 0:
            runners = [pipe.networks.runners[name] for name in ["transformer"] + ["text_encoder"] * keep]
            blocks = (block for runner in runners for key, block in runner._kept.items() if "." in key)
            staying = sum(array.nbytes for block in blocks for _, array in tree_flatten(block))
            assert limits(calls) == [staying]
            break
    assert limits(calls) == [staying, 7] and calls[-2:] == ["synchronize", 7]
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": 1000})
    list(pipe.denoise(request(width=48, height=48, steps=1)))
    assert limits(calls)[2:] == [1000, 7]


# Peaks above the weights in MB, for the full-size model with random weights on an H100: for a call of the transformer
# with a caption of 96 tokens, by images, side, and whether it was lean; for decoding, by side and bytes per strip.
# Memory that the GPU freed late is not included (see Way.late).
DENOISED = {
    mx.bfloat16: {(1, 1024, True): 333, (1, 2048, True): 1308, (1, 1024, False): 1058, (4, 512, False): 1126},
    mx.float16: {(1, 1024, True): 558, (1, 2048, True): 2194, (1, 1024, False): 1638, (4, 512, False): 1745},
    mx.float32: {(1, 1024, True): 3013, (1, 512, True): 392, (1, 1024, False): 3486, (4, 256, False): 584},
}
DECODED = {
    mx.bfloat16: {(1024, None): 3630, (2048, 2**24): 2202, (1024, 2**22): 551, (2048, 2**20): 1175},
    mx.float32: {(1024, None): 4039, (2048, 2**24): 3627, (1024, 2**22): 908, (2048, 2**20): 2249},
}
DECODED[mx.float16] = DECODED[mx.float32]  # its VAE's dtype


@pytest.mark.parametrize("dtype", DENOISED)
def test_the_gpus_bounds_cover_what_was_measured_in_each_dtype(planner, monkeypatch, dtype):
    transformer, vae = SimpleNamespace(config=TransformerConfig()), SimpleNamespace(config=VAEConfig())
    monkeypatch.setattr(planner, "checkpoint", SimpleNamespace(transformer=transformer, vae=vae))
    monkeypatch.setattr(planner, "bounds", bounds.GPU[dtype])
    monkeypatch.setattr(planner, "vae_dtype", sum_dtype(dtype))
    dense = replace(planner.footprints["transformer"], unpacked=0)
    monkeypatch.setattr(planner, "footprints", planner.footprints | {"transformer": dense})
    found = [
        (planner.denoise_work(Workload(side, side, images, 96, 8), lean), measured)
        for (images, side, lean), measured in DENOISED[dtype].items()
    ] + [(planner.decode_work(side, side, strip), measured) for (side, strip), measured in DECODED[dtype].items()]
    for bound, measured in found:
        assert measured <= bound / 1e6 <= 1.25 * measured


def test_blocks_are_not_streamed_if_waiting_is_enough(planner, monkeypatch):
    monkeypatch.setattr(planner, "bounds", bounds.GPU[mx.bfloat16])
    work = 128, 128, 1, 20, 8
    staged = planner.plan(Workload(*work), 10**10, keep=False)
    late, held = staged.rooms["denoise"], staged.peaks["denoise"]
    assert not staged.lean and late > held, "a GPU may free memory late"
    waiting = planner.plan(Workload(*work), late - 1, keep=False)
    assert waiting.lean and not waiting.streamed
    assert waiting.rooms["denoise"] == waiting.peaks["denoise"] < held


def test_a_backend_that_cannot_read_ahead_holds_one_block_and_gives_the_same_image(on_cpu, monkeypatch):
    planner = Planner(open_checkpoint("pocket"), mx.float32)
    tight = smallest(planner, 48, 48) * 11 // 10
    ahead, *_ = generate(tight, width=48, height=48)
    both = planner.footprints["transformer"].moving
    monkeypatch.setitem(READS_AHEAD, backend(), False)
    assert planner.footprints["transformer"].moving == both // 2
    one = smallest(planner, 48, 48) * 11 // 10
    in_turn, _, measured, planned = generate(one, width=48, height=48)
    assert one < tight and measured <= planned <= one
    assert np.array_equal(ahead, in_turn)


@pytest.mark.parametrize(("side", "tenths"), [(48, 14), slow(128, 12)])
@pytest.mark.parametrize("room", [slow("all"), "some"])
def test_without_reading_ahead_several_threads_read_what_is_kept_and_the_caller_the_rest(
    room, side, tenths, planner, monkeypatch
):
    size = {"width": side, "height": side}
    expected, *_ = generate("1GB", **size)
    monkeypatch.setitem(READS_AHEAD, backend(), False)
    budget = 10**9 if room == "all" else smallest(planner, side, side) * tenths // 10
    read, threads = Component.read, {}

    def noted(self, prefix, *args, **kwargs):
        threads.setdefault((self.name, prefix), []).append(threading.current_thread().name)
        return read(self, prefix, *args, **kwargs)

    monkeypatch.setattr(Component, "read", noted)
    latents, _, measured, planned = generate(budget, **size)
    assert np.array_equal(latents, expected)
    assert measured <= planned
    blocks = set(planner.footprints["transformer"].blocks)
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", memory=budget)
    streamed = blocks & pipe.plan(request(**size)).streamed
    assert (0 < len(streamed) < len(blocks)) == (room == "some") and (not streamed) == (room == "all")
    for block in blocks - streamed:
        (thread,) = threads["transformer", block]  # once, however many steps
        assert thread.startswith("mlx-zimage-reader")
    for block in streamed:
        assert set(threads["transformer", block]) == {"MainThread"}


@pytest.mark.parametrize("side", [48, slow(128)])
def test_an_error_in_a_reading_thread_reaches_the_caller_and_nothing_is_kept(side, monkeypatch):
    asked = request(width=side, height=side)
    monkeypatch.setitem(READS_AHEAD, backend(), False)
    pipe = ZImagePipeline.from_pretrained("pocket", memory="1GB")
    expected = list(pipe.stream(asked))[-1].pixels
    pipe = ZImagePipeline.from_pretrained("pocket", memory="1GB")
    read, failing = Component.read, ["layers.3"]

    def fails_once(self, prefix, *args, **kwargs):
        if prefix in failing:
            failing.remove(prefix)
            raise OSError("the disk is gone")
        return read(self, prefix, *args, **kwargs)

    monkeypatch.setattr(Component, "read", fails_once)
    with pytest.raises(OSError, match="the disk is gone"):
        list(pipe.stream(asked))
    assert np.array_equal(list(pipe.stream(asked))[-1].pixels, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_for_reading_a_block_is_counted(dtype, on_cpu):
    checkpoint = open_checkpoint("pocket")
    network = Planner(checkpoint, getattr(mx, dtype)).footprints["transformer"]
    block = max(network.blocks, key=network.blocks.get)
    entries = [e for name, e in checkpoint.transformer.entries.items() if name.startswith(f"{block}.attention")]
    turned = [
        e for e in entries if ".to_q." in e.name or ".to_k." in e.name or ".norm_q." in e.name or ".norm_k." in e.name
    ]
    copies = sum(np.prod(e.shape) for e in turned) * getattr(mx, dtype).size
    stored = {entry.dtype for entry in entries}
    assert stored == {"BF16"}
    if dtype == "bfloat16":
        assert network.reading == copies
    else:
        assert network.reading == copies + network.blocks[block] // 2, "half the bytes on disk"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_for_several_readers_is_counted(dtype, monkeypatch):
    monkeypatch.setitem(READS_AHEAD, backend(), False)
    checkpoint, dtype = open_checkpoint("pocket"), getattr(mx, dtype)
    queries = checkpoint.transformer.entries["layers.0.attention.to_q.weight"]  # stored in bfloat16, in another layout
    network = Planner(checkpoint, dtype).footprints["transformer"]
    assert network.reading >= READERS * queries.nbytes * (1 if dtype == mx.bfloat16 else 3)
    blocks = list(network.blocks)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    read = list(checkpoint.transformer.read_all(blocks, dtype, "adaLN_modulation"))
    beside = mx.get_peak_memory() - mx.get_active_memory()
    assert len(read) == len(blocks) and mx.get_active_memory() - before >= sum(network.blocks.values())
    assert beside <= network.reading


def test_more_budget_never_makes_a_slower_plan(planner):
    budgets = [smallest(planner) * factor // 4 for factor in range(5, 60)]
    plans = [planner.plan(Workload(128, 128, 1, 20, 8), budget) for budget in budgets]
    order = [(plan.keep, -len(plan.streamed), -plan.lean) for plan in plans]
    assert order == sorted(order)


def test_a_refusal_names_the_smallest_budget_and_the_largest_size_that_work(planner):
    with pytest.raises(MemoryBudgetError) as refusal:
        planner.plan(Workload(512, 256, 1, 20, 8), 30 * 10**6)
    assert refusal.value.exit_code == 5
    least, side = re.search(r"needs? at least ([\d.]+) MB, .* fits is (\d+)x", str(refusal.value)).groups()
    assert planner.plan(Workload(512, 256, 1, 20, 8), int(float(least) * 1e6))
    assert planner.plan(Workload(int(side), int(side), 1, 20, 8), 30 * 10**6)
    with pytest.raises(MemoryBudgetError):
        planner.plan(Workload(int(side) + 16, int(side) + 16, 1, 20, 8), 30 * 10**6)


def test_a_budget_that_no_size_fits_is_refused(planner):
    with pytest.raises(
        MemoryBudgetError, match=r"cannot be generated within 0\.01 MB: it needs at least .* no smaller size fits"
    ):
        planner.plan(Workload(128, 128, 1, 20, 8), 1000)


def test_only_one_of_a_thing_is_singular():
    assert [counted(count, "image") for count in (0, 1, 2)] == ["0 images", "1 image", "2 images"]


@pytest.mark.parametrize(
    ("images", "moves"), [(1, "raise the budget, or"), (2, "raise the budget, generate fewer images at once, or")]
)
def test_only_for_several_images_is_generating_fewer_at_once_suggested(planner, images, moves):
    with pytest.raises(MemoryBudgetError, match=f"; {moves} convert the model to fewer bits$"):
        planner.plan(Workload(128, 128, images, 20, 8), 1000)


def test_a_refused_request_reads_no_weights():
    pipe = ZImagePipeline.from_pretrained("pocket", memory="1MB")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with pytest.raises(MemoryBudgetError):
        list(pipe.stream(request()))
    assert mx.get_peak_memory() <= before, "not even noise is generated"


@pytest.mark.parametrize(
    ("text", "size"), [("6GB", 6 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8), (10**6, 10**6)]
)
def test_memory_sizes_are_parsed_in_the_usual_units(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "6", "lots", "-1GB", "0GB", 0, 6, True, 1.5])
def test_invalid_memory_sizes_are_refused(text):
    with pytest.raises(RequestError, match="memory must be a size such as 6GB"):
        parse_memory(text)


def test_plan_shows_what_stays_in_memory_and_what_is_streamed(planner):
    least = f"{smallest(planner, 48, 48, tokens=512) / 1e6 + 0.1:.1f}M"
    result = CliRunner().invoke(main, ["plan", "pocket", "--memory", "1GB"])
    assert result.exit_code == 0
    assert "1 image of 128x128, memory budget 1 GB" in result.stdout
    assert "kept in memory between images" in result.stdout
    result = CliRunner().invoke(main, ["plan", "pocket", "--memory", f"{least}B", "--width", "48", "--height", "48"])
    assert re.search(r"transformer  \d blocks in memory, \d streamed from disk", result.stdout), result.stderr
    for option in ("--stage", "--low-ram"):
        result = CliRunner().invoke(main, ["plan", "pocket", "--memory", "1GB", option])
        assert "networks     unloaded after use" in result.stdout
    result = CliRunner().invoke(main, ["plan", "pocket", "--memory", f"{least}B", "--keep"])
    assert (result.exit_code, result.stdout) == (5, "") and "let networks be unloaded" in result.stderr
    result = CliRunner().invoke(main, ["plan", "pocket", "--memory", "1MB"])
    assert (result.exit_code, result.stdout) == (5, "") and "needs at least" in result.stderr
