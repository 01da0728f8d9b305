"""Several images in one call, images that store their request, and output for programs."""

import errno
import fcntl
import gc
import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from lanes import slow
from PIL import Image

from mlx_zimage import cli
from mlx_zimage.cli.elsewhere import ELSEWHERE, join_seeds
from mlx_zimage.images.files import save
from mlx_zimage.images.metadata import Origin, read_origin
from mlx_zimage.request import GenerateRequest

PROMPT = "a red circle on a blue background"
pytestmark = pytest.mark.usefixtures("light_pocket")
SIDES = ["--width", "32", "--height", "32"]
SMALL = ["--model", "pocket", "--steps", "1", *SIDES]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run mlx-zimage in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    return lambda *args, **options: CliRunner().invoke(cli.main, [str(arg) for arg in args], **options)


def seeds(stdout: str) -> list[int]:
    return [read_origin(Path(line)).request.seed for line in stdout.splitlines()]


def test_several_seeds_give_one_image_each(run):
    result = run("generate", *SMALL, "--seed", "5,6", "--seed", "9", "2", PROMPT, "-o", "{seed}.png")
    assert result.stdout == "5.png\n6.png\n9.png\n2.png\n"
    assert "Seed: 6 (2 of 4)\n" in result.stderr


@pytest.mark.parametrize(
    ("args", "joined"),
    [
        (["--seed", "1", "2", "3", "a cat"], ["--seed", "1,2,3", "a cat"]),
        (["12", "--seed", "1"], ["12", "--seed", "1"]),
        (["--seed", "1", "--", "12"], ["--seed", "1", "--", "12"]),
        (["--count", "1", "2"], ["--count", "1", "2"]),
        (["--seed=1", "2"], ["--seed=1", "2"]),
    ],
)
def test_one_seed_flag_accepts_several_seeds(args, joined):
    assert join_seeds(args) == joined


@pytest.mark.parametrize(
    ("args", "hint"),
    [(["--quantize", "8"], "--q-bits"), (["-q", "8"], "-q is --quiet"), (["--vae-tiling"], "--memory 6GB")],
)
def test_a_flag_of_another_program_is_answered_with_ours(run, args, hint):
    result = run("generate", PROMPT, *SMALL, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert hint in result.stderr


def test_no_unsupported_flag_is_accepted(run):
    for flag in ELSEWHERE["generate"]:
        result = run("generate", PROMPT, *SMALL, flag, "1")
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"No such option: {flag}; " in result.stderr


def test_count_uses_consecutive_seeds(run):
    assert seeds(run("generate", PROMPT, *SMALL, "--seed", "5", "--count", "3").stdout) == [5, 6, 7]


def test_auto_seeds_are_all_printed(run):
    result = run("generate", PROMPT, *SMALL, "--auto-seeds", "2")
    shown = [line for line in result.stderr.splitlines() if line.startswith("Seed")]
    assert shown == [f"Seed: {seed} ({i} of 2)" for i, seed in enumerate(seeds(result.stdout), 1)]


def test_an_image_in_a_batch_equals_the_one_generated_alone(run):
    run("generate", PROMPT, *SMALL, "--seed", "1,2", "-o", "batch-{seed}.png")
    run("generate", PROMPT, *SMALL, "--seed", "2", "-o", "alone.png")
    assert Path("batch-2.png").read_bytes() == Path("alone.png").read_bytes()


def test_overwrite_keeps_the_images_of_the_same_call(run):
    Path("image.png").write_bytes(b"old")
    assert run("generate", PROMPT, *SMALL, "--count", "2", "--overwrite").stdout == "image.png\nimage-1.png\n"


def test_prompts_are_read_from_a_file_or_stdin(run):
    Path("prompts.txt").write_text("a red circle\n# not this\n\n一只猫\n", encoding="utf-8")
    result = run("generate", "--prompt-file", "prompts.txt", *SMALL, "-o", "{prompt}.png")
    assert result.stdout == "a-red-circle.png\n一只猫.png\n"
    result = run("generate", "--prompt-file", "-", *SMALL, "-o", "{n}.png", input="a\nb\n")
    assert result.stdout == "1.png\n2.png\n"


def test_requests_and_results_are_json_lines(run):
    gc.collect()
    others = mx.get_active_memory() / 1e9  # models of other tests
    lines = '{"prompt": "a ring", "seed": 1, "output": "a.jpg"}\n{"seed": 2, "width": 48}\n'
    result = run("generate", PROMPT, "--requests", "-", *SMALL, "--json", "-q", input=lines)
    assert result.exit_code == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["path"], first["request"]["prompt"], first["request"]["seed"]) == ("a.jpg", "a ring", 1)
    assert (second["path"], second["request"]["prompt"], second["request"]["width"]) == ("image.png", PROMPT, 48)
    for saved in (first, second):
        assert saved["sha256"] == hashlib.sha256(Path(saved["path"]).read_bytes()).hexdigest()
        assert (saved["model"], saved["dtype"]) == ("pocket", "float32")
        # each is rounded to 0.0001 s
        parts = saved["encode_seconds"], saved["first_step_seconds"], saved["decode_seconds"]
        assert min(parts) > 0 and sum(parts) <= saved["seconds"] + 2e-4
        assert saved["scale_seconds"] == 0, "only float16 needs a scale"
        assert 0 < saved["peak_memory_gb"] < 2
        assert saved["peak_memory_gb"] - others <= saved["predicted_peak_memory_gb"] + 2e-4


def test_an_aspect_ratio_keeps_about_the_models_pixel_count(run):
    assert run("generate", PROMPT, "-m", "pocket", "--steps", "1", "--size", "3:2").exit_code == 0
    assert Image.open("image.png").size == (160, 112)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing argument 'PROMPT'"),
        ([PROMPT, "--prompt", "again"], "given twice"),
        ([PROMPT, "--prompt-file", "prompts.txt"], "--prompt-file cannot be combined"),
        (["--requests", "requests.jsonl"], "line 1 has no prompt"),
        (
            [PROMPT, "--requests", "bad.jsonl"],
            "bad.jsonl, line 2: width must be a multiple of 16 pixels from 16",
        ),
        ([PROMPT, "--prompt-file", "none.txt"], "none.txt"),
        ([PROMPT, "--seed", "1-5"], "--seed must be one or more whole numbers"),
        ([PROMPT, "--seed", "1", "--auto-seeds", "2"], "--seed cannot be combined"),
        ([PROMPT, "--size", "3:2"], "--size cannot be combined"),
        ([PROMPT, "--count", "0"], "--count must be"),
        ([PROMPT, "--seed", str(2**64 - 1), "--count", "2"], "seed must be from 0"),
        (["--from", "prompts.txt"], "is not a PNG, JPEG or WebP image"),
        (["--from", "none.png"], "no image at none.png"),
    ],
)
def test_conflicting_or_missing_values_are_reported_before_any_work(run, tmp_path, args, message):
    Path("prompts.txt").write_text("a\n")
    Path("requests.jsonl").write_text('{"seed": 1}\n')
    Path("bad.jsonl").write_text('{"seed": 1}\n{"width": 50}\n')
    before = sorted(tmp_path.iterdir())
    result = run("generate", *args, *SMALL)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("ending", ["png", slow("jpg"), slow("webp")])
def test_an_image_can_be_generated_again_from_itself_to_the_same_bytes(run, ending):
    options = ["--shift", "2.5", "--dtype", "bfloat16", "--rng", "mlx", "--guidance", "1", "--negative-prompt", "blue"]
    assert run("generate", PROMPT, *SMALL, *options, "-o", f"old.{ending}").exit_code == 0
    result = run("generate", "--from", f"old.{ending}", "-o", f"new.{ending}")
    assert (result.exit_code, result.stdout) == (0, f"new.{ending}\n")
    assert Path(f"new.{ending}").read_bytes() == Path(f"old.{ending}").read_bytes()


def test_options_override_the_request_stored_in_an_image(run):
    run("generate", PROMPT, *SMALL, "--seed", "1", "-o", "old.png")
    assert run("generate", "a star", "--from", "old.png", "--seed", "7", "--size", "48x32").exit_code == 0
    old, new = (read_origin(Path(name)).request for name in ("old.png", "image.png"))
    assert (new.prompt, new.seed, new.width, new.steps) == ("a star", 7, 48, old.steps)


def test_info_prints_the_request_stored_in_an_image(run):
    run("generate", PROMPT, *SMALL, "--seed", "1")
    assert run("info", "image.png").stdout.startswith(f"{PROMPT}\nSteps: 1, Sampler: Euler, ")
    assert json.loads(run("info", "image.png", "--json").stdout)["request"]["seed"] == 1
    assert json.loads(run("info", "pocket", "--json").stdout)["networks"]["vae"]["parameters"] > 50_000


def test_info_escapes_control_characters(tmp_path):
    request = GenerateRequest("a\x1b]0;b\a cat\x9b2J\t\n猫", 16, 16, seed=1, steps=8)
    save(np.zeros((16, 16, 3), np.uint8), tmp_path / "a.png", origin=Origin(request, "m", "f", "float32"))
    result = CliRunner().invoke(cli.main, ["info", str(tmp_path / "a.png")], color=True)  # as on a terminal
    assert result.stdout.startswith("a\\x1b]0;b\\x07 cat\\x9b2J\\t\n猫\nSteps: 8")


def test_no_metadata_stores_nothing_in_the_image(run):
    run("generate", PROMPT, *SMALL, "--no-metadata")
    content = Path("image.png").read_bytes()
    assert not any(word in content for word in (b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"zimage", PROMPT.encode()))
    result = run("generate", "--from", "image.png")
    assert result.exit_code == 2
    assert "contains no mlx-zimage or mflux metadata" in result.stderr


def test_an_image_stores_the_name_of_the_model_but_no_path(run, tmp_path):
    run("convert", "pocket", "folder/small", "--q-bits", "4")
    run("generate", PROMPT, *SMALL, "-m", tmp_path / "folder/small")
    assert read_origin(Path("image.png")).model == "small"
    assert str(tmp_path).encode() not in Path("image.png").read_bytes()


def test_an_image_cannot_select_an_unknown_model(run):
    run("convert", "pocket", "small", "--q-bits", "4")
    run("generate", PROMPT, *SMALL, "-m", "small", "-o", "old.png")
    result = run("generate", "--from", "old.png")
    assert result.exit_code == 2
    assert "was generated with the model 'small'; pass its folder or id with --model" in result.stderr
    result = run("generate", "--from", "old.png", "-m", "pocket")
    assert result.exit_code == 0
    assert "Warning: pocket is not the model that generated old.png" in result.stderr


def test_an_image_made_from_latents_needs_them_again(run):
    for i in range(2):
        np.save(f"{i}.npy", np.random.default_rng(i).standard_normal((1, 16, 4, 4)))
    run("generate", PROMPT, *SMALL, "--latents", "0.npy", "-o", "old.png")
    result = run("generate", "--from", "old.png")
    assert result.exit_code == 2
    assert "pass that file with --latents" in result.stderr
    assert "latents" not in run("generate", "--from", "old.png", "--latents", "0.npy").stderr
    assert Path("image.png").read_bytes() == Path("old.png").read_bytes()
    assert "--latents is not the file that old.png" in run("generate", "--from", "old.png", "--latents", "1.npy").stderr


def test_quiet_prints_only_the_path(run):
    result = run("generate", PROMPT, "--model", "pocket", "--steps", "1", "-q", "--no-exif")
    assert (result.stdout, result.stderr) == ("image.png\n", "")


@pytest.mark.parametrize(
    ("sides", "second"),
    [
        (SIDES, '"width": 128, "height": 128, "steps": 300'),
        pytest.param([], '"steps": 1000', marks=pytest.mark.slow),
    ],
    ids=["small", "default size"],
)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), slow(signal.SIGTERM, 143), slow(signal.SIGHUP, 129)]
)
def test_an_interrupted_batch_keeps_only_its_finished_images(tmp_path, number, code, sides, second):
    lines = f'{{"prompt": "a ring", "steps": 1}}\n{{"prompt": "two rings", {second}}}\n'
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_zimage", "generate", "-m", "pocket", *sides, "--requests", "-", "--preview"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(lines.encode())
    process.stdin.close()
    process.stdin = None
    assert process.stdout.readline() == b"image.png\n"
    while b"(2 of 2)" not in process.stderr.readline():
        assert process.poll() is None
    assert process.stderr.readline() == b"Preview until the image is finished: image.preview.png\n"
    assert Image.open(tmp_path / "image.preview.png").size == (32, 32)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (code, b"", b"Stopped.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]
    Image.open(tmp_path / "image.png").load()


def test_closing_the_terminal_removes_the_preview(tmp_path):
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_zimage", "generate", PROMPT, *SMALL, "--steps", "1000", "--preview"],
        cwd=tmp_path, stdin=end, stdout=end, stderr=end, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(end)
    try:
        seen = b""
        while b"image.preview.png" not in seen:
            seen += os.read(terminal, 4096)
        os.close(terminal)
        assert process.wait() == 129  # it ends in any case, after 1000 steps
    finally:
        process.kill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="macOS reports a closed terminal in another way")
def test_writing_to_a_terminal_that_has_just_closed_stops_a_command_too():
    @cli.main.command("writes")
    def writes():
        os.close(terminal)
        os.write(2, b"a")

    terminal, end = pty.openpty()
    before = os.dup(2)
    try:
        os.dup2(end, 2)
        assert CliRunner().invoke(cli.main, ["writes"]).exit_code == 129
    finally:
        os.dup2(before, 2)
        cli.main.commands.pop("writes")


def test_a_failing_disk_is_not_a_closed_terminal():
    @cli.main.command("reads")
    def reads():
        raise OSError(errno.EIO, "Input/output error")

    try:
        assert CliRunner().invoke(cli.main, ["reads"]).exit_code == 1
    finally:
        cli.main.commands.pop("reads")


def test_nohup_is_respected(tmp_path):
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "mlx_zimage", "generate", PROMPT, *SMALL, "--steps", "30", "--preview"],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while b"image.preview.png" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, b"image.png\n")
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), slow(signal.SIGHUP, 129)])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_CONVERT], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr.readline() == b"started\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (code, b"Stopped.\n")
    assert list(tmp_path.iterdir()) == [], "no partial folder and no lock"


SLOW_CONVERT = """
import sys, time
from mlx_zimage import cli, convert

fast = convert.convert_steps

def slow(*args, **options):
    for step in fast(*args, **options):
        yield step
        print("started", file=sys.stderr, flush=True)
        time.sleep(60)

convert.convert_steps = slow
cli.main(["convert", "pocket", "dest"])
"""


def test_a_command_restores_the_sigterm_handler(run):
    before = signal.getsignal(signal.SIGTERM)
    assert run("info", "pocket").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_pipe_causes_no_error_message(tmp_path):
    command = f'"{sys.executable}" -m mlx_zimage generate ring --model pocket --steps 1 --count 3 -q | true'
    result = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True)
    assert result.stderr == b""


def test_generate_works_with_stderr_closed(run, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    options = {"model": "pocket", "steps": "1", "size": "32x32"}
    cli.main(["generate", "a", "--preview", *(f"--{k}={v}" for k, v in options.items())], standalone_mode=False)
    assert [path.name for path in Path().iterdir()] == ["image.png"]
