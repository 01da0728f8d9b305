"""Output and exit codes of verify and doctor."""

import json
import re
import shutil

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_zimage import cli
from mlx_zimage.weights.hub import POCKET


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run mlx-zimage in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(cli.main, [str(arg) for arg in args])


def test_a_converted_folder_is_verified_by_its_checksums(run, tmp_path):
    run("convert", "pocket", "small", "--q-bits", "4")
    result = run("verify", "small")
    assert (result.exit_code, result.stdout) == (0, "small is intact (all checksums match)\n")
    file = next((tmp_path / "small/vae").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    result = run("verify", "small")
    assert result.exit_code == 4
    assert f"vae/{file.name}: has sha256" in result.stdout
    assert "Error: small is damaged: 1 fault found" in result.stderr


def test_a_diffusers_folder_is_verified_by_its_headers_and_values(run, tmp_path):
    assert "headers and values" in run("verify", "pocket").stdout
    shutil.copytree(POCKET, tmp_path / "cut")
    file = tmp_path / "cut/vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run("verify", "cut").exit_code == 4
    assert run("verify", "no/such/folder").exit_code == 3


def test_doctor_shows_facts_and_verdicts_about_the_machine(run):
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"MLX               {mx.__version__}\n" in result.stdout
    assert "WRONG" not in result.stdout
    for name in ("system", "MLX build", "memory", "disk"):
        assert re.search(rf"^{name} +(ok|limited) ", result.stdout, re.MULTILINE)
    report = json.loads(run("doctor", "--json").stdout)
    assert report["passed"] is True
    assert [verdict["name"] for verdict in report["verdicts"]] == ["system", "MLX build", "memory", "disk"]
    assert {"name", "error", "limit"} < report["checks"][0].keys()


def test_doctor_exits_with_8_on_a_machine_that_computes_wrong_results(run, monkeypatch):
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, k, v, **_: mx.zeros(q.shape))
    result = run("doctor")
    assert result.exit_code == 8
    assert re.search(r"^attention in float32 +WRONG", result.stdout, re.MULTILINE)
    assert (
        "Error: wrong results on this machine for attention in float32, attention in bfloat16, attention in float16;"
        in result.stderr
    )
