"""The models on this machine: where they are, how much room the first one takes, listing and removing them."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hub import GENERATE

from mlx_zimage.cli.generate import DEFAULT_MODEL
from mlx_zimage.convert import convert
from mlx_zimage.errors import ModelNotFoundError, OutputError
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.weights import library
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.hub import argument
from mlx_zimage.weights.hub import name_of as hub_name
from mlx_zimage.weights.library import Disk, FirstRun, check_space, choose_bits, disks


def test_models_lists_what_can_be_used_by_id_and_models_rm_frees_the_rest(run):
    hub = run.cache / "hub"
    assert run(*GENERATE, "--model", DEFAULT_MODEL).returncode == 0
    (repository,) = hub.glob("models--*")
    (snapshot,) = repository.glob("snapshots/*")
    assert run(*GENERATE, "--model", snapshot, "-o", "path.png").returncode == 0
    assert read_origin(run.work / "path.png").model == DEFAULT_MODEL, "not its commit"
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert hub_name(snapshot / file) == f"{DEFAULT_MODEL}:{file}", "not its checksum"
    assert argument(snapshot / file) == f"{DEFAULT_MODEL}:{file}", "which a command takes"

    (repository / "refs/main").unlink()  # as the client leaves it after fetching one commit
    listed = json.loads(run("models", "--json").stdout.splitlines()[1])
    assert (listed["name"], listed["complete"]) == (DEFAULT_MODEL, True)
    assert run.process(*GENERATE, "--model", DEFAULT_MODEL, HF_HUB_OFFLINE="1").returncode == 0, "the only snapshot"

    weights = snapshot / "transformer/diffusion_pytorch_model.safetensors"
    freed = weights.resolve().stat().st_size
    weights.resolve().unlink()  # leaves a link to nothing
    assert run("models").stdout.endswith(f"hub       {DEFAULT_MODEL}  (incomplete)\n")
    left = sum(path.stat().st_size for path in repository.rglob("*") if path.is_file() and not path.is_symlink())
    assert freed > 9e6 and left > 3e6
    assert run("models", "rm", DEFAULT_MODEL).stdout == f"Freed {left / 1e6:.2f} MB\n"
    assert not repository.exists() and run("models").stdout.endswith("package   pocket\n")


def test_models_lists_the_folders_that_convert_wrote(run):
    assert run("convert", "pocket", "beside", "--q-bits", "4").returncode == 0
    here, moved = run.work / "beside", run.work / "moved"
    assert f"converted {here}\n" in run("models").stdout
    here.rename(moved)
    assert "converted" not in run("models").stdout
    assert run(*GENERATE, "--model", "moved").returncode == 0
    assert f"converted {moved}\n" in run("models").stdout, "since it was used there"

    (moved / "mine.txt").write_text("mine")
    elsewhere = shutil.copytree(moved, run.work / "elsewhere/moved")
    assert run(*GENERATE, "--model", elsewhere).returncode == 0
    freed = run("models", "rm", "moved")  # the one in this folder, not the other of that name
    assert re.fullmatch(r"Freed 7\.\d\d MB\n", freed.stdout), freed.stderr
    assert [path.name for path in moved.rglob("*")] == ["mine.txt"] and (elsewhere / "model_index.json").is_file()
    shutil.copytree(elsewhere, run.work / "third/moved")
    assert run(*GENERATE, "--model", "third/moved").returncode == 0
    refused = run("models", "rm", "moved")
    assert refused.returncode == 2 and "elsewhere/moved and /" in refused.stderr
    assert run("models", "rm", "third/moved").returncode == 0


def test_plan_without_a_model_needs_no_network(run, hub):
    result = run("plan", "--memory", "12GB", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    rows = {line[:8].strip(): line for line in result.stdout.splitlines()}
    assert "20.52 GB" in rows["bfloat16"] and "11.48 GB" in rows["8 bits"] and "6.65 GB" in rows["4 bits"]
    assert "blocks streamed from disk in each step" in rows["bfloat16"]
    assert "kept in memory between images" in rows["4 bits"] and "converts the model to 6 bits" in result.stdout
    assert hub.seen == []


def test_disks_without_room_are_refused_before_downloading(tmp_path, monkeypatch):
    plan = FirstRun("a/b", 33 * 10**9, 4, 7 * 10**9, tmp_path / "hub", tmp_path / "home/b-4bit")
    usage = type("usage", (), {"free": 40 * 10**9})
    monkeypatch.setattr(library.shutil, "disk_usage", lambda _: usage)
    assert disks(plan) == [Disk(40 * 10**9, 33 * 10**9, 7 * 10**9)]
    check_space(disks(plan))
    usage.free -= 1
    with pytest.raises(OutputError, match=r"40\.0 GB of disk space .* needed, but only 40\.0 GB .* free"):
        check_space(disks(plan))
    if os.path.ismount("/proc"):  # another disk
        assert disks(replace(plan, dest=Path("/proc/b-4bit"))) == [
            Disk(usage.free, download=33 * 10**9), Disk(usage.free, converted=7 * 10**9),
        ]  # fmt: skip


@pytest.mark.parametrize(("budget_gb", "bits"), [(96, None), (24, None), (16, 8), (10.7, 6), (8, 4), (5, 4)])
def test_bits_are_chosen_to_leave_room_in_memory(budget_gb, bits):
    sizes = {None: 20_522_393_030, 8: 11_475_967_430, 6: 9_063_000_000, 4: 6_651_207_110}
    assert choose_bits(sizes, budget_gb * 10**9) == bits


def test_without_a_home_the_user_is_asked_to_set_a_folder(monkeypatch):
    monkeypatch.delenv("MLX_ZIMAGE_EMBEDDINGS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")
    for given in ("~nobody-of-this-name/models", ""):
        monkeypatch.setenv("MLX_ZIMAGE_HOME", given)
        with pytest.raises(ModelNotFoundError, match="set MLX_ZIMAGE_HOME to a folder"):
            library.home()
        assert library.embeddings_folder() is None


def test_values_in_the_environment_mean_what_they_say(monkeypatch):
    monkeypatch.delenv("MLX_ZIMAGE_HOME", raising=False)
    for off in ("off", "OFF", " Off ", "0", "no", "False"):
        monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", off)
        assert library.embeddings_folder() is None
    for relative in ("cache", ".", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert library.home() == Path("~/.cache/mlx-zimage").expanduser(), "to be ignored, says the specification"


def test_pocket_cannot_be_removed():
    with pytest.raises(ModelNotFoundError, match="part of the package"):
        library.remove("pocket")


def test_the_predicted_size_is_the_size_that_is_written(tmp_path):
    for bits in (None, 8, 4):
        folder = convert("pocket", tmp_path / str(bits), bits=bits)
        written = sum(component.nbytes for component in open_checkpoint(folder).components)
        configs = {part.name: part.raw_config for part in open_checkpoint("pocket").components}
        assert library.planned(bits, configs).nbytes == written
