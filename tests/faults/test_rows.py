"""Whatever is wrong with a model's files, every command exits with code 4, and leaves nothing behind."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from compare import refusal

from mlx_zimage.cli import main

pytestmark = pytest.mark.slow  # many processes, or many inputs

VAE = "vae/diffusion_pytorch_model.safetensors"


def run(*args: object):
    ended = CliRunner().invoke(main, [str(arg) for arg in args])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def seven_bytes(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:7])


def a_page(file: Path) -> None:
    file.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


def a_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def an_endless_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 200 * 2**20) + file.read_bytes()[8:])


def bad_json(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:9] + b"}" + content[10:])


def a_missing_tensor(file: Path) -> None:
    arrays = mx.load(str(file))
    mx.eval(arrays)
    del arrays["decoder.conv_in.bias"]
    mx.save_safetensors(str(file), arrays)


def missing(file: Path) -> None:
    file.unlink()


def a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Trap(file.with_name("executed")), protocol=2))


def a_pickle_by_its_name(file: Path) -> None:
    a_pickle(file)
    file.rename(file.with_suffix(".bin"))


DAMAGES = (cut, seven_bytes, a_page, a_pointer, an_endless_header, bad_json, a_missing_tensor, missing)


@pytest.mark.parametrize("spoil", [*DAMAGES, a_pickle, a_pickle_by_its_name])
def test_a_damaged_shard_ends_every_command_with_exit_code_4(folder, tmp_path, spoil):
    spoil(folder / VAE)
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ["generate", "a fox", "--model", folder, "-o", tmp_path / "fox.png"],
        ["convert", folder, tmp_path / "out"],
        ["verify", folder],
        ["info", folder],
        ["plan", folder],
    ):
        ended = run(*command)
        assert ended.exit_code == 4, (command[0], ended.output)
        assert "vae" in ended.output
    assert sorted(tmp_path.rglob("*")) == before  # no image, no folder, and nothing that a pickle made


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_weights_that_are_not_finite_are_neither_converted_nor_verified_nor_shown(folder, tmp_path, value):
    arrays = mx.load(str(folder / VAE))
    mx.eval(arrays)
    mx.save_safetensors(str(folder / VAE), arrays | {"decoder.conv_out.bias": mx.full((3,), value, mx.bfloat16)})
    assert run("convert", folder, tmp_path / "out").exit_code == 8
    assert run("verify", folder).exit_code == 4
    image = tmp_path / "fox.png"
    assert run("generate", "a fox", "--model", folder, "-o", image, "--size", "32x32", "--steps", 1).exit_code == 8
    assert not (tmp_path / "out").exists() and not image.exists()


def test_networks_whose_latents_differ_belong_to_different_models(folder):
    config = tiny.TRANSFORMER | {"in_channels": 8}
    shutil.rmtree(folder / "transformer")
    tiny.save_component(folder / "transformer", "transformer", tiny.weights(0, "transformer", config), config)
    assert "8 channels, but the VAE's have 16; they belong to different models" in refusal(folder)


def test_a_malicious_tokenizer_ends_in_exit_code_4(folder, tmp_path):
    file = folder / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}}))
    for command in (
        ["generate", "a fox", "--model", folder],
        ["convert", folder, tmp_path / "out"],
        ["verify", folder],
    ):
        assert run(*command).exit_code == 4
