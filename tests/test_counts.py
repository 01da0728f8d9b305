"""The cost of an image, in numbers that are the same on every machine: calls, traces and bytes read."""

import shutil
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_zimage import GenerateRequest, Step, ZImagePipeline
from mlx_zimage.models import text_encoder, transformer
from mlx_zimage.models.transformer import Transformer
from mlx_zimage.pipeline import Phase
from mlx_zimage.tokenizer import Tokenizer

STEPS = 3
LAYERS = tiny.TEXT_ENCODER["num_hidden_layers"] - 1  # the last one is not needed
MODULATED = [f"noise_refiner.{i}" for i in range(2)] + [f"layers.{i}" for i in range(3)]
BLOCKS = ["context_refiner.0", "context_refiner.1", *MODULATED]


def request(**changes) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a red fox", "seed": 0, "steps": STEPS, "width": 32, "height": 48} | changes)


@pytest.fixture
def fresh(tiny_folder) -> ZImagePipeline:
    """A pipeline that has read nothing yet."""
    return ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")


@pytest.mark.parametrize(("guidance_scale", "prompts"), [(0.0, 1), (2.0, 2)])
def test_each_part_runs_only_as_often_as_needed(fresh, watch, guidance_scale, prompts):
    calls = {
        "tokenized": (watch(Tokenizer, "encode"), prompts),
        "layers of the encoder": (watch(text_encoder, "layer"), prompts * LAYERS),
        "captions refined": (watch(Transformer, "caption_stream"), prompts),
        "schedules": (watch(transformer, "time_embedding"), 1),
        "evaluations": (watch(Transformer, "finish"), prompts * STEPS),
    }
    asked = request(guidance_scale=guidance_scale, negative_prompt="blurry", num_images=2)
    list(fresh.stream(asked))
    assert {name: len(seen) for name, (seen, _) in calls.items()} == {name: n for name, (_, n) in calls.items()}
    list(fresh.stream(replace(asked, seed=1)))
    assert len(calls["layers of the encoder"][0]) == prompts * LAYERS, "the prompts are cached"
    assert len(calls["schedules"][0]) == 1


def test_a_truncated_step_runs_the_prompt_alone_and_reads_no_more(fresh, watch, monkeypatch, bytes_read):
    run_streamed(fresh, monkeypatch, keep=False, streamed=set(BLOCKS))
    ended = watch(Transformer, "finish")
    # three steps, at times 0, 0.14 and 0.4: the last is not guided
    asked = request(guidance_scale=2.0, negative_prompt="blurry", cfg_truncation=0.3)
    _, steps, _ = reads(fresh, asked, bytes_read)
    assert len(ended) == 2 + 2 + 1
    assert steps[1] == steps[2] == nbytes(fresh.checkpoint.transformer, *MODULATED, without="adaLN_modulation")


@pytest.fixture
def traces(monkeypatch):
    """The names of functions that mx.compile traces, as on a GPU. Nothing is computed."""
    if mx.default_device() == mx.cpu and not shutil.which("g++"):
        pytest.skip("without a C++ compiler MLX does not compile for a CPU, and traces nothing once")
    seen, compile = [], mx.compile

    def counting(function):
        def traced(*args):
            seen.append(function.func.__name__)
            return function(*args)

        return compile(traced)

    monkeypatch.setattr(mx, "compile", counting)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, lambda *trees: None)
    return seen


def test_a_block_is_traced_once_per_shape(traces, tiny_folder):
    pipe = ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")

    def run(h: int, w: int, steps: int, tokens: int = 20) -> int:
        """The traces that one more request takes."""
        before = len(traces)
        sigmas = np.linspace(1, 0.1, steps)
        velocity = pipe.transformer.velocity(mx.zeros((tokens, 40)), sigmas, h, w)
        for i in range(steps):
            velocity(mx.zeros((1, h, w, 16)), i)
        return len(traces) - before

    # 24 image tokens, padded to 32 like the caption's: the shapes are the refiners', that of both together, and the
    # trimmed last block's, which attends from 24 tokens to 64, and feeds 24 forward
    assert run(8, 12, 2) == 6
    assert traces.count("attend") == traces.count("feed") == 3
    assert run(8, 12, 1) == run(8, 12, 5) == run(8, 12, 8, tokens=31) == 0
    # 36 tokens, padded to 64, which was traced before: only the shape with the caption and the last block's are new
    assert run(12, 12, 1) == 4
    assert run(8, 12, 2) == 0, "earlier shapes are not traced again"


# ---- bytes


def nbytes(component, *prefixes: str, without: str = "-") -> int:
    """Bytes on disk of all tensors with these prefixes."""
    return sum(
        entry.nbytes
        for name, entry in component.entries.items()
        for prefix in prefixes
        if name.startswith(f"{prefix}.") and without not in name
    )


def reads(pipe: ZImagePipeline, asked: GenerateRequest, seen: Counter) -> tuple[int, list[int], list[int]]:
    """Bytes of tensors read: by the encoder, by the transformer for each step, and by the VAE for each image."""
    names = "text_encoder", "transformer", "vae"
    before = [seen[name] for name in names]
    steps, images = [], []
    for event in pipe.events(asked):
        encoder, denoiser, vae = (seen[name] - n for name, n in zip(names, before, strict=True))
        if isinstance(event, Step):
            steps.append(denoiser - sum(steps))
        elif not isinstance(event, Phase):
            images.append(vae - sum(images))
    return encoder, steps, images


def run_streamed(pipe: ZImagePipeline, monkeypatch, keep: bool, streamed: set[str]) -> None:
    plan = pipe.planner.plan
    monkeypatch.setattr(
        pipe.planner, "plan", lambda *work: replace(plan(*work), keep=keep, streamed=frozenset(streamed))
    )


def test_a_kept_model_is_read_once(fresh, bytes_read):
    encoder, network, vae = fresh.checkpoint.text_encoder, fresh.checkpoint.transformer, fresh.checkpoint.vae
    ids = fresh.tokenize(request().prompt)
    row = encoder.entries["model.embed_tokens.weight"].nbytes // tiny.TEXT_ENCODER["vocab_size"]
    of_encoder = len(ids) * row + nbytes(encoder, *(f"model.layers.{i}" for i in range(LAYERS)))
    assert fresh.plan(request()).keep
    read, steps, images = reads(fresh, request(num_images=2), bytes_read)
    assert read == of_encoder
    assert steps == [sum(entry.nbytes for entry in network.entries.values()), *[0] * (STEPS - 1)]
    assert images == [nbytes(vae, "decoder"), 0]
    assert reads(fresh, request(seed=1), bytes_read) == (0, [0] * STEPS, [0])


def test_a_staged_model_is_read_once_per_request(fresh, bytes_read):
    fresh.keep = False
    first = reads(fresh, request(), bytes_read)
    second = reads(fresh, request(prompt="a blue fox", seed=1), bytes_read)
    everything = sum(entry.nbytes for entry in fresh.checkpoint.transformer.entries.values())
    assert first[1] == second[1] == [everything, *[0] * (STEPS - 1)], "nothing stays after a request"
    assert first[0] and second[0], "the encoder is read for each prompt"
    assert second[2] == first[2] == [nbytes(fresh.checkpoint.vae, "decoder")]


@pytest.mark.parametrize("streamed", [set(BLOCKS), set(BLOCKS[3:5])], ids=["all", "some"])
def test_a_streamed_block_is_read_once_per_step_without_unneeded_tensors(fresh, monkeypatch, streamed, bytes_read):
    run_streamed(fresh, monkeypatch, keep=False, streamed=streamed)
    network = fresh.checkpoint.transformer
    _, steps, _ = reads(fresh, request(), bytes_read)
    everything = sum(entry.nbytes for entry in network.entries.values())
    again = nbytes(network, *(streamed & set(MODULATED)), without="adaLN_modulation")
    assert steps == [everything, *[again] * (STEPS - 1)]


@pytest.mark.parametrize("images", [1, 2])
def test_a_streamed_block_is_read_once_per_step_for_all_prompts_and_images(
    fresh, monkeypatch, bytes_read, watch, images
):
    """Both with two prompts for guidance, and for images that take turns."""
    run_streamed(fresh, monkeypatch, keep=False, streamed=set(BLOCKS))
    monkeypatch.setattr(transformer, "TOKENS_AT_ONCE", 1)  # one image at a time
    fed = watch(transformer, "feed_forward")
    asked = request(guidance_scale=2.0, negative_prompt="blurry " * 20, num_images=images)
    _, steps, _ = reads(fresh, asked, bytes_read)
    network = fresh.checkpoint.transformer
    again = nbytes(network, *MODULATED, without="adaLN_modulation")
    assert steps == [sum(entry.nbytes for entry in network.entries.values()), *[again] * (STEPS - 1)]
    assert len(fed) == 2 * len(BLOCKS[:2]) + STEPS * 2 * images * len(MODULATED)
