"""What README.md tells people to type is run here, but for installing, which .ci/run does."""

import doctest
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_zimage.convert import convert

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def offline(block: str, model: str | Path = "pocket", peaks: str = "") -> str:
    """The pocket model stands in for the published one, which is 33 GB, and for random weights of its size."""
    stand_ins = {
        "--model pocket": f"--model {model}",
        "Tongyi-MAI/Z-Image-Turbo": str(model),
        "mlx-zimage bench": "mlx-zimage bench --model pocket --size 32x32 --steps 1 --tokens 8 --repeat 1",
        "python examples/full_size.py": f"mlx-zimage convert {model}",  # test_examples.py runs it
        "python examples/peaks.py": f"{sys.executable} {ROOT}/examples/peaks.py{peaks}",
        " 1024 1024:1GB 2048:2.5GB": " 32 32:1GB 48:2.5GB",
    }
    for text, stand_in in stand_ins.items():
        block = block.replace(text, stand_in)
    return block


def test_the_first_command_installs_and_draws_and_the_second_installs_and_tests():
    first, second = (block for block in blocks("sh") if ".venv" in block and "cuda" not in block)
    assert (first, second) == tuple(blocks("sh")[:2])
    assert re.fullmatch(r"python3 .*/pip install \. && .*/mlx-zimage generate .* --model pocket .*\n", first)
    assert second.strip().endswith(".venv/bin/pytest")
    # .ci/run takes them from this page, by their place
    assert "readme_block sh 1" in (ROOT / ".ci/run").read_text()
    assert "readme_block sh 2" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("size", ["64x64", pytest.param("its own", marks=pytest.mark.slow)])
def test_the_commands_work_as_they_stand(tmp_path, small_pocket, size):
    model, side, peaks = (small_pocket, 64, " --steps 2") if size == "64x64" else ("pocket", 128, "")
    command = tmp_path / "bin/mlx-zimage"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlx_zimage "$@"\n')
    command.chmod(0o755)
    # as after a first run, which test_first_run.py runs
    convert(model, tmp_path / "home/Z-Image-Turbo-bf16")
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLX_ZIMAGE_HOME": str(tmp_path / "home")}
    stdout = ""
    for block in blocks("sh"):
        if ".venv" in block:
            continue
        result = subprocess.run(
            ["sh", "-eu", "-c", offline(block, model, peaks)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{block}\n{result.stderr}"
        stdout += result.stdout
    assert "4-bit affine" in stdout
    assert "budget      networks predicted measured" in stdout
    assert "z-image-4bit is intact (all checksums match)" in stdout
    assert Image.open(tmp_path / "lighthouse.png").size == (side, side)
    assert Image.open(tmp_path / "image.png").size == Image.open(tmp_path / "again.png").size == (side, side)
    assert Image.open(tmp_path / "image-1.png").size == ((160, 112) if side == 128 else (80, 48))
    assert len(list(tmp_path.glob("two-green-squares-on-a-white-background-*.webp"))) == 2


def test_the_programs_work_as_they_stand(tmp_path):
    printed = []
    for block in blocks("python"):
        result = subprocess.run([sys.executable, "-c", offline(block)], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stderr}"
        printed.append(result.stdout)
    drawn = np.asarray(Image.open(tmp_path / "circle.png"), dtype=int)
    assert drawn[64, 64, 0] > drawn[64, 64, 2] + 100, "a red circle"
    assert drawn[8, 8, 2] > drawn[8, 8, 0] + 100, "on blue"
    assert "step 4 of 4, sigma 0.00\npixels (128, 128, 3)" in printed[1]
    assert (tmp_path / "pocket-8bit/model_index.json").is_file()


def test_installing_for_an_nvidia_gpu():
    (block,) = (block for block in blocks("sh") if "cuda" in block)
    assert "'.[cuda]'" in block
    # they fetch 3 GB for another machine: only their syntax is tested
    assert subprocess.run(["sh", "-n", "-c", block]).returncode == 0


def test_the_file_map_names_files_that_exist():
    (listing,) = blocks("text")
    package, rest = listing.split("convert/", 1)
    for name in re.findall(r"\b(\w+\.py)\b", package):
        assert (ROOT / "mlx_zimage" / name).is_file() or (ROOT / "mlx_zimage/models" / name).is_file(), name
    for name in re.findall(r"^(\S+) ", "convert/" + rest, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_the_exit_codes_told_are_those_of_the_errors():
    from mlx_zimage import cli, errors

    codes = {error.exit_code for error in vars(errors).values() if isinstance(error, type)}
    for text in (README, cli.main.help):
        (sentence,) = re.findall(r"Exit codes: (.*?)\.\s", text, re.DOTALL)
        assert codes <= {int(code) for code in re.findall(r"\b(\d+)\s", sentence)}


def test_help_of_the_package_is_a_tutorial_that_works(tmp_path, monkeypatch):
    import mlx_zimage

    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(mlx_zimage, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0 and result.attempted > 10
    assert Image.open("circle.png").size == (128, 128)
    told = pydoc.plain(pydoc.render_doc(mlx_zimage))
    for name in mlx_zimage.__all__[:-1]:
        first_line = vars(getattr(mlx_zimage, name))["__doc__"].splitlines()[0]
        assert first_line.endswith((".", ":")) and f" |  {first_line}\n" in told, name
