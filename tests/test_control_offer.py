"""`--control` without a ControlNet offers to download the lite one, against a local server."""

import os
import pty

import controls
import pytest
from lanes import slow
from PIL import Image
from safetensors.numpy import save_file

from mlx_zimage.cli.controls import LITE
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.sizes import size

REPOSITORY, _, FILE = LITE.partition(":")


@pytest.fixture
def generate(run, hub, tiny_folder, tmp_path):
    """generate(...) follows a control image, for a user who has the tiny model, but no ControlNet."""
    published = tmp_path / "published"
    published.mkdir()
    save_file(controls.weights(0, "control_lite"), published / FILE)
    (published / "README.md").write_text("A ControlNet for the tiny model.")
    save_file(controls.weights(0, "control_v21"), published / "another.safetensors")
    hub.serve(published, REPOSITORY)
    Image.new("RGB", (32, 32)).save(run.work / "line.png")
    words = ["generate", "a fox", "--model", tiny_folder, "--control", "line.png", "--steps", "1", "--seed", "1"]

    def call(*options, stdin=None, **variables):
        if stdin is None:
            return run(*words, *options, **variables)
        return run.process(*words, *options, stdin=stdin, **variables)

    return call


def test_without_a_terminal_it_is_named_with_its_size_and_the_hub_is_not_asked(generate, hub):
    result = generate()
    assert (result.returncode, result.stdout) == (3, "")
    assert f"--control needs a ControlNet; --yes downloads {LITE} (2.02 GB)" in result.stderr
    assert "--control-model takes a file, a folder" in result.stderr and not hub.seen


def test_a_repository_without_exactly_one_file_is_refused_and_the_error_says_what_it_has(generate, hub, tmp_path):
    several = generate("--control-model", REPOSITORY)
    assert several.returncode == 3
    choose = f"{REPOSITORY} has 2 safetensors files; choose one: {REPOSITORY}:{FILE}; {REPOSITORY}:another.safetensors"
    assert choose in several.stderr
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/README.md").write_text("Nothing else.")
    hub.serve(tmp_path / "bare", "me/bare")
    bare = generate("--control-model", "me/bare")
    assert bare.returncode == 3 and "me/bare has no safetensors file; expected a ControlNet" in bare.stderr


@pytest.mark.parametrize(("answer", "code"), [slow(b"n\n", 3), (b"\n", 0)])
def test_on_a_terminal_it_asks_before_the_weights_are_downloaded(generate, hub, run, answer, code):
    master, slave = pty.openpty()
    try:
        os.write(master, answer)
        result = generate(stdin=slave)
    finally:
        os.close(master)
        os.close(slave)
    assert result.returncode == code, result.stderr
    nbytes = hub.repositories[REPOSITORY][FILE].stat().st_size
    question = f"--control needs a ControlNet. The download of {LITE} takes {size(nbytes)}.\nContinue? [Y/n]: "
    assert result.stderr.startswith(question), "and nothing before that, such as a client's warnings"
    assert (FILE in hub.sent, (run.work / "image.png").exists()) == (not code, not code)
    assert ("nothing was downloaded; --control-model takes" in result.stderr) == bool(code)
    assert not {"README.md", "another.safetensors"} & hub.sent.keys()


def test_once_downloaded_it_is_used_without_asking_and_without_a_network(generate, run):
    assert generate("--yes").returncode == 0
    for variables in ({"HF_HUB_OFFLINE": "1"}, {}):
        result = generate("--yes", **variables)
        assert result.returncode == 0 and "To download" not in result.stderr, result.stderr
        assert f"ControlNet {LITE}: ControlNet Union 2.1 lite (8-steps)" in result.stderr
    assert len({read_origin(path).request.controlnet for path in run.work.glob("image*.png")}) == 1


def test_without_a_network_the_error_says_what_is_missing(generate, run):
    result = generate("--yes", HF_HUB_OFFLINE="1")
    assert result.returncode == 3 and f"{REPOSITORY} is not a local folder" in result.stderr, result.stderr
    assert "check the network and HF_HUB_OFFLINE" in result.stderr and not list(run.work.glob("image*"))
