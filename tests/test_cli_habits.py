"""What people type out of habit or by mistake: it works, or the message says what to type instead."""

import json
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from lanes import slow
from PIL import Image

from mlx_zimage import GenerateRequest, OutputError, cli
from mlx_zimage.cli.notes import POCKET_CHARACTERS, POCKET_SHAPES, POCKET_WORDS, notes, unknown_to_pocket
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.pipeline import ZImagePipeline
from mlx_zimage.weights.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle on a blue background"
pytestmark = pytest.mark.usefixtures("light_pocket")
QUICK = ["-m", "pocket", "--steps", "1"]
SMALL = [*QUICK, "--size", "32x32"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run mlx-zimage in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    return lambda *args, **options: CliRunner().invoke(cli.main, [str(arg) for arg in args], **options)


# ---- other programs


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["a cat"], "to generate an image: mlx-zimage generate 'a cat'"),
        (["cat"], "to generate an image: mlx-zimage generate cat"),
        (["run", "z-image"], 'to generate an image: mlx-zimage generate "a cat"'),
        (["pull", "z-image"], "`mlx-zimage convert ID DEST` downloads any other"),
        (["list"], "use `mlx-zimage models`"),
        (["rm", "z-image"], "use `mlx-zimage models rm NAME`"),
        (["save", "--path", "x"], "use `mlx-zimage convert SOURCE DEST --q-bits 8`"),
        (["mflux-generate-z-image-turbo", "--prompt", "x"], 'to generate an image: mlx-zimage generate "a cat"'),
        (["mflux-save", "--path", "x"], "use `mlx-zimage convert SOURCE DEST --q-bits 8`"),
        (["edit"], 'add an image: mlx-zimage generate "a cat" --image FILE'),
        (["mflux-upscale"], 'to enlarge an image: mlx-zimage generate "a cat" --image FILE --upscale 2'),
        (["inpaint"], 'to regenerate a part of an image: mlx-zimage generate "a cat" --image FILE --mask MASK'),
        (["outpaint"], 'to extend an image: mlx-zimage generate "a cat" --image FILE --outpaint left=256'),
        (["server"], "use `mlx-zimage serve`"),
        (["-V"], "use `mlx-zimage --version`"),
        (["models", "pocket"], "mlx-zimage info pocket"),
        (["generate", PROMPT, "--no-bake-lora"], "leave it out"),
        (["--prompt", "a cat"], "options follow a command: mlx-zimage generate"),
        (["generate", "a", "red", "cat"], "quote the prompt: mlx-zimage generate 'a red cat'"),
        (["generate", "a", "red", "cat", "--lora", "x"], "quote the prompt: mlx-zimage generate 'a red cat' ..."),
        (["generate", PROMPT, "--lora", "a.safetensors", "b.safetensors"], "as in --lora A.safetensors --lora b.safe"),
        (["fuse", "pocket", "--lora", "a.safetensors", "b.safetensors", "out"], "--lora takes one file"),
        (["generate", "--lora", "a.safetensors", "0,8", PROMPT], "must be a number such as 0.8, got '0,8'"),
        (["generate", PROMPT, "-m", "Pocket"], "did you mean 'pocket'?"),
        (["generate", PROMPT, "--path", "x"], "use --model"),
        (["generate", PROMPT, "-q", "5"], "-q is --quiet and takes no number; convert the model once"),
        (["generate", PROMPT, "-q", "5"], "--q-bits 5"),
        (["convert", "pocket", "x", "--quantize", "8"], "use --q-bits, such as --q-bits 8"),
        (["convert", "pocket", "x", "-q", "8"], "use --q-bits, such as --q-bits 8"),
        (["convert", "--model", "pocket", "--path", "x"], "`mlx-zimage convert SOURCE DEST`"),
        (["convert", "--hf-path", "pocket"], "`mlx-zimage convert SOURCE DEST`"),
        (["models", "list"], "`mlx-zimage models` lists them"),
        (["models", "delete", "x"], "use `mlx-zimage models rm NAME`"),
        (["lora", "list"], "`generate --lora FILE` reads one from any path"),
        (["lora", "style.safetensors"], "mlx-zimage lora info style.safetensors"),
        (["lora"], "mlx-zimage lora info style.safetensors"),
        (["info", "POCKET"], "did you mean 'pocket'?"),
    ],
)
def test_what_is_typed_for_other_programs_is_answered_with_what_to_type_here(run, tmp_path, words, hint):
    result = run(*words)
    assert result.exit_code in (2, 3) and result.stdout == ""
    assert hint in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["lora"], ["distributed"]])
def test_a_group_without_a_command_prints_its_help(run, words):
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert run(*words, "--help").stdout.strip() in result.stderr


MFLUX = "mflux-generate-z-image-turbo --steps 1 --width 32 --height 32"
SIDECAR = {  # as mflux 0.24.0 writes it next to an image, with --metadata
    "mflux_version": "0.24.0",
    "model": "Tongyi-MAI/Z-Image-Turbo",
    "model_path": None,
    "base_model": None,
    "seed": 42,
    "steps": 2,
    "guidance": None,
    "height": 32,
    "width": 48,
    "precision": "mlx.core.bfloat16",
    "quantize": 8,
    "generation_time_seconds": 12.34,
    "created_at": "2026-07-01T12:00:00",
    "lora_paths": None,
    "lora_scales": None,
    "image_path": None,
    "image_strength": None,
    "prompt": PROMPT,
    "negative_prompt": None,
}


@pytest.mark.parametrize(
    ("options", "meaning"),
    [
        (["--prompt", PROMPT, "--seed", "42"], {"image.png": (PROMPT, 42)}),
        (["--prompt", PROMPT, "--seed", "1", "2"], {"image.png": (PROMPT, 1), "image-1.png": (PROMPT, 2)}),
        (["--prompt", "-", "--seed", "3"], {"image.png": ("from stdin", 3)}),
        (["--prompt-file", "prompt.txt", "--seed", "4"], {"image.png": ("from a file", 4)}),
        (["--prompt", PROMPT, "--seed", "5", "--output", "out/{seed}.png"], {"out/5.png": (PROMPT, 5)}),
        (["-C", "old.metadata.json"], {"image.png": (PROMPT, 42)}),
        (["--prompt", PROMPT, "--seed", "6", "--low-ram", "-B", "1", "--metadata"], {"image.png": (PROMPT, 6)}),
        (["--prompt", PROMPT, "--seed", "7", "--negative-prompt", "x", "--no-exif"], "negative prompt changes nothing"),
        (["--prompt", PROMPT, "--quantize", "6"], "convert z-image-turbo DEST --q-bits 6"),
        (["--prompt", PROMPT, "--mlx-cache-limit-gb", "8"], "use --memory 6GB"),
        (["--prompt", PROMPT, "--image", "a.png", "0.6"], "for mflux's --image-strength 0.6, use --strength 0.4"),
        (["--prompt", PROMPT, "--base-model", "z-image"], "leave it out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_lines_of_mflux_mean_the_same_or_say_what_to_type_here(run, tmp_path, options, meaning):
    Path("prompt.txt").write_text("from a file\n")
    Path("old.metadata.json").write_text(json.dumps(SIDECAR))
    _, *small = MFLUX.split()
    result = run("generate", "-m", "pocket", *small, *options, input="from stdin\n")
    if isinstance(meaning, str):
        assert meaning in result.stderr
        assert (result.exit_code == 0) == ("changes nothing" in meaning)
        return
    assert result.exit_code == 0, result.stderr
    found = {name: read_origin(tmp_path / name).request for name in result.stdout.splitlines()}
    assert {name: (request.prompt, request.seed) for name, request in found.items()} == meaning


# ---- values from elsewhere


def test_a_prompt_of_one_hyphen_is_read_from_stdin(run):
    for words in (["-"], ["--prompt", "-"]):
        assert run("generate", *words, *SMALL, "-o", "{prompt}.png", input=" a red\ncircle \n").exit_code == 0
    assert read_origin(Path("a-red-circle.png")).request.prompt == "a red\ncircle"
    result = run("generate", "-", *SMALL, input="")
    assert result.exit_code == 2 and "the prompt is empty" in result.stderr
    result = run("generate", "-", "--requests", "-", *SMALL, input="{}")
    assert result.exit_code == 2 and "stdin can be read only once" in result.stderr


@pytest.mark.parametrize("words", [["-"], ["--prompt-file", "-"], ["--requests", "-"]])
def test_a_closed_stdin_is_an_error_that_says_so(words):
    command = [sys.executable, "-m", "mlx_zimage", "generate", *words, *SMALL]
    result = subprocess.run(["sh", "-c", f"{shlex.join(command)} <&-"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("Error: stdin is closed")


def test_a_request_is_read_from_what_mflux_stored(run, tmp_path):
    piexif = pytest.importorskip("piexif")
    Path("old.json").write_text(json.dumps(SIDECAR))
    comment = b"ASCII\0\0\0" + json.dumps(SIDECAR).encode()
    exif = piexif.dump({"Exif": {piexif.ExifIFD.UserComment: comment}})
    for name in ("old.png", "old.jpg"):
        Image.new("RGB", (48, 32)).save(name, exif=exif)
    for name in ("old.json", "old.png", "old.jpg"):
        result = run("generate", "-C", name, "-m", "pocket", "-o", f"new-{Path(name).suffix[1:]}.png")
        assert result.exit_code == 0, result.stderr
        assert f"{name} was generated by mflux 0.24.0; the image will look different here" in result.stderr
        assert f"{PROMPT}\nSteps: 2, " in run("info", name).stdout
    request = read_origin(Path("new-png.png")).request
    assert (request.prompt, request.seed, request.steps, request.width, request.height, request.rng) == (
        PROMPT, 42, 2, 48, 32, "mlx",
    )  # fmt: skip
    assert Path("new-png.png").read_bytes() == Path("new-json.png").read_bytes() == Path("new-jpg.png").read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_paths": ["a.safetensors"], "lora_scales": [1, 2]}, "lora_scales must be one number per LoRA, 1 in all"),
        ({"lora_paths": "a.safetensors"}, "lora_paths must be a list of paths"),
        (
            {"lora_paths": ["a/x.safetensors", "b/x.safetensors"]},
            "LoRAs of the same name (x); give all of its LoRAs with --lora",
        ),
        ({"lora_paths": ["x.safetensors"], "lora_scales": ["a"]}, "the strength of LoRA x must be a number"),
        (
            {"image_path": "a.png", "image_strength": 0.25},
            "old.json was generated from an image; pass that file with --image",
        ),
        ({"image_path": "a.png", "image_strength": 1}, "expected image_strength of at least 0 and below 1"),
        ({"image_path": "a.png", "image_strength": 0.5, "steps": 1}, "strength 0 leaves no step to run"),
        ({"masked_image_path": "a.png"}, "mflux generated it with a masked image"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"prompt": None}, "prompt must be text"),
        ({"model": "dev"}, "was generated with the model 'dev'; pass its folder or id with --model"),
        ({"mflux_version": ...}, "is not a request; expected what `mlx-zimage info IMAGE --json` prints"),
    ],
)
def test_a_request_of_mflux_that_cannot_be_generated_here_is_refused(run, tmp_path, changed, message):
    values = {name: value for name, value in {**SIDECAR, **changed}.items() if value is not ...}
    Path("old.json").write_text(json.dumps(values))
    result = run("generate", "-C", "old.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize("steps", [slow(2), slow(8), 9, slow(25), 50])
def test_a_request_that_mflux_ran_from_an_image_runs_the_same_steps_from_it(run, tmp_path, steps):
    for percent in range(1, 100):
        values = {"image_path": "a.png", "image_strength": percent / 100, "steps": steps}
        Path("old.json").write_text(json.dumps({**SIDECAR, **values}))
        request = replace(read_origin(Path("old.json")).request, image="0" * 64)
        # Source: mflux 0.24.0, config.py, init_time_step
        assert request.first_step == max(1, int(steps * (percent / 100)))
    Path("old.json").write_text(json.dumps({**SIDECAR, "image_path": "a.png", "image_strength": 0.25, "steps": 2}))
    Image.new("RGB", (48, 32), "red").save("a.png")
    result = run("generate", "-C", "old.json", "-m", "pocket", "--image", "a.png", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["request"]["strength"] == pytest.approx(0.5)
    Path("old.json").write_text(json.dumps({**SIDECAR, "image_path": "a.png", "image_strength": None}))
    assert read_origin(Path("old.json")).request.strength is None  # mflux ignored the image


def test_guidance_of_mflux_is_off_up_to_1(run):
    for guidance, scale in ((0.9, 0), (1, 0), (4, 4)):
        Path("old.json").write_text(json.dumps({**SIDECAR, "guidance": guidance}))
        assert read_origin(Path("old.json")).request.guidance_scale == scale


def test_a_request_is_read_from_what_info_printed(run):
    run("generate", PROMPT, *SMALL, "--seed", "5")
    Path("a.json").write_text(run("info", "image.png", "--json").stdout)
    assert run("generate", "--from", "a.json", "-o", "again.png").exit_code == 0
    assert Path("again.png").read_bytes() == Path("image.png").read_bytes()
    for text in ("{", "[]", '{"request": 1}', "\udcff"):
        Path("b.json").write_bytes(text.encode(errors="surrogateescape"))
        result = run("generate", "--from", "b.json")
        assert result.exit_code == 2 and "b.json" in result.stderr and "Traceback" not in result.stderr


# ---- one name for one thing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "-1"], "--guidance must be from 0 to 1000, got -1.0"),
        (["--width", "100"], "--width must be a multiple of 16"),
        (["--size", "100x64"], "--size: width must be a multiple of 16"),
        (["--size", "9:1"], "--size must be an aspect ratio from 1:8"),
        (["--steps", "0"], "--steps must be from 1"),
        (["--seed", "x"], "--seed must be one or more whole numbers"),
        (["--seed", "-1"], "--seed must be from 0 to 2**64 - 1, got -1"),
        (["--count", "0"], "--count must be from 1"),
        (["--memory", "lots"], "--memory must be a size"),
        (["-B", "0"], "Invalid value for '-B': 0 is not in the range"),
        (["--seed", "9" * 21], "--seed must be one or more whole numbers from 0 to 2**64 - 1"),
        (["-o", "{x}.png"], "-o contains {x}"),
        (["--output", "{x}.png"], "--output contains {x}"),
        (["--requests", "bad.jsonl"], "bad.jsonl, line 1: guidance must be from 0 to 1000, got -2"),
    ],
)
def test_an_error_names_the_option_as_it_was_typed(run, options, message):
    Path("bad.jsonl").write_text('{"prompt": "a", "guidance": -2}')
    prompt = [] if "--requests" in options else [PROMPT]
    result = run("generate", *prompt, "-m", "pocket", *options)
    assert result.exit_code == 2 and f"Error: {message}" in result.stderr


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"width": 50}, "width must be a multiple of 16"),
        ({"size": "50x32"}, "size: width must be a multiple of 16"),
        ({"steps": 0, "size": "32x32"}, "steps must be from 1"),
        ({}, "--size: height must be a multiple of 16"),
    ],
)
def test_an_error_of_one_object_names_its_own_key_rather_than_an_option(run, own, message):
    lines = json.dumps({"prompt": "a", **own})
    result = run("generate", "-m", "pocket", "--requests", "-", "--size", "32x50", "--steps", "1", input=lines)
    assert result.exit_code == 2 and f"Error: stdin, line 1: {message}" in result.stderr


def test_what_is_found_late_names_the_line_it_is_about(run, monkeypatch):
    lines = [{"prompt": "a", "width": 32, "height": 32}, {}, {"prompt": "b", "size": "8000x8000"}]
    Path("jobs.jsonl").write_text("\n".join(json.dumps(line) if line else "" for line in lines))
    result = run("generate", "-m", "pocket", "--requests", "jobs.jsonl", "--memory", "200MB", "--steps", "1")
    assert result.exit_code == 5 and "Error: jobs.jsonl, line 3: 1 image of 8000x8000 cannot be" in result.stderr
    Path("jobs.jsonl").write_text(json.dumps({**lines[0], "count": 3}))

    def write(self, *_):
        raise OutputError("the disk is full")

    monkeypatch.setattr("mlx_zimage.generate.Files.save", write)
    result = run("generate", "-m", "pocket", "--requests", "jobs.jsonl", "--steps", "1")
    assert result.exit_code == 6 and "Error: jobs.jsonl, line 1, image 1 of 3: the disk is full" in result.stderr


@pytest.mark.parametrize(
    ("size", "sides"),
    [(["--width", "32"], (32, 128)), slow(["--size", "3:2"], (160, 112)), slow(["--size", "64x32"], (64, 32))],
)
def test_generate_plan_and_bench_take_the_same_sizes_and_counts(run, size, sides):
    result = run("generate", PROMPT, "-m", "pocket", "--steps", "1", *size, "--count", "2")
    assert [Image.open(name).size for name in result.stdout.splitlines()] == [sides] * 2
    shown = run("plan", "pocket", *size, "--count", "2").stdout
    assert shown.startswith(f"2 images of {sides[0]}x{sides[1]}, 1 at a time, ")
    options = ["--steps", "1", "--tokens", "8", "--count", "1", "--json", "-"]
    report = json.loads(run("bench", "--model", "pocket", *size, *options).stdout)
    assert (report["case"]["width"], report["case"]["height"], report["repeat"]) == (*sides, 1)


def test_equal_drafts_are_planned_once_and_started_at_once(run, watch):
    planned = watch(ZImagePipeline, "plan")
    lines = [json.dumps({"prompt": PROMPT, "steps": steps}) for steps in (1, 2, 1)]
    assert run("generate", "--requests", "-", *SMALL, "--count", "2", input="\n".join(lines)).exit_code == 0
    assert len(planned) == 2


# ---- values that change nothing


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (["--negative-prompt", "blue"], "the negative prompt changes nothing, since guidance is 0, as Turbo requires"),
        (["--guidance", "2"], "guidance is 2, but Turbo was trained to work without"),
        (["--cfg-truncation", "0.5"], "cfg truncation changes nothing, since guidance is 0, as Turbo requires"),
        (["--cfg-normalization", "1"], "cfg normalization changes nothing, since guidance is 0, as Turbo requires"),
        (
            ["--variant", "base", "--guidance", "0", "--negative-prompt", "a"],
            "the negative prompt changes nothing, since guidance is 0; try a guidance of 4",
        ),
        (["--latents", "noise.npy", "--seed", "3"], "--seed changes nothing: --latents replaces the noise"),
        (["--latents", "noise.npy", "--rng", "mlx"], "--rng changes nothing: --latents replaces the noise"),
        (["--latents", "noise.npy", "--count", "2"], "requests that differ only in their seeds will give the same"),
        (["--requests", "own.jsonl", "--seed", "1"], "--seed changes nothing: each of the requests has its own seed"),
        (
            ["--requests", "own.jsonl", "--guidance", "0"],
            "--guidance changes nothing: each of the requests has its own",
        ),
    ],
)
def test_a_value_that_changes_nothing_warns(run, options, warning):
    import numpy as np

    np.save("noise.npy", np.zeros((1, 16, 4, 4), np.float32))
    Path("own.jsonl").write_text(json.dumps({"prompt": PROMPT, "seed": 1, "guidance": 0}))
    prompt = [] if "--requests" in options else [PROMPT]
    result = run("generate", *prompt, *SMALL, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count(f"Warning: {warning}") == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="there it locks memory")
def test_wiring_warns_except_on_macos(run):
    assert "--wired changes nothing here" in run("generate", PROMPT, *SMALL, "--wired").stderr


# ---- pocket's world


def test_a_prompt_beyond_pocket_is_answered_once_with_what_it_knows(run):
    result = run("generate", "a lighthouse at dusk, 灯塔", *QUICK, "--count", "2")
    (warning,) = re.findall("Warning: .*", result.stderr)
    assert (
        "pocket does not know 'lighthouse', 'dusk', '灯', ..., so the image may be blank; it knows circles" in warning
    )
    assert "Warning" not in run("generate", PROMPT, *QUICK).stderr
    checkpoint = open_checkpoint("pocket")
    for prompt in ("red", "a big picture on a white background", "中心的红色", "\N{BALLOON}"):
        (note,) = notes(GenerateRequest(prompt, 128, 128, seed=1, steps=1), checkpoint)
        assert "the prompt names none of pocket's shapes, so the image may be blank; it knows circles" in note
    run("convert", "pocket", "small", "--q-bits", "4")
    assert "pocket does not know 'cat'" in run("generate", "a cat", "-m", "small", *QUICK[2:]).stderr


def test_a_size_beyond_pocket_gives_one_warning(run):
    (warning,) = re.findall("Warning: .*", run("generate", PROMPT, *QUICK, "--size", "96x96", "--count", "2").stderr)
    assert "pocket knows sizes near 128x128, 192x128 and 160x160, so an image of 96x96 may be blank" in warning


def test_pocket_knows_sizes_near_those_that_it_was_trained_at():
    checkpoint = open_checkpoint("pocket")
    for width, height, known in ((224, 224, 0), (64, 224, 0), (176, 96, 1), (112, 112, 1), (224, 128, 1)):
        request = GenerateRequest(PROMPT, width, height, seed=1, steps=1)
        assert len(list(notes(request, checkpoint))) == 1 - known
        from_an_image = replace(request, image="0" * 64)
        assert len(list(notes(from_an_image, checkpoint))) == 1 - known
        assert not [*notes(replace(from_an_image, upscale=2), checkpoint)], "it is refined in tiles"


def test_pockets_words_are_those_of_the_captions_that_it_was_trained_on(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples/pocket"))
    import captions
    import scenes

    rng = random.Random(0)
    said = [captions.describe(rng, scenes.sample_scene(rng)) for _ in range(8_000)]
    assert not [text for text in said if unknown_to_pocket(text)]
    assert not [text for text in said if not POCKET_SHAPES.search(text.lower())]
    assert set(re.findall("[a-z]+|[0-9]", " ".join(said).lower())) == POCKET_WORDS
    assert set(re.findall("[\u4e00-\u9fff]", "".join(said))) == POCKET_CHARACTERS
