"""No untrusted text reaches the terminal unescaped: it could move the cursor, hide text, or never end."""

import json
import os
import shutil
import struct
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from click.testing import CliRunner

from mlx_zimage import CheckpointError, cli
from mlx_zimage.cli.output import print_path
from mlx_zimage.errors import MAX_MESSAGE, ModelNotFoundError, OutputError, plain
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.manifest import CONVERSION, MANIFEST

pytestmark = pytest.mark.slow  # many processes, or many inputs

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b1A\u202egnp\n\rError\t\x00\u2028"
RAW = set(EVIL) - set("]0;owned[2J1AgnpEr\n")


def run(*args: object):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def assert_plain(result, code: int) -> None:
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert not RAW & set(result.output), ascii(result.output)
    assert len(result.output) < 2 * MAX_MESSAGE


def config(folder, **changes) -> None:
    file = folder / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def pipeline(folder, **changes) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": EVIL}))


def tensor_name(folder) -> None:
    file = next((folder / "vae").glob("*.safetensors"))
    mx.save_safetensors(str(file), {EVIL + "x" * 10**6: mx.ones(1)})


def file_name(folder) -> None:
    (folder / "vae" / f"a{EVIL}.safetensors".replace("\0", "")).write_bytes(b"<html>")
    for file in (folder / "vae").glob("diffusion*"):
        file.unlink()


def index(folder) -> None:
    for file in (folder / "vae").glob("diffusion*"):
        file.unlink()
    (folder / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {EVIL: EVIL + ".safetensors"}})
    )


def class_name(folder) -> None:
    config(folder, act_fn=EVIL * 1000)


def conversion(folder) -> None:
    (folder / CONVERSION).write_text(json.dumps({"source": 7, "converter": [EVIL]}))


@pytest.mark.parametrize("damage", [pipeline, tensor_name, file_name, index, class_name, conversion])
def test_an_error_about_a_hostile_folder_is_plain(folder, damage):
    damage(folder)
    assert_plain(run("info", folder), 4)


def test_info_about_a_hostile_conversion_is_plain(folder):
    step = {"source": EVIL, "converter": EVIL, "quantization": {"recipe": EVIL, "target_bytes": 7}}
    (folder / CONVERSION).write_text(json.dumps(step | {"before": step}))
    assert_plain(run("info", folder), 0)


@pytest.mark.parametrize("changes", [{"before": 1}, {"quantization": {"target_bytes": "a"}}, {"dtype": None}])
def test_a_conversion_record_with_values_of_wrong_types_is_refused(folder, changes):
    (folder / CONVERSION).write_text(json.dumps({"source": "a", "quantization": {}} | changes))
    assert_plain(run("info", folder), 4)


@pytest.mark.parametrize("record", ["[", "7", '{"source": 7}', json.dumps({"converter": [EVIL]}), EVIL])
def test_a_hostile_record_in_a_single_file_is_refused(tmp_path, record):
    file = tmp_path / "file.safetensors"
    arrays = {"layers.0.attention.out.weight": mx.ones((2, 2))}
    mx.save_safetensors(str(file), arrays, {"mlx_zimage_conversion": record})
    assert_plain(run("info", file), 4)


def test_a_hostile_manifest_is_plain(tmp_path):
    model = shutil.copytree(POCKET, tmp_path / "model")
    (model / MANIFEST).write_text("0" * 64 + f"  {EVIL}\n".replace("\n", "") + "\n")
    assert_plain(run("verify", "-q", model), 4)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS creates no such names")
@pytest.mark.parametrize("command", ["info", "verify", "generate a -m", "convert", "lora info"])
def test_a_folder_whose_name_is_not_text_is_refused(tmp_path, command):
    model = shutil.copytree(POCKET / "vae", tmp_path / os.fsdecode(b"\xff\x1b[2Jmodel"))
    result = run(*command.split(), model, *(["out"] if command == "convert" else []))
    assert_plain(result, 3)
    assert "/\\udcff\\x1b[2Jmodel is not valid UTF-8" in result.output


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS creates no such names")
def test_a_shard_whose_name_is_not_text_is_refused(folder):
    file = next((folder / "vae").glob("*.safetensors"))
    file.rename(file.with_name(os.fsdecode(b"\xff.safetensors")))
    assert_plain(run("info", folder), 4)


def test_text_from_a_lora_is_printed_plain(tmp_path):
    file, d = tmp_path / "lora.safetensors", tiny.TRANSFORMER["dim"]
    factors = {
        f"layers.0.attention.to_q.lora_{x}.weight": mx.ones(shape) for x, shape in (("A", (2, d)), ("B", (d, 2)))
    }
    words = {"ss_tag_frequency": json.dumps({EVIL: {EVIL * 1000: 1}}), "modelspec.trigger_phrase": EVIL * 1000}
    mx.save_safetensors(str(file), factors, words)
    model = tiny.write_checkpoint(tmp_path / "model", seed=0)
    assert_plain(run("lora", "info", file, "--model", model), 0)


USAGE = {
    "a command": ["x{}"],
    "an option of no command": ["--x{}"],
    "an option": ["generate", "--x{}", "a"],
    "an option of another program": ["generate", "--path={}", "a"],
    "a value": ["generate", "a", "--steps", "{}"],
    "a choice": ["generate", "a", "--rng", "{}"],
    "a file to read": ["generate", "--prompt-file", "x{}"],
    "a second prompt": ["generate", "a", "b{}"],
    "a command of models": ["models", "x{}"],
    "a command of lora": ["lora", "x{}"],
    "a LoRA's name": ["generate", "a", "--lora", "a", "b{}"],
    "a seed": ["generate", "a", "--seed", "{}"],
    "a size": ["generate", "a", "--size", "{}"],
    "a memory budget": ["generate", "a", "--memory", "{}", "-m", "pocket"],
    "a server": ["generate", "a", "--server", "http://{}"],
    "a model": ["verify", "x{}"],
}


@pytest.mark.parametrize("args", USAGE.values(), ids=USAGE)
def test_what_was_typed_is_repeated_plain(args):
    result = run(*(arg.format(EVIL.replace("\0", "")) for arg in args))
    assert result.exit_code
    assert_plain(result, result.exit_code)


def test_a_path_is_plain_in_a_terminal_and_itself_in_a_pipe(capfdbinary, monkeypatch):
    path = Path(EVIL.replace("\0", "") + ".png")
    print_path(path)
    assert capfdbinary.readouterr().out == os.fsencode(path) + b"\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_path(path)
    assert capfdbinary.readouterr().out == plain(str(path)).encode() + b"\n"


def test_a_report_about_a_hostile_name_is_plain(tmp_path):
    model = shutil.copytree(POCKET, tmp_path / f"model{EVIL}".replace("\0", ""))
    assert_plain(run("bench", "--model", model, "--size", "64x64", "--steps", "1", "--repeat", "1"), 0)


def test_warnings_are_plain():
    @cli.main.command("warns")
    def warns():
        warnings.warn(EVIL, stacklevel=1)

    try:
        result = run("warns")
    finally:
        cli.main.commands.pop("warns")
    assert_plain(result, 0)
    assert "Warning: " in result.stderr


@pytest.mark.parametrize("kind", [CheckpointError, ModelNotFoundError, OutputError])
def test_errors_are_plain_in_python_too(kind):
    assert not RAW & set(str(kind(EVIL)))
    assert "\n" not in str(kind(EVIL)) and str(kind()) == ""


def test_plain_text_keeps_every_script():
    text = "«Z-Image» 猫 naïve café ⚡️🦊 👩‍🎨 עברית"
    assert plain(text) == text
    assert plain("a" * 10**6).startswith("aaa") and len(plain("a" * 10**6)) < MAX_MESSAGE + 10
    assert plain(plain(EVIL)) == plain(EVIL)


def test_a_name_in_a_header_of_8_mb_is_shown_in_part(tmp_path):
    text = json.dumps({"a" * (8 * 2**20 - 100): {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert_plain(run("info", tmp_path / "model.safetensors"), 4)
