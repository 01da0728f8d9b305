"""Many requests in one call: what they have in common is checked and planned once."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from lanes import slow

from mlx_zimage import GenerateRequest, MemoryBudgetError, cli, drafts
from mlx_zimage.images import files
from mlx_zimage.networks import Networks
from mlx_zimage.pipeline import ZImagePipeline
from mlx_zimage.tokenizer import Tokenizer, most_ids
from mlx_zimage.weights.hub import POCKET

REQUEST = GenerateRequest("a red circle", seed=0, width=64, height=64, steps=1)
SMALL = ["-m", str(POCKET), "--steps", "1", "--size", "64x64", "-q"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(*args: str, code: int) -> str:
    ended = CliRunner().invoke(cli.main, ["generate", *SMALL, *args])
    assert ended.exit_code == code, ended.output
    return ended.output


@pytest.fixture
def work(monkeypatch) -> dict[str, int]:
    """How many requests were made, prompts tokenized and plans computed."""
    done = {"requests": 0, "ids": 0, "plans": 0}

    def counted(cls, method: str, name: str):
        original = getattr(cls, method)

        def count(*args, **options):
            done[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(cls, method, count)

    counted(GenerateRequest, "__post_init__", "requests")
    counted(Tokenizer, "encode", "ids")
    counted(Networks, "plan", "plans")
    return done


def write_prompts(tmp_path, count: int, last: str = "") -> str:
    lines = [f"a red circle number {i}" for i in range(count)] + ([last] if last else [])
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    return "prompts.txt"


@pytest.mark.parametrize("own", ["prompts", slow("objects"), "objects with seeds"])
def test_ten_thousand_prompts_that_cannot_fit_are_refused_without_making_a_request_for_each(tmp_path, work, own):
    if own == "prompts":
        args = ["--prompt-file", write_prompts(tmp_path, 10_000)]
    else:
        objects = [{"prompt": f"a red circle {i}", **({"seed": i} if "seeds" in own else {})} for i in range(10_000)]
        (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, objects)))
        args = ["--requests", "requests.jsonl"]
    assert "line 1: 1 image of 64x64 cannot be generated within 1 MB" in generate(*args, "--memory", "1MB", code=5)
    assert work["requests"] < 50 and work["ids"] <= 2 and work["plans"] == 1


def test_one_size_of_many_that_does_not_fit_is_found_by_its_line(tmp_path, work):
    sizes = ["64x64"] * 3000 + ["2048x2048"] + ["64x64"] * 3000
    objects = [{"prompt": f"a red circle {i}", "size": size} for i, size in enumerate(sizes)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, objects)))
    output = generate("--requests", "requests.jsonl", "--memory", "50MB", "--steps", "1", code=5)
    assert "requests.jsonl, line 3001: 1 image of 2048x2048 cannot be generated within 50 MB" in output
    assert work["plans"] <= 3


def write_requests(tmp_path, objects) -> list[str]:
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, objects)))
    return ["--requests", "requests.jsonl"]


def test_more_sizes_than_can_be_planned_are_refused_before_a_request_is_made(tmp_path, work):
    sizes = [(16 * (i % 128 + 1), 16 * (i // 128 + 1)) for i in range(drafts.MAX_KINDS + 1)]
    args = write_requests(tmp_path, [{"prompt": "a", "width": width, "height": height} for width, height in sizes])
    output = generate(*args, "--memory", "1MB", code=2)
    assert "requests.jsonl has more than 10,000 requests that differ in their settings" in output
    assert work["requests"] == 0


def test_each_of_many_requests_may_have_its_own_image():
    lines = (json.dumps({"prompt": "a", "image": f"{i}.png"}) for i in range(drafts.MAX_KINDS + 1))
    assert len(drafts.read_requests(lines, "requests.jsonl")) == drafts.MAX_KINDS + 1


def test_a_request_of_each_size_is_made_once_before_the_first_that_does_not_fit_is_found(tmp_path, work, monkeypatch):
    checked = []
    monkeypatch.setattr(files, "check_folder", checked.append)
    sizes = [64, 2048, *range(80, 1680, 16)]
    args = write_requests(tmp_path, [{"prompt": "a", "width": width, "height": 64} for width in sizes])
    assert "requests.jsonl, line 2: " in generate(*args, "--memory", "20MB", code=5)
    assert work["requests"] < len(sizes) + 30 and work["plans"] == 2 and len(checked) == 1


def test_requests_that_differ_only_in_their_files_are_planned_as_one(tmp_path, work, monkeypatch):
    monkeypatch.setattr(drafts, "MAX_KINDS", 2)
    objects = [{"prompt": "a cat", "seed": i, "output": f"{i}.png"} for i in range(40)]
    args = write_requests(tmp_path, [*objects, {"prompt": "a", "width": 2048}])
    assert "requests.jsonl, line 41: " in generate(*args, "--memory", "20MB", code=5)
    assert work["plans"] <= 2 + 10  # which find the longest prompt that fits, of up to 512 tokens


@pytest.fixture
def tight() -> tuple[ZImagePipeline, int]:
    """A pipeline whose budget is enough for an image of a short prompt only, and the most tokens that fit."""
    pipe = ZImagePipeline.from_pretrained("pocket", memory="5MB")
    while (most := pipe.most_tokens(REQUEST)) < 100:
        pipe.budget += 10**6
    assert most < 400
    return pipe, most


def test_a_longer_prompt_that_does_not_fit_is_found_by_its_line(tmp_path, tight, work):
    pipe, _ = tight
    file = write_prompts(tmp_path, 300, last="red " * 450)
    output = generate("--prompt-file", file, "--memory", f"{pipe.budget / 1e6}MB", code=5)
    assert "prompts.txt, line 301: 1 image of 64x64 cannot" in output
    assert work["ids"] < 310


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a" * 32_001}, "at most 32000"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"prompt": 5}, "must be text"),
        ({"prompt": None}, "must be text"),
        ({"prompt": "<lora:a:1>"}, "--lora a.safetensors"),
        ({"prompt": "a", "seed": -1}, "seed must be from 0"),
        ({"prompt": "a", "seed": [1]}, "seed must be a whole number"),
        ({"prompt": "a", "seed": 2**64 - 1, "count": 2}, "seed must be from 0"),
        ({"prompt": "a", "steps": 0}, "steps must be from 1"),
    ],
)
def test_a_bad_prompt_or_seed_among_good_ones_is_found_by_its_line(tmp_path, bad, message):
    good = {"prompt": "a", "seed": 5}
    objects = [good, good, good, bad, good]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, objects)))
    output = generate("--requests", "requests.jsonl", "--memory", "1MB", code=2)
    assert "requests.jsonl, line 4: " in output and message in output


@pytest.mark.parametrize("prompt", ["a fox", "🦊" * 50, "猫" * 50, "\u0958" * 50, "\ufb2c" * 50, "\U0001d160" * 50])
def test_a_prompt_has_no_more_ids_than_its_bytes_may_give(prompt):
    assert len(Tokenizer(POCKET / "tokenizer/tokenizer.json").encode(prompt)) <= most_ids(prompt)


def test_most_tokens_is_the_longest_prompt_that_fits(tight):
    pipe, most = tight
    lengths = {len(pipe.tokenize("red " * n)): n for n in range(450)}
    pipe.plan(replace(REQUEST, prompt="red " * lengths[most]))
    with pytest.raises(MemoryBudgetError):
        pipe.plan(replace(REQUEST, prompt="red " * lengths[most + 1]))
