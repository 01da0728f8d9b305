"""Output and exit codes of verify and doctor."""

import json
import re
import shutil

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_zimage import cli, doctor, selftest
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


def test_fp8_is_not_a_fault_and_what_is_not_a_model_is_not_called_damaged(run, tmp_path):
    folder = shutil.copytree(POCKET, tmp_path / "fp8")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    arrays = mx.load(str(file))
    packed = {name: mx.full(x.shape, 0x38, mx.uint8) for name, x in arrays.items() if "feed_forward" in name}  # ones
    mx.save_safetensors(str(file), arrays | packed)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b'"U8"', b'"F8_E4M3"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    assert run("verify", "fp8").stdout == "fp8 is intact (headers and values only; no checksums to compare with)\n"
    (tmp_path / "text.txt").write_text("text")
    for name in ("text.txt", "."):
        result = run("verify", name)
        assert (result.exit_code, result.stdout) == (4, "") and "damaged" not in result.stderr


@pytest.fixture
def measured(monkeypatch):
    """What doctor measures is not remembered."""
    monkeypatch.setattr(doctor, "remember_product_rate", lambda rate: None)


@pytest.fixture
def not_measured(monkeypatch):
    """doctor only checks results; how fast the machine is takes longer to measure."""
    monkeypatch.setattr(doctor, "speeds", lambda *_: doctor.Speeds(1e12))


@pytest.fixture
def only(monkeypatch):
    """only("norm") leaves the cases whose names end like that."""
    cases = selftest.cases

    def only(ending: str) -> None:
        def chosen(quantizations):
            return {name: case for name, case in cases(quantizations).items() if name.endswith(ending)}

        monkeypatch.setattr(selftest, "cases", chosen)

    return only


def test_doctor_shows_facts_and_verdicts_about_the_machine(run, measured):
    result = run("doctor", "--dtype", "float32")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"mlx               {mx.__version__}\n" in result.stdout
    assert "WRONG" not in result.stdout
    for name in ("system", "MLX build", "memory", "disk", "numbers"):
        assert re.search(rf"^{name} +(ok|limited) ", result.stdout, re.MULTILINE)


def test_the_keys_of_doctors_report_stay_as_they_are(run, measured):
    """Other programs rely on them."""
    report = json.loads(run("doctor", "--json", "--dtype", "float32", "--model", "pocket").stdout)
    assert list(report) == [
        "machine", "speeds", "passed", "verdicts", "checks", "checks_without_matrix_units", "packed_unlike_cpu",
        "seconds",
    ]  # fmt: skip
    assert list(report["machine"]) == [
        "mlx_zimage", "mlx", "python", "system", "macos", "device", "backend", "architecture", "dtype", "memory_budget",
        "max_buffer_length", "metal_wheel", "matrix_units", "fast_synch",
    ]  # fmt: skip
    assert list(report["speeds"]) == ["product_tflops", "longest_kernel_s", "disk_gb_per_s", "block_s"]
    assert report["passed"] is True
    kernels = ["kernels"] if mx.default_device() == mx.gpu else []
    assert [verdict["name"] for verdict in report["verdicts"]] == [
        "system", "MLX build", "memory", "disk", *kernels, "model's disk", "numbers",
    ]  # fmt: skip
    assert list(report["verdicts"][0]) == ["name", "ok", "message", "advice"]
    assert list(report["checks"][0]) == ["name", "dtype", "error", "limit", "seconds", "problem"]
    assert report["seconds"] == pytest.approx(sum(check["seconds"] for check in report["checks"]))


def test_doctor_checks_the_quantization_of_a_model(run, not_measured):
    run("convert", "pocket", "small", "--q-bits", "4", "--q-group-size", "32")
    report = json.loads(run("doctor", "--json", "--dtype", "float32", "--model", "small").stdout)
    names = {check["name"] for check in report["checks"] if "-bit" in check["name"]}
    assert {name.partition(" product")[0].partition(" packing")[0] for name in names} == {
        "4-bit affine in groups of 32"
    }


def test_doctor_exits_with_8_on_a_machine_that_computes_wrong_results(run, not_measured, only, monkeypatch):
    only("norm")
    monkeypatch.setattr(mx.fast, "layer_norm", lambda x, *_: mx.zeros(x.shape))
    result = run("doctor", "--dtype", "float32")
    assert result.exit_code == 8
    assert re.search(r"^layer norm in float32 +WRONG", result.stdout, re.MULTILINE)
    assert "Error: wrong results for 'layer norm'; try another version of MLX" in result.stderr
    result = run("doctor", "--dtype", "float32", "--json")
    assert result.exit_code == 8 and json.loads(result.stdout)["passed"] is False


def test_doctor_reports_even_if_a_gpu_lacks_a_kernel(run, not_measured, only, monkeypatch):
    only("packing")
    quantize = mx.quantize

    def lacking(w, group_size=64, bits=4, mode="affine", **options):
        if mode == "nvfp4":
            raise RuntimeError("[metal::Device] Unable to load kernel nvfp4_quantize")
        return quantize(w, group_size=group_size, bits=bits, mode=mode, **options)

    monkeypatch.setattr(mx, "quantize", lacking)
    result = run("doctor", "--dtype", "float32", "--json")
    assert result.exit_code == 8
    report = json.loads(result.stdout)
    (failed,) = [check for check in report["checks"] if check["error"] is None]
    assert failed["name"].endswith("packing") and "Unable to load kernel" in failed["problem"]
    assert f"wrong results for {failed['name']!r}" in result.stderr


def test_doctor_tries_a_failed_check_again_without_matrix_units(run, not_measured, monkeypatch):
    monkeypatch.setattr(mx.fast, "layer_norm", lambda x, *_: mx.full(x.shape, mx.nan))
    monkeypatch.setattr(doctor, "has_matrix_units", lambda: True)
    result = run("doctor", "--dtype", "float32", "--json")
    assert result.exit_code == 8
    report = json.loads(result.stdout)
    (failed,) = [check for check in report["checks"] if check["error"] is None]
    assert (failed["name"], failed["problem"]) == ("layer norm", "the result is not finite")
    retried = report["checks_without_matrix_units"]  # in a process in which layer_norm is as it was
    assert len(retried) == len(report["checks"]) and all(check["error"] <= check["limit"] for check in retried)
    assert "MLX_METAL_GPU_ARCH=applegpu_g16s" in result.stderr
