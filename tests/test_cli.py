"""The commands as users see them: exit codes, stdout and stderr, invalid input."""

import errno
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from lanes import slow
from PIL import Image

from mlx_zimage import cli, errors
from mlx_zimage.weights.hub import POCKET

PROMPT = "a red circle on a blue background"
pytestmark = pytest.mark.usefixtures("light_pocket")
SMALL = ["--model", "pocket", "--steps", "1", "--width", "32", "--height", "32"]
COMMAND = [sys.executable, "-m", "mlx_zimage"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run mlx-zimage in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(cli.main, [str(arg) for arg in args])


def test_generate_prints_only_the_path_on_stdout_and_the_seed_on_stderr(run, tmp_path):
    result = run("generate", PROMPT, *SMALL, "--seed", "7", "-o", "circle.png")
    assert (result.exit_code, result.stdout) == (0, "circle.png\n")
    assert "Seed: 7\n" in result.stderr
    assert Image.open(tmp_path / "circle.png").size == (32, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["circle.png"]


def test_a_random_seed_is_printed_and_reproduces_the_image(run, tmp_path):
    first = run("generate", PROMPT, *SMALL, "-o", "first.png")
    (seed,) = re.findall(r"Seed: (\d+)", first.stderr)
    assert run("generate", PROMPT, *SMALL, "-o", "second.png", "--seed", seed).exit_code == 0
    assert np.array_equal(Image.open("first.png"), Image.open("second.png"))


def test_the_default_size_comes_from_the_model(run):
    assert run("generate", PROMPT, "-m", "pocket", "--steps", "1").stdout == "image.png\n"
    assert Image.open("image.png").size == (128, 128)


def test_an_existing_image_is_kept_unless_overwrite_is_given(run, tmp_path):
    (tmp_path / "image.png").write_bytes(b"mine")
    assert run("generate", PROMPT, *SMALL).stdout == "image-1.png\n"
    assert run("generate", PROMPT, *SMALL).stdout == "image-2.png\n"
    assert (tmp_path / "image.png").read_bytes() == b"mine"
    assert run("generate", PROMPT, *SMALL, "--overwrite").stdout == "image.png\n"
    assert Image.open("image.png").size == (32, 32)


def test_the_noise_of_a_seed_as_latents_gives_the_image_of_that_seed(run):
    from mlx_zimage.noise import torch_randn

    np.save("noise.npy", torch_randn(5, (1, 16, 4, 4)))
    run("generate", PROMPT, *SMALL, "--latents", "noise.npy", "-o", "latents.png")
    run("generate", PROMPT, *SMALL, "--seed", "5", "-o", "seed.png")
    assert np.array_equal(Image.open("latents.png"), Image.open("seed.png"))


def test_latents_for_two_images_give_two_images(run):
    np.save("noise.npy", np.random.default_rng(0).standard_normal((2, 16, 4, 4)))
    result = run("generate", PROMPT, *SMALL, "--latents", "noise.npy")
    assert result.stdout == "image.png\nimage-1.png\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--width", "100"],
            "--width must be a multiple of 16 pixels from 16 to 8192, got 100; the nearest are 96 and 112",
        ),
        (["--height", "0"], "height must be a multiple of 16"),
        (["--steps", "0"], "steps must be from 1"),
        (["--seed", "-1"], "seed must be from 0 to 2**64 - 1, got -1"),
        (["--seed", str(2**64)], "seed must be from 0 to 2**64 - 1"),
        (["--shift", "nan"], "shift must be from 0.01 to 1000, got nan"),
        (["--guidance", "-1"], "--guidance must be"),
        (["-o", "image.bmp"], "must end in .png"),
        (["-o", "{sed}.png"], "-o contains {sed}; the placeholders are {prompt}, {seed}"),
        (["-o", "."], "is a folder"),
        (["--latents", "none.npy"], "no latents file at none.npy"),
        (["--latents", "pickled.npy"], "is not a .npy file of numbers"),
        (["--latents", "text.npy"], "is not a .npy file of numbers"),
        (["--latents", "flat.npy"], "contains float64 of shape (16,); expected"),
        (["--latents", "misfit.npy"], "misfit.npy contains latents of shape (1, 16, 16, 16), for an image of 128x128"),
        (["--latents", "infinite.npy"], "latents must be finite"),
        (["--memory", "lots"], "memory must be a size such as 6GB"),
        (["--rng", "cuda"], "'cuda' is not one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_an_invalid_value_is_reported_before_any_work(run, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr("mlx_zimage.pipeline.ZImagePipeline.encode", None)  # work would fail otherwise
    np.save(tmp_path / "flat.npy", np.zeros(16))
    np.save(tmp_path / "misfit.npy", np.zeros((1, 16, 16, 16)))
    np.save(tmp_path / "infinite.npy", np.full((1, 16, 4, 4), np.inf))
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no numbers")
    before = sorted(tmp_path.iterdir())
    result = run("generate", PROMPT, *SMALL, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("prompt", ["", "  \n", "x" * 32_001, "\udcff"])
def test_an_empty_overlong_or_undecodable_prompt_is_refused(run, prompt):
    result = run("generate", prompt, *SMALL)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "prompt" in result.stderr


def test_values_are_checked_before_the_model_is_looked_up(run):
    result = run("generate", PROMPT, "--model", "nobody/nothing", "--steps", "0")
    assert result.exit_code == 2


def test_a_missing_model_folder_exits_with_3(run):
    for command in (["generate", PROMPT, "-m", "no/such/folder"], ["info", "no/such/folder"]):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (3, "")
        assert "no/such/folder" in result.stderr
    assert "no model at ./folder" in run("generate", PROMPT, "-m", "./folder").stderr


def test_a_model_folder_with_missing_weights_exits_with_4(run, tmp_path):
    shutil.copytree(POCKET, tmp_path / "model")
    (tmp_path / "model/vae/diffusion_pytorch_model.safetensors").unlink()
    for command in (["generate", PROMPT, "-m", "model"], ["info", "model"]):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (4, "")
        assert "vae" in result.stderr


def test_a_prompt_that_gets_cut_off_causes_one_line_of_warning(run):
    result = run("generate", "a red circle " * 400, *SMALL)
    assert (result.exit_code, result.stdout) == (0, "image.png\n")
    assert result.stderr.count("Warning: the prompt has") == 1
    assert "site-packages" not in result.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root can write anywhere")
def test_a_read_only_folder_is_refused_before_any_work(run, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    result = run("generate", PROMPT, *SMALL, "-o", "locked/a.png")
    assert result.exit_code == 6
    assert "cannot write to the folder locked" in result.stderr


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="only Linux has a folder that even root cannot write to")
def test_a_folder_that_cannot_hold_files_is_refused_before_any_work(run, monkeypatch):
    result = run("generate", PROMPT, *SMALL, "-o", "/proc/a.png")
    assert (result.exit_code, result.stdout) == (6, "")
    assert "cannot write to the folder /proc" in result.stderr and "Seed" not in result.stderr
    result = run("generate", PROMPT, *SMALL, "--preview-dir", "/proc/previews")
    assert result.exit_code == 6 and "could not create the folder /proc/previews" in result.stderr
    monkeypatch.setenv("HOME", "/proc")
    result = run("completion", "bash", "--install")
    assert result.exit_code == 6 and "/proc/.local" in result.stderr
    result = run("convert", "pocket", "/proc/pocket")
    assert result.exit_code == 6 and "could not write /proc/pocket" in result.stderr


def test_a_missing_folder_is_created_when_there_is_an_image_to_write(run, tmp_path):
    assert run("generate", PROMPT, *SMALL, "-o", "a/{seed}/b.png", "--seed", "3").stdout == "a/3/b.png\n"
    assert run("generate", PROMPT, *SMALL, "-o", "c/b.png", "--preview").exit_code == 0
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["b.png"]
    assert run("generate", PROMPT, *SMALL, "-o", "d/b.png", "--memory", "1MB").exit_code == 5
    assert not (tmp_path / "d").exists()


def test_a_tilde_is_the_home_folder_in_every_path(run, tmp_path, monkeypatch, light_pocket):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = shutil.copytree(light_pocket, tmp_path / "home/model").parent
    np.save(home / "noise.npy", np.zeros((1, 16, 4, 4), np.float32))
    (home / "prompts.txt").write_text(PROMPT)
    (home / "requests.jsonl").write_text(json.dumps({"prompt": PROMPT, "output": "~/own.png"}))
    model, small = ["-m", "~/model"], ["--steps", "1", "--size", "32x32"]
    options = ["-o", "~/a/image.png", "--preview-dir", "~/steps", "--latents", "~/noise.npy"]
    ran = [
        run("generate", "--prompt-file", "~/prompts.txt", *model, *small, *options),
        run("generate", "--requests", "~/requests.jsonl", *model, *small),
        run("generate", "--from", "~/own.png", *model, "--output=~/again.png"),
        run("info", "~/own.png"),
        run("info", "~/model"),
        run("verify", "~/model"),
        run("plan", "~/model", "--width", "32", "--height", "32"),
        run("convert", "~/model", "~/new", "--vae", "~/model", "--tokenizer", "~/model", "--base", "~/model"),
        run("bench", "--model", "~/model", *small, "--tokens", "8", "--repeat", "1", "--json", "~/report.json"),
    ]
    assert [(result.exit_code, result.stderr) for result in ran if result.exit_code] == []
    made = ("a/image.png", "own.png", "again.png", "report.json", "new/model_index.json")
    assert all((home / name).is_file() for name in made) and (home / "steps").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_latents_alone_determine_the_size(run):
    np.save("noise.npy", np.zeros((1, 16, 4, 6), np.float32))
    assert run("generate", PROMPT, "--model", "pocket", "--steps", "1", "--latents", "noise.npy").exit_code == 0
    assert Image.open("image.png").size == (48, 32)


def test_latents_of_the_wrong_size_are_refused_before_the_model_is_looked_up(run):
    np.save("noise.npy", np.zeros((1, 16, 4, 6), np.float32))
    result = run("generate", PROMPT, "--latents", "noise.npy", "--width", "64")
    assert result.exit_code == 2 and "for an image of 48x32 pixels" in result.stderr


def test_a_full_disk_exits_with_6_and_leaves_no_files(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("generate", PROMPT, *SMALL)
    assert (result.exit_code, result.stdout) == (6, "")
    assert "could not write image.png: No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_info_shows_networks_sizes_and_dtypes(run, whole_pocket):
    result = run("info", "pocket")
    assert result.exit_code == 0
    assert re.search(r"transformer +[\d,]{9} +\d+\.\d\d MB +bfloat16", result.stdout)
    assert "default size: 128x128 pixels" in result.stdout


def test_a_memory_budget_changes_no_pixel_and_one_too_small_exits_with_5(run):
    run("generate", PROMPT, *SMALL, "--seed", "1", "-o", "free.png")
    assert run("generate", PROMPT, *SMALL, "--seed", "1", "-o", "tight.png", "--memory", "14MB").exit_code == 0
    assert np.array_equal(Image.open("free.png"), Image.open("tight.png"))
    result = run("generate", PROMPT, *SMALL, "--memory", "1MB")
    assert (result.exit_code, result.stdout) == (5, "")


def test_bench_prints_a_table_or_json(run):
    small = ["bench", "--model", "pocket", "--size", "32x32", "--steps", "1", "--tokens", "8", "--repeat", "1"]
    result = run(*small, "--json", "report.json")
    table, told = result.stdout, result.stderr.splitlines()
    assert told[0] == "Timing pocket on this machine." and "Denoising:" in told
    assert re.fullmatch(r"  run 2 of 2: [\d.]+ s", told[-1])
    assert re.search(r"^steps +\d", table, re.MULTILINE) and "first step: " in table
    assert json.loads(Path("report.json").read_text())["cold_start_s"] > 0
    assert json.loads(run(*small, "--json", "-").stdout)["total_s"] > 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--size", "17x32"], 2, "17"),
        (["--size", "3:2", "--width", "32"], 2, "--size cannot be combined with --width"),
        (["--size", "small"], 2, "small"),
        (["--q-bits", "4"], 2, "--q-bits only applies to random weights, and pocket has its own"),
        (["--q-mode", "nvfp4"], 2, "--q-mode only applies to random weights"),
        (["--architecture", "small"], 2, "--architecture small only applies to random weights, and pocket has its own"),
    ],
)
def test_bench_refuses_invalid_options_and_keeps_an_older_report(run, options, code, message):
    Path("report.json").write_text("older")
    result = run("bench", "--model", "pocket", "--json", "report.json", *options)
    assert result.exit_code == code and message in result.stderr
    assert Path("report.json").read_text() == "older"


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("/dev/null/report.json", 6, "cannot write to the folder /dev/null"),
        ("/dev/null", 2, "/dev/null is not a regular file"),
        (".", 2, "is a directory"),
    ],
)
def test_bench_refuses_a_report_path_it_cannot_write(run, file, code, message, monkeypatch):
    monkeypatch.setattr("mlx_zimage.bench.bench_steps", None)
    result = run("bench", "--model", "pocket", "--json", file)
    assert result.exit_code == code and message in result.stderr


@pytest.mark.parametrize(
    "options", [["--recipe", "mixed", "--q-bits", "4"], slow(["--target-size", "9MB", "--search"])]
)
def test_convert_chooses_bits_per_layer(run, whole_pocket, options):
    assert run("convert", "pocket", "chosen", *options).stdout == "chosen\n"
    assert len(set(re.findall(r"(\d)-bit affine", run("info", "chosen").stdout))) > 1
    assert run("generate", PROMPT, *SMALL, "-m", "chosen").exit_code == 0


def test_info_shows_how_a_model_was_quantized(run):
    run("convert", "pocket", "searched", "--q-bits", "4", "--search", "--recipe", "mixed")
    assert re.search(
        r"converted from pocket by .*, with a mixed recipe, with scales fitted by least squares\n",
        run("info", "searched").stdout,
    )
    run("convert", "pocket", "within", "--target-size", "5MB")
    assert re.search(r"converted from pocket by .*, with a target size of 5.00 MB\n", run("info", "within").stdout)
    record = json.loads(Path("searched/conversion.json").read_text())
    record["quantization"]["calibrated"] = True
    Path("searched/conversion.json").write_text(json.dumps(record))
    assert ", calibrated on generated images\n" in run("info", "searched").stdout


def test_a_conversion_that_gains_nothing_warns(run, whole_pocket):
    assert "Warning" not in run("convert", "pocket", "small", "--q-bits", "4").stderr
    warned = run("convert", "small", "large", "--q-bits", "8").stderr
    assert "small takes 7.72 MB and the result would take 9." in warned
    assert "cannot be recovered; choose fewer bits" in warned
    warned = run("convert", "pocket", "whole", "--target-size", "1GB").stderr
    assert "the target size changes nothing: without quantization the model takes 13.52 MB" in warned


def test_models_rm_all_deletes_what_the_program_placed_and_keeps_the_users_folders(
    run, whole_pocket, tmp_path, monkeypatch
):
    import huggingface_hub.constants

    home = tmp_path / "home"
    monkeypatch.setenv("MLX_ZIMAGE_HOME", str(home))
    monkeypatch.delenv("MLX_ZIMAGE_EMBEDDINGS")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--Tongyi-MAI--Z-Image-Turbo"
    shutil.copytree(POCKET, repository / "snapshots" / ("0" * 40))
    run("convert", "pocket", home / "Z-Image-Turbo-4bit", "--q-bits", "4")
    run("convert", "pocket", "own", "--q-bits", "4")
    run("generate", PROMPT, *SMALL)
    (home / "product_rates.json").write_text("{}")
    result = run("models", "rm", "--all")
    assert result.exit_code == 2 and "--yes deletes without asking" in result.stderr
    shown = re.findall(r"^(delete|keep) .* (\S+)$", result.stderr, re.MULTILINE)
    assert [(what, Path(name).name) for what, name in shown] == [
        ("delete", "Z-Image-Turbo-4bit"), ("delete", "Z-Image-Turbo"), ("delete", "embeddings"), ("keep", "own"),
    ]  # fmt: skip
    assert repository.exists() and (home / "Z-Image-Turbo-4bit").exists()
    assert re.fullmatch(r"Freed 2\d\.\d\d MB\n", run("models", "rm", "--all", "--yes").stdout)
    assert not home.exists() and not repository.exists() and Path("own/model_index.json").exists()
    for words in ([], ["own", "--all"]):
        assert run("models", "rm", *words).exit_code == 2
    assert Path("own/model_index.json").exists()


def test_convert_writes_a_single_file_and_reads_it_back(run, whole_pocket, tmp_path):
    assert run("convert", "pocket", "pocket.safetensors", "--format", "comfyui").stdout == "pocket.safetensors\n"
    assert re.search(r"transformer +4,982,080 +9.96 MB  bfloat16\n", run("info", "pocket.safetensors").stdout)
    assert json.loads(run("info", "pocket.safetensors", "--json").stdout)["networks"].keys() == {
        "transformer", "text_encoder", "vae",
    }  # fmt: skip
    result = run("convert", "pocket.safetensors", "again", "--base", "pocket")
    assert (result.exit_code, result.stdout) == (0, "again\n"), result.stderr
    assert run("verify", "again").exit_code == 0


def test_convert_prints_a_folder_that_info_and_generate_can_read(run, whole_pocket):
    result = run("convert", "pocket", "small", "--q-bits", "8", "--text-encoder-q-bits", "4", "--q-group-size", "32")
    assert (result.exit_code, result.stdout) == (0, "small\n")
    shown = run("info", "small").stdout
    assert re.search(r"transformer +[\d,]{9} .*8-bit affine in groups of 32 \(\d+ layers\), bfloat16", shown)
    assert re.search(r"text_encoder +[\d,]{7} .*4-bit affine in groups of 32 \(\d+ layers\), bfloat16", shown)
    assert re.search(r"vae +[\d,]{7,9} .* bfloat16", shown)
    result = run("generate", PROMPT, *SMALL, "--model", "small")
    assert (result.exit_code, result.stdout) == (0, "image.png\n")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nowhere", "dest"], 3, "nowhere"),
        (["pocket", "dest", "--q-bits", "7"], 2, "7"),
        (["pocket", "dest", "--q-mode", "mxfp4", "--q-bits", "8"], 2, "mxfp4"),
        (["pocket", "dest", "--dtype", "int8"], 2, "int8"),
        (["pocket", "taken"], 2, "taken"),
        (["broken", "dest"], 4, "broken"),
    ],
)
def test_an_invalid_conversion_leaves_no_files(run, tmp_path, args, code, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "broken").mkdir()
    result = run("convert", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "taken"]


def test_every_command_has_help_with_an_example(run):
    assert run("--help").exit_code == 0
    for name in cli.main.commands:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert re.search(rf"Example: (mlx.launch .*)?mlx-zimage {name}", " ".join(result.stdout.split()))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_queries_the_program(run, shell):
    result = run("completion", shell)
    assert result.exit_code == 0
    assert f"_MLX_ZIMAGE_COMPLETE={shell}_complete" in result.stdout
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=result.stdout.encode(), capture_output=True).returncode == 0


def test_completion_is_installed_where_the_shell_looks_for_it(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run("completion", "zsh", "--install")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/.zfunc/_mlx-zimage\n")
    assert (tmp_path / ".zfunc/_mlx-zimage").read_text() + "\n" == run("completion", "zsh").stdout
    assert "fpath+=~/.zfunc" in result.stderr


def test_a_full_disk_leaves_the_installed_completion_as_it_was(run, tmp_path, monkeypatch):
    def write_half(file: Path, text: str, encoding: str) -> None:
        file.write_bytes(text.encode(encoding)[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    installed = tmp_path / ".zfunc/_mlx-zimage"
    installed.parent.mkdir()
    installed.write_bytes(b"before")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Path, "write_text", write_half)
    result = run("completion", "zsh", "--install")
    assert (result.exit_code, result.stdout) == (6, "") and "No space left" in result.stderr
    assert installed.read_bytes() == b"before" and list(installed.parent.iterdir()) == [installed]


def test_commands_and_options_are_completed():
    def complete(words: str, index: int) -> str:
        environment = {"_MLX_ZIMAGE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        return CliRunner().invoke(cli.main, env=environment, prog_name="mlx-zimage").stdout

    assert complete("mlx-zimage gen", 1) == "plain,generate\n"
    assert "plain,--seed\n" in complete("mlx-zimage generate --se", 2)
    assert complete("mlx-zimage generate --rng ", 3) == "plain,torch\nplain,mlx\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_completion_offers_models_and_files(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLX_ZIMAGE_HOME", raising=False)
    own = shutil.copytree(POCKET, tmp_path / "home/.cache/mlx-zimage/Z-Image-Turbo-4bit")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/mlx-zimage"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlx_zimage "$@"\n')
    program.chmod(0o755)
    (tmp_path / "pocket.safetensors").touch()
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    completion = run("completion", "bash").stdout

    def complete(*words: str) -> list[str]:
        """What bash shows."""
        script = (
            f"compopt() {{ :; }}; complete() {{ :; }}\n{completion}\n"
            f"COMP_WORDS=(mlx-zimage {' '.join(words)}); COMP_CWORD={len(words)}\n"
            '_mlx_zimage_completion mlx-zimage; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert not ran.stderr
        return ran.stdout.split()

    def offered(*words: str) -> list[str]:
        """What bash is sent: each word with its kind; for the kind "file", the beginning of the files' names."""
        typed = {"COMP_WORDS": " ".join(["mlx-zimage", *words]), "COMP_CWORD": str(len(words))}
        environment = {"_MLX_ZIMAGE_COMPLETE": "bash_complete"} | typed
        return CliRunner().invoke(cli.main, prog_name="mlx-zimage", env=environment).stdout.split()

    assert complete("generate", "-m", "po") == ["pocket.safetensors", "pocket"]
    for words in (["generate", "-m"], ["info"], ["plan"], ["convert"], ["bench", "--model"], ["verify"]):
        assert offered(*words, "po") == ["file,po", "plain,pocket"]
    assert complete("generate", "red", "--lora", "po") == ["pocket.safetensors"], "a LoRA is a file"
    for words in (["generate", "red", "--lora"], ["lora", "info"]):
        assert offered(*words, "po") == ["file,po"]
    assert complete("generate", "-m", str(own)[:-3]) == [str(own), str(own)], "as a folder, and as a model"
    assert complete("models", "rm", str(own)[:-3]) == [str(own)]
    assert offered("models", "rm", "po") == [], "it is not a model that can be removed"


@pytest.mark.parametrize("error", [errors.ZImageError, *errors.ZImageError.__subclasses__()])
def test_every_error_exits_with_its_code_and_one_line(run, monkeypatch, error):
    def fail(*_):
        raise error("the thing is not as expected")

    monkeypatch.setattr("mlx_zimage.weights.library.open_headers", fail)
    result = run("info", "pocket")
    assert (result.exit_code, result.stdout) == (error.exit_code, "")
    assert result.stderr == "Error: the thing is not as expected\n"


def test_a_mistyped_command_or_option_is_a_usage_error(run):
    result = run("genrate", PROMPT)
    assert result.exit_code == 2
    if hasattr(click.exceptions, "NoSuchCommand"):  # click 8.4
        assert "Did you mean 'generate'?" in result.stderr
    result = run("generate", PROMPT, "--widht", "64")
    assert result.exit_code == 2
    assert "--width" in result.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from click.testing import CliRunner; from mlx_zimage.cli import COMMANDS, main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "print(sorted(name for name in COMMANDS if f'mlx_zimage.cli.{name}' in sys.modules))\n"
        "for name in COMMANDS:\n"
        "    assert CliRunner().invoke(main, [name, '--help']).exit_code == 0\n"
        "heavy = {'mlx', 'numpy', 'PIL', 'tokenizers', 'safetensors', 'huggingface_hub', 'tqdm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n[]\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_command_list_agrees_with_the_help_of_each_command(name):
    listed = cli.main.commands[name]
    (called, command, _) = cli.main.resolve_command(click.Context(cli.main), [name])
    assert called == name and command is not listed and (command.params or isinstance(command, click.Group))
    assert listed.get_short_help_str() == command.get_short_help_str(200), "whole sentences"


def test_the_module_runs_as_a_program_with_separate_streams(tmp_path):
    words = ["generate", PROMPT, "--model", "pocket", "--steps", "1", "--seed", "1"]
    result = subprocess.run([*COMMAND, *words], cwd=tmp_path, capture_output=True)
    assert (result.returncode, result.stdout) == (0, b"image.png\n")
    assert result.stderr == b"Seed: 1\n"  # no bar without a terminal


def test_a_terminal_shows_a_progress_bar(tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, "generate", PROMPT, *SMALL, "--steps", "3"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=slave
    )
    os.close(slave)
    seen = b""
    while chunk := read_pty(master):
        seen += chunk
    assert process.wait() == 0
    assert process.stdout.read() == b"image.png\n"
    assert b"3/3" in seen


def read_pty(handle: int) -> bytes:
    try:
        return os.read(handle, 4096)
    except OSError:  # Linux: the other end is closed
        return b""


def test_ctrl_c_exits_with_130_and_leaves_no_files(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "generate", PROMPT, "-m", "pocket", "--steps", "1000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr.readline().startswith(b"Seed:")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, b"")
    assert stderr == b"Stopped.\n"
    assert list(tmp_path.iterdir()) == []


def test_paths_that_are_not_valid_text_are_printed_byte_for_byte(tmp_path):
    if sys.platform == "darwin":
        pytest.skip("APFS only allows valid UTF-8 names")
    name = b"caf\xe9.png"
    result = subprocess.run(
        [*COMMAND, "generate", PROMPT, *SMALL, "-o", name], cwd=tmp_path, capture_output=True, check=True
    )
    assert result.stdout == name + b"\n"
    assert Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).is_file()
