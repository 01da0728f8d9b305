"""Every command and program on every page is run here, or parsed where it needs the real model or another machine."""

import doctest
import os
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from math import ceil
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
import pytest
from lanes import slow
from PIL import Image
from test_cli_lora import write as write_lora
from test_macs import Mac, stand_in

from mlx_zimage import cli
from mlx_zimage.convert import convert
from mlx_zimage.machine import default_dtype, machine_budget
from mlx_zimage.memory import Planner, Workload
from mlx_zimage.variants import MEMORIES, TURBO
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.library import CHOICES, DOWNLOAD, bits_for, choose_bits, planned

ROOT = Path(__file__).parents[1]
SETTINGS = cli.main.context_settings  # of every context: click keeps the help option that the first one asks for
PAGES = [
    *("README.md", "CONTRIBUTING.md", "convert/README.md"),
    *sorted(f"examples/{page.name}" for page in (ROOT / "examples").glob("*.md")),
    "examples/pocket/README.md",
]
# Pages whose commands take a long time, and the model to run them with. Every run parses them; only the slow tests run
# them.
SLOW = {
    **dict.fromkeys(("examples/guided-images.md", "examples/lora.md", "examples/measure-your-mac.md"), "pocket"),
    **dict.fromkeys(("convert/README.md", "examples/reference.md", "examples/several-macs.md"), "light"),
    **dict.fromkeys(("examples/coming-from-diffusers.md", "examples/coming-from-mflux.md"), "light"),
}
# What needs another machine or takes a long time: these lines are only parsed. .ci/run runs the installation.
PARSED = re.compile(
    r"git clone|\bpip\b|pytest|\.ci/|pre-commit|examples/pocket/|--upload-repo|--report|pipx|--server|"
    r"mlx-zimage (serve|train)|mlx\.launch|^curl|launchctl|"  # test_server_clients.py runs those of curl
    r"examples/(full_size|quality|sensitivity)\.py"  # test_examples.py and test_convert_quality.py have small ones
)
STAND_INS = {  # random weights of full size take minutes
    "mlx-zimage bench --q-bits 4 --size 512x512 --count 1": "mlx-zimage bench --model pocket --size 32x32 --steps 1 "
    "--tokens 8 --repeat 1",
    "mlx-zimage lora info": "mlx-zimage lora info --model pocket",  # the LoRA below is for pocket
    "mlx-zimage lora convert": "mlx-zimage lora convert --model pocket",
    "python examples/measured_row.py": f"{sys.executable} {ROOT}/examples/measured_row.py",
    "python examples/peaks.py random-4bit 1024 1024:1GB 2048:2.5GB": f"{sys.executable} {ROOT}/examples/peaks.py "
    "z-image-4bit 32 32:1GB 48:2.5GB --steps 2",
}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", read(page), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


def lines(block: str) -> list[list[str]]:
    """The words of each command of a block, a pipe's parts one by one."""
    joined = block.replace("\\\n", " ")
    commands = [part for line in joined.splitlines() for part in re.split(r" (?:&&|\|) ", line)]
    return [words for command in commands if (words := shlex.split(command, comments=True))]


def parse(words: list[str]) -> None:
    """Fail where a command names a file, a command or an option that does not exist."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # the environment
        words = words[1:]
    program = words[0]
    if program == "mlx.launch":
        parse(words[words.index("--") + 1 :])
    elif program.endswith("mlx-zimage"):
        name, command, rest = cli.main.resolve_command(click.Context(cli.main), words[1:])
        while isinstance(command, click.Group) and rest:
            name, command, rest = command.resolve_command(click.Context(command), rest)
        command.make_parser(click.Context(command, info_name=name, **SETTINGS)).parse_args(rest)
    elif program in ("python", ".venv/bin/python") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), words
    elif program.startswith(".ci/"):
        assert (ROOT / program).is_file(), words


@pytest.fixture
def shell(tmp_path):
    """Run blocks in a folder with a LoRA and an empty home, whose Hugging Face cache holds a model under the name
    Z-Image-Turbo."""
    command = tmp_path / "bin/mlx-zimage"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlx_zimage "$@"\n')
    command.chmod(0o755)
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    repository = home / ".cache/huggingface/hub/models--Tongyi-MAI--Z-Image-Turbo"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    unset = ("HF_", "HUGGING", "XDG_", "MLX_ZIMAGE")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(unset)},
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }

    def shell(block: str, model: Path) -> str:
        if not (repository / "snapshots").exists():
            shutil.copytree(model, repository / "snapshots" / revision)
            write_lora(work / "style.safetensors")
        for text, instead in STAND_INS.items():
            block = block.replace(text, instead)
        block = block.replace("--model pocket", f"--model {model}")
        result = subprocess.run(["sh", "-eu", "-c", block], cwd=work, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stderr}"
        return result.stdout

    shell.home, shell.work = home, work
    return shell


def first_run(home: Path, model: Path) -> Path:
    """What a first run leaves in a home; test_first_run.py does such a run."""
    return convert(model, home / ".cache/mlx-zimage/Z-Image-Turbo-4bit", bits=4)


# ---- README.md


def test_the_second_block_installs_and_generates_and_the_third_installs_and_tests():
    clone, first, second = blocks("README.md", "sh")[:3]
    assert clone.startswith("git clone ")
    assert re.fullmatch(r"python3 .*/pip install \. && .*/mlx-zimage generate .* --model pocket .*\n", first)
    assert second.strip().endswith(".venv/bin/pytest")
    # .ci/run takes them from this page, by their place
    assert "page_block README.md sh 2" in read(".ci/run")
    assert "page_block README.md sh 3" in read(".ci/run")


def test_it_is_read_in_two_minutes():
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.slow
def test_its_commands_work_as_they_stand(shell):
    converted = first_run(shell.home, POCKET)
    *before, uninstalling = [block for block in blocks("README.md", "sh") if not PARSED.search(block)]
    for block in before:
        shell(block, POCKET)
    images = {file.name: Image.open(file).size for file in shell.work.iterdir() if file.suffix != ".safetensors"}
    assert images == {
        "image.png": (128, 128),
        "lighthouse.png": (160, 112),
        **{f"a-lighthouse-at-dusk-{seed}.webp": (128, 128) for seed in (1, 2, 3)},
        "image-1.png": (128, 128),
        "image-2.png": (160, 112),
        "image-3.png": (144, 112),  # at most as many pixels as the model's default size
    }
    shell("mlx-zimage completion zsh --install; mlx-zimage completion bash --install", POCKET)
    listed = shell(uninstalling, POCKET)
    assert str(converted) in listed and "Tongyi-MAI/Z-Image-Turbo" in listed
    left = [path for path in shell.home.rglob("*mlx*zimage*")] + [path for path in shell.home.rglob("*Z-Image*")]
    assert not [path for path in left if ".locks" not in path.parts]


def test_its_programs_work_as_they_stand(tmp_path):
    printed = [run_python(block, tmp_path) for block in blocks("README.md", "python")]
    generated = np.asarray(Image.open(tmp_path / "circle.png"), dtype=int)
    assert generated[64, 80, 0] > generated[64, 80, 2] + 100, "a red circle"
    assert generated[8, 8, 2] > generated[8, 8, 0] + 100, "on blue"
    # on a GPU it is computed in another dtype
    shown = np.asarray(Image.open(ROOT / "examples/pocket/circle.png"), dtype=int)
    assert np.abs(generated - shown).mean() < 5, "the image on the page, which has the same prompt and seed"
    assert "step 4 of 4, sigma 0.00\npixels (128, 128, 3)" in printed[1]


def run_python(block: str, folder: Path) -> str:
    result = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, f"{block}\n{result.stderr}"
    return result.stdout


CHIPS = ("Apple M1", "Apple M4")  # one computes in float16, the other in bfloat16


def test_its_table_of_memory_is_what_the_planner_computes(tmp_path, monkeypatch):
    checkpoints = {bits: planned(bits) for bits in CHOICES}
    sizes = {bits: checkpoint.nbytes for bits, checkpoint in checkpoints.items()}
    work = Workload(TURBO.size, TURBO.size, images=1, tokens=512, steps=TURBO.steps)
    rows = []
    for gigabytes in MEMORIES:
        plans = []
        for chip in CHIPS:
            stand_in(monkeypatch, Mac.of(chip, gigabytes), tmp_path)
            bits = choose_bits(sizes, machine_budget())
            assert bits == bits_for(gigabytes), "what convert --for gives"
            planner = Planner(checkpoints[bits], getattr(mx, default_dtype()))
            plans.append(planner.plan(work, machine_budget()))
        peak = max(plan.peak for plan in plans)
        stays = "kept in memory" if all(plan.keep for plan in plans) else "loaded for every image"
        assert not any(plan.streamed for plan in plans)
        command = f"mlx-zimage convert z-image-turbo z-image-{bits or 16}bit"
        command += f" --q-bits {bits}" if bits else ""
        cells = [
            f"{gigabytes} GB" + " and more" * (gigabytes == 64),
            f"{bits or 16}",
            f"{sizes[bits] / 1e9:.1f} GB",
            f"{DOWNLOAD / 1e9:.0f} GB",
            f"{ceil(peak / 1e8) / 10:.1f} GB",
            stays,
            f"`{command}`",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(rows)
    assert re.search(r"^\| Memory .*\n\| --- .*\n((\|.*\n)+)", read("README.md"), re.MULTILINE)[1].strip() == table, (
        table
    )


# ---- every page


@pytest.fixture
def model(request) -> Path:
    """light_pocket or POCKET, by its name."""
    return request.getfixturevalue("light_pocket") if request.param == "light" else POCKET


@pytest.mark.parametrize(
    ("page", "model"),
    [slow(page, SLOW[page]) if page in SLOW else (page, "light") for page in PAGES if page != "README.md"],
    indirect=["model"],
)
def test_the_commands_and_programs_of_the_other_pages_work_as_they_stand(page, shell, model):
    first_run(shell.home, model)
    for block in blocks(page, "sh"):
        if PARSED.search(block):
            continue
        shell(block, model)
    for block in blocks(page, "python"):
        if "openai" in block:  # test_server_clients.py uses the SDK
            compile(block, page, "exec")
        else:
            run_python(block, shell.work)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_that_the_tests_know(page):
    fences = re.findall(r"^ *```(.*)$", read(page), re.MULTILINE)[::2]
    known = {"sh", "python", "json"}
    others = [language for language in fences if language not in known]
    assert others == {"CONTRIBUTING.md": ["text", "text"], "examples/pocket/README.md": ["text"]}.get(page, [])
    assert len(fences) == sum(len(blocks(page, language)) for language in {*fences})


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_exists(page):
    text = read(page)
    for block in blocks(page, "sh"):
        subprocess.run(["sh", "-n", "-c", block], check=True)
        for words in lines(block):
            parse(words)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(mlx-zimage [^`]+)`", prose):
        parse(shlex.split(code))
    # in a table of another program's flags, the first column is that program's
    ours = re.sub(r"^\| `-.*? \| ", "", prose, flags=re.MULTILINE) if "mflux" in page else prose
    programs = "".join(file.read_text(encoding="utf-8") for file in (ROOT / page).parent.glob("*.py"))
    for flag in re.findall(r"(?<![\w`-])`(--[a-z][a-z-]*)[ `]", ours):
        assert flag in FLAGS or f'"{flag}"' in programs, f"{page}: {flag}"


def options(command: click.Command) -> set[str]:
    subcommands = command.commands.values() if isinstance(command, click.Group) else ()
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options(each) for each in subcommands), {"--help"})


def resolved(name: str) -> click.Command:
    return cli.main.resolve_command(click.Context(cli.main), [name])[1]


FLAGS = set().union(*(options(resolved(name)) for name in cli.COMMANDS))


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            anchors = {
                re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            }
            assert heading in anchors, target


def test_the_exit_codes_listed_are_those_of_the_errors():
    from mlx_zimage import errors

    codes = {error.exit_code for error in vars(errors).values() if isinstance(error, type)}
    (sentence,) = re.findall(r"Exit codes: (.*?)\.\s", cli.main.help, re.DOTALL)
    assert codes <= {int(code) for code in re.findall(r"\b(\d+)\s", sentence)}
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", read("examples/reference.md"), re.MULTILINE)}
    assert listed == codes | {0, 129, 130, 143}


def test_the_reference_lists_every_environment_variable_that_is_read():
    source = "".join(
        file.read_text(encoding="utf-8")
        for folder in ("mlx_zimage", "convert")
        for file in (ROOT / folder).rglob("*.py")
    )
    ours = re.compile(r"\bMLX_ZIMAGE_[A-Z_]+")
    assert set(ours.findall(source)) == set(ours.findall(read("examples/reference.md")))


def test_the_reference_lists_every_key_of_the_json_of_an_image(tmp_path):
    import json

    options = "--model pocket --size 32x32 --steps 1 --seed 1 --json -q"
    result = subprocess.run(
        [sys.executable, "-m", "mlx_zimage", "generate", "a red circle", *options.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    section = read("examples/reference.md").split("## JSON\n")[1].split("\n## ")[0]
    keys = {key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    assert keys == set(json.loads(result.stdout))


def test_help_of_the_package_is_a_tutorial_that_works(tmp_path, monkeypatch):
    import mlx_zimage

    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(mlx_zimage, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0 and result.attempted > 10
    assert Image.open("circle.png").size == (128, 128)
    shown = pydoc.plain(pydoc.render_doc(mlx_zimage))
    for name in mlx_zimage.__all__[:-1]:
        first_line = vars(getattr(mlx_zimage, name))["__doc__"].splitlines()[0]
        assert first_line.endswith((".", ":")) and f" |  {first_line}\n" in shown, name
