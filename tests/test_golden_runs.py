"""Requests give the same bits, with the same reads and calls, as recorded before a refactoring: see golden/runs.py."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from compare import relative_error
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent / "golden"))

import runs

KNOWN = json.loads(runs.DIGESTS.read_text())
# Between processors and BLAS libraries only the order of sums differs: between MLX's own BLAS and OpenBLAS, measured
# 2e-6 of the largest value in float32, and nothing in 16 bits, which no BLAS multiplies. bfloat16 rounds by 4e-3,
# float16 by 5e-4, many times over.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1, "float16": 2e-2}
# Bytes that are no longer read: before, guidance's two prompts each read the streamed blocks (5.3 MB) in each of two
# steps, and the context refiner (1.8 MB) before the steps.
READ_TWICE = {"pocket guided streamed": 2 * 5_318_400 + 1_772_800}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> runs.Models:
    return runs.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def digests() -> dict[str, dict[str, str]] | None:
    """The record of a machine with the same arithmetic as this one, if there is one."""
    return KNOWN["digests"].get(runs.arithmetic())


# All quantized models but one, and cases that others cover in other ways or with other models: together they take most
# of the time.
SLOW = re.compile(
    r"pocket-(mxfp8|4bit [bf]\w+16|8bit|3bit|mxfp4|nvfp4)|pocket-4bit float32 (kept|staged)|pocket [bf]\w+16"
    r"|pocket wide|80 images|three images|pocket guided (kept|staged)|pocket float32 staged|pocket (shift|mlx noise)"
    r"|tiny [bf]\w+16 (kept|staged)|tiny float32 (staged|streamed)|tiny guided \w+16|chinese|no padding|one token"
)
CASES = [pytest.param(name, marks=pytest.mark.slow if SLOW.search(name) else (), id=name) for name in runs.CASES]


@pytest.mark.parametrize("name", CASES)
def test_a_request_gives_the_same_bits_and_costs_the_same(name, models, digests, on_cpu):
    case, (budget, costs) = runs.CASES[name], split(KNOWN["costs"][name])
    made, counts = runs.run(models[case.model], case, budget)
    if name in READ_TWICE:
        costs["bytes of the transformer"] -= READ_TWICE[name]
    assert counts == costs
    if digests:
        assert {kind: runs.digest(array) for kind, array in made.items()} == digests[name]
    arrays = load_file(runs.ARRAYS)
    wanted = arrays[f"{name}/latents"]
    assert relative_error(made["latents"][-1][:1], wanted) <= TOLERANCES[case.dtype]
    assert np.abs(made["pixels"][:1].astype(int) - arrays[f"{name}/pixels"]).mean() <= 255 * TOLERANCES[case.dtype]


def split(costs: dict) -> tuple[int | None, dict[str, int]]:
    return costs["budget"], {name: count for name, count in costs.items() if name != "budget"}
