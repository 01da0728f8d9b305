"""The report on a converted model is accurate."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest
import tiny
from click.testing import CliRunner
from hub import Hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError

from mlx_zimage.cli import main
from mlx_zimage.convert import convert
from mlx_zimage.convert import report as module
from mlx_zimage.convert.report import check_source, model_card, report, report_steps, upload
from mlx_zimage.convert.verify import verify
from mlx_zimage.errors import CheckpointError, OutputError
from mlx_zimage.weights.checkpoint import open_checkpoint

PROMPTS = ["a red circle | on a blue background"]
OPTIONS = {"prompts": PROMPTS, "size": 32, "steps": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return {bits: convert("pocket", folder / str(bits), bits=bits) for bits in (3, 8)}


@pytest.mark.slow
def test_more_bits_are_closer_by_every_measure(folders):
    low, high = (report(folders[bits], "pocket", **OPTIONS) for bits in (3, 8))
    assert high["weight_error"]["mean"] < 0.1 * low["weight_error"]["mean"]
    (a,), (b,) = low["images"], high["images"]
    assert all(high < low for high, low in zip(b["velocity_error"], a["velocity_error"], strict=True))
    assert b["latent_cosine"] > a["latent_cosine"]
    assert b["psnr_db"] > a["psnr_db"] + 10


def test_the_weight_error_is_reported_by_layer(folders):
    quality = report(folders[8], "pocket", **(OPTIONS | {"prompts": []}))
    quantized = {
        f"{part.name} {layer}.weight" for part in open_checkpoint(folders[8]).components for layer in part.quantizations
    }
    assert quality["weight_error"]["layers"].keys() == quantized
    name = "layers.1.feed_forward.w2"
    exact = open_checkpoint("pocket").transformer.read(f"{name}.weight", mx.float32)()
    packed = mx.quantize(exact.astype(mx.bfloat16), bits=8, group_size=64)
    packed = mx.dequantize(packed[0], *(x.astype(mx.float32) for x in packed[1:]), bits=8, group_size=64)
    error = (mx.square(packed - exact).mean() / mx.square(exact).mean()).sqrt().item()
    assert quality["weight_error"]["layers"][f"transformer {name}.weight"] == pytest.approx(error, rel=1e-4)


def test_a_dense_copy_is_reported_as_identical(tmp_path):
    out = convert("pocket", tmp_path / "out")
    quality = report(out, "pocket", **OPTIONS)
    assert quality["weight_error"]["layers"] == {}
    (image,) = quality["images"]
    assert max(image["velocity_error"]) < 1e-5  # the source's velocity is computed from the difference of two steps
    assert image["latent_cosine"] == pytest.approx(1, abs=1e-6)
    assert image["psnr_db"] is None


def test_the_report_is_added_to_the_folder_and_its_manifest(folders):
    quality = report(folders[8], "pocket", **OPTIONS)
    assert json.loads((folders[8] / "quality.json").read_text()) == quality
    card = (folders[8] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\npipeline_tag: text-to-image\ntags:\n- mlx\n---\n")
    assert "| a red circle \\| on a blue background | 0.0" in card
    assert verify(folders[8]) == []
    assert not list(folders[8].glob(".*"))


def test_a_folder_not_written_by_the_converter_is_refused(tmp_path):
    folder = shutil.copytree(open_checkpoint("pocket").folder, tmp_path / "pocket")
    with pytest.raises(CheckpointError, match="was not written by this converter"):
        report(folder, "pocket", **OPTIONS)


def test_a_model_card_names_what_the_model_was_converted_from(tmp_path):
    def card(source, before=None):
        conversion = {"converter": "mlx-zimage", "source": source, "dtype": "bfloat16"}
        conversion |= {"before": before} if before else {}
        return ModelCard(model_card(conversion)).data.to_dict()

    common = {"library_name": "mlx", "pipeline_tag": "text-to-image", "tags": ["mlx"]}
    assert card("folder") == common
    assert card("some/model") == common | {"base_model": "some/model"}
    official = {"base_model": "Tongyi-MAI/Z-Image-Turbo", "license": "apache-2.0"}
    assert card("Tongyi-MAI/Z-Image-Turbo") == common | official
    assert card("bf16", {"source": "Tongyi-MAI/Z-Image-Turbo"}) == common | official


@pytest.fixture
def api(api, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    return api


def test_a_failed_upload_is_reported(folders, api):
    with pytest.raises(CheckpointError, match="was not written by this converter"):
        upload(open_checkpoint("pocket").folder, "me/pocket")
    api.create_repo.side_effect = HFValidationError("no such name\nand more")
    with pytest.raises(
        OutputError, match=r"could not be uploaded to me/pocket: no such name; to retry, run `hf upload me/pocket"
    ):
        upload(folders[8], "me/pocket")


def test_hidden_files_are_not_uploaded(tmp_path, folders, api):
    out = shutil.copytree(folders[8], tmp_path / "out")
    upload(out, "me/x")
    tiny.litter(out)
    upload(out, "me/x")
    first, second = (call.kwargs["allow_patterns"] for call in api.upload_folder.call_args_list)
    assert first == second and "transformer/config.json" in first


def test_one_command_converts_reports_and_uploads(tmp_path, api, monkeypatch):
    monkeypatch.setattr(module, "report_steps", partial(report_steps, **OPTIONS))
    out = str(tmp_path / "out")
    result = CliRunner().invoke(main, ["convert", "pocket", out, "--q-bits", "8", "--report", "--upload-repo", "me/x"])
    assert (result.exit_code, result.stdout) == (0, f"{out}\n"), result.stderr
    api.create_repo.assert_called_once_with("me/x", exist_ok=True)
    names = [path.relative_to(out).as_posix() for path in sorted(Path(out).rglob("*")) if path.is_file()]
    api.upload_folder.assert_called_once_with(repo_id="me/x", folder_path=Path(out), allow_patterns=names)
    assert json.loads(Path(out, "quality.json").read_text())["images"][0]["latent_cosine"] > 0.99
    assert verify(out) == []


@pytest.mark.parametrize(
    ("options", "token", "code", "message"),
    [
        (
            ["--upload-repo", "me/x"],
            None,
            2,
            "uploading to me/x needs a Hugging Face token; run `hf auth login`, or set HF_TOKEN",
        ),
        (["--upload-repo", "me x"], "hf", 2, "'me x' is not a repository name"),
        (["--upload-repo", "x"], "hf", 2, "'x' is not a repository name; expected OWNER/NAME"),
        (["--upload-repo", "me/x"], "rejected", 6, "Hugging Face would reject an upload to me/x: no"),
        (
            ["--upload-repo", "me/x", "--format", "comfyui"],
            "hf",
            2,
            "--report and --upload-repo need --format mlx, got comfyui",
        ),
        (
            ["--report", "--base", "pocket"],
            None,
            2,
            "--report generates images with SOURCE's own parts; leave out --base",
        ),
        (["--report", "--memory", "1MB"], None, 5, "1 MB"),
        (["--memory", "1GB"], None, 2, "--memory only applies to --calibrate and --report"),
    ],
)
def test_invalid_options_for_a_report_or_upload_are_refused_before_any_work(
    tmp_path, api, monkeypatch, options, token, code, message
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    if token == "rejected":
        api.whoami.side_effect = HTTPError("no")
    result = CliRunner().invoke(main, ["convert", "pocket", str(tmp_path / "out"), "--q-bits", "4", *options])
    assert result.exit_code == code
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_report_needs_a_source_that_can_generate_images(tmp_path):
    (tmp_path / "z-image.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is GGUF; convert it first"):
        check_source(tmp_path / "z-image.gguf")


def test_the_whole_folder_is_uploaded(folders):
    """With the Hugging Face client, against a server that speaks its protocol."""
    with Hub(folders[3], "me/pocket-3bit") as hub:
        hub.token = "hf_test"
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1"}
        program = "import sys; from mlx_zimage.convert.report import check_upload, upload\n"
        program += "check_upload(sys.argv[2]); upload(*sys.argv[1:])"
        command = [sys.executable, "-c", program, folders[3], hub.name]
        done = subprocess.run(
            command, env={**os.environ, "HF_HUB_OFFLINE": "0", **variables}, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert ("POST", "/api/repos/create", None) in hub.seen
    paths = [path for path in folders[3].rglob("*") if path.is_file()]
    assert hub.received == {path.relative_to(folders[3]).as_posix(): path.read_bytes() for path in paths}
    assert "README.md" in hub.received
    assert verify(folders[3]) == []
