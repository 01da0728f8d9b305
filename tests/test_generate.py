"""From a request to finished files, without the command line."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from mlx_zimage import GenerateRequest, Step
from mlx_zimage.generate import Files, Finished, Saved, events, open_model, run
from mlx_zimage.images.codec import encode
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.inputs import NONE, Inputs
from mlx_zimage.pipeline import Phase

REQUEST = GenerateRequest("a red circle", width=32, height=32, seed=1, steps=2)


@pytest.fixture
def model(light_pocket):
    return open_model("pocket")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_encoded_bytes_equal_those_of_a_saved_file(model, tmp_path, ending):
    (*_, sent), (*_, saved) = events(model, REQUEST), run(model, [(REQUEST, NONE)], [tmp_path / f"a{ending}"], Files())
    assert encode(sent.pixels, ending, sent.origin) == saved.path.read_bytes()


def test_events_come_in_order_and_files_exist_once_reported(model, tmp_path):
    request = GenerateRequest("two green squares", width=32, height=32, seed=1, steps=2, num_images=2)
    seen = []
    for event in run(model, [(request, NONE)], [tmp_path / "a.png"], Files()):
        seen.append(event.name if isinstance(event, Phase) else type(event))
        assert len(list(tmp_path.iterdir())) == seen.count(Saved)
    assert [name for i, name in enumerate(seen) if name not in seen[i - 1 : i]] == [
        "encode", Step, "decode", Saved, "decode", Saved,
    ]  # fmt: skip
    assert seen.count(Step) == 2


def test_a_saved_image_reports_its_origin_and_its_cost(model, tmp_path):
    latents = np.random.default_rng(0).standard_normal((1, 16, 4, 4))
    inputs = Inputs(latents)
    (*_, saved) = run(model, [(REQUEST, inputs)], [tmp_path / "a.png"], Files())
    assert read_origin(saved.path) == saved.origin
    named = replace(model.pipeline.complete(REQUEST), **inputs.digests)
    assert (saved.origin.request, saved.origin.model) == (named, "pocket")
    assert saved.origin.latents == inputs.digests["latents"]
    assert len(saved.cost.steps_s) == 2
    parts = saved.cost.scale_s, saved.cost.encode_s, *saved.cost.steps_s, saved.cost.decode_s
    assert sum(parts) == pytest.approx(saved.cost.elapsed_s)
    record = saved.to_dict()
    assert (record["path"], record["request"] | {"latents": record["latents"]}) == (
        str(saved.path),
        json.loads(json.dumps(named.to_dict())),
    )
    assert record["sha256"] == hashlib.sha256(saved.path.read_bytes()).hexdigest()


def test_a_call_never_overwrites_its_own_files(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"older")
    files = Files(overwrite=True)
    (*_, image) = events(model, REQUEST)
    assert [files.save(image, tmp_path / "a.png").name for _ in range(3)] == ["a.png", "a-1.png", "a-2.png"]
    assert Files(overwrite=True).save(image, tmp_path / "a.png").name == "a.png"


def test_leaving_the_loop_leaves_no_file(model, tmp_path):
    for event in run(model, [(REQUEST, NONE)], [tmp_path / "a.png"], Files()):
        assert not isinstance(event, Finished)
        if isinstance(event, Step):
            break
    assert list(tmp_path.iterdir()) == []


def test_generating_needs_no_command_line():
    code = "import sys, mlx_zimage.generate; print(sorted({'click', 'tqdm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
