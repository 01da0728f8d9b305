import base64
import io
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mlx_zimage.image import save
from mlx_zimage.preview import CHUNK, inline, protocol

PIXELS = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"WEZTERM_PANE": "0"}, "iterm"),
        ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-kitty"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"GHOSTTY_RESOURCES_DIR": "/x"}, "kitty"),
        ({"TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"KITTY_WINDOW_ID": "1", "TMUX": "/tmp/tmux"}, None),
        ({"WEZTERM_PANE": "0", "TERM": "screen-256color"}, None),
        ({}, None),
    ],
)
def test_terminals_are_known_by_their_variables(environment, found):
    assert protocol(environment) == found


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_iterm_is_sent_the_file(tmp_path, ending):
    path = save(PIXELS, tmp_path / f"a.{ending}")
    found = re.fullmatch(rb"\x1b\]1337;File=inline=1;size=(\d+):([\w+/=]+)\x07\n", inline(path, "iterm"))
    assert base64.b64decode(found[2]) == path.read_bytes()
    assert int(found[1]) == path.stat().st_size


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_kitty_is_sent_a_png_in_chunks(tmp_path, ending):
    path = save(PIXELS, tmp_path / f"a.{ending}")
    pieces = re.findall(rb"\x1b_G(?:(a=T,f=100,q=2),)?m=([01]);([^\x1b]*)\x1b\\", inline(path, "kitty"))
    assert [bool(keys) for keys, _, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [more for _, more, _ in pieces] == [b"1"] * (len(pieces) - 1) + [b"0"]
    assert len(pieces) > 1
    assert max(len(text) for _, _, text in pieces) <= CHUNK
    sent = Image.open(io.BytesIO(base64.b64decode(b"".join(text for _, _, text in pieces))))
    assert sent.format == "PNG"
    assert np.array_equal(sent, Image.open(path))


@pytest.mark.parametrize(("program", "shown"), [("WezTerm", True), ("none", False)])
def test_show_puts_the_picture_into_a_terminal_that_can(tmp_path, program, shown):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "mlx_zimage", "generate", "a", "-m", "pocket", "--steps", "1", "--show"]
    size = ["--width", "32", "--height", "32", "-q"]
    kept = {key: value for key, value in os.environ.items() if key not in ("TMUX", "TERM")}
    process = subprocess.Popen(
        command + size, cwd=tmp_path, env={**kept, "TERM_PROGRAM": program}, stdout=subprocess.PIPE, stderr=slave
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    assert process.stdout.read() == b"image.png\n", "pictures go to the terminal, not to stdout"
    assert process.wait() == 0
    assert (b"]1337;File=inline=1" in seen) == shown
    assert (b"shows no pictures" in seen) != shown


def test_show_sends_no_picture_into_a_file(tmp_path):
    command = [sys.executable, "-m", "mlx_zimage", "generate", "a", "-m", "pocket", "--steps", "1", "--show"]
    size = ["--width", "32", "--height", "32", "-q"]
    result = subprocess.run(
        command + size, cwd=tmp_path, env={**os.environ, "TERM_PROGRAM": "WezTerm"}, capture_output=True
    )
    assert (result.returncode, result.stdout) == (0, b"image.png\n")
    assert b"1337" not in result.stderr
