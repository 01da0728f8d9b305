import base64
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mlx_zimage import GenerateRequest, Step, ZImagePipeline, cli
from mlx_zimage.cli.watch import Watch
from mlx_zimage.images.codec import to_png
from mlx_zimage.images.preview import FileView, TerminalView, colours_of, sketch
from mlx_zimage.images.terminal import CHUNK, cells, inline, protocol
from mlx_zimage.pipeline import Phase

PIXELS = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
PNG = to_png(PIXELS)


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
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "dumb", "TERM_PROGRAM": "WezTerm"}, None),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, None),
        ({"TERM": "xterm-kitty", "NO_COLOR": ""}, "kitty"),
        ({}, None),
    ],
)
def test_terminals_are_recognized_by_their_environment_variables(environment, found):
    assert protocol(environment) == found


def test_iterm_receives_the_file_as_it_is():
    found = re.fullmatch(rb"\x1b\]1337;File=inline=1;size=(\d+):([\w+/=]+)\x07", inline(PNG, "iterm"))
    assert base64.b64decode(found[2]) == PNG
    assert int(found[1]) == len(PNG)


def kitty_images(sent: bytes) -> list[tuple[bytes, bytes]]:
    """The keys and the content of each image sent to kitty."""
    images = []
    for keys, more, text in re.findall(rb"\x1b_G(?:(a=[^;]*?),)?m=([01]);([^\x1b]*)\x1b\\", sent):
        assert len(text) <= CHUNK
        if keys:
            images.append((keys, []))
        images[-1][1].append(text)
        assert more == b"1" or len(text) < CHUNK or len(b"".join(images[-1][1])) % CHUNK == 0
    return [(keys, base64.b64decode(b"".join(texts))) for keys, texts in images]


def test_kitty_receives_a_png_in_chunks():
    sent = inline(PNG, "kitty")
    assert kitty_images(sent) == [(b"a=T,f=100,q=2", PNG)]
    assert sent.count(b"\x1b_G") > 1
    assert re.findall(rb"m=([01]);", sent) == [b"1"] * (sent.count(b"\x1b_G") - 1) + [b"0"]


# ---- previews of each step


@pytest.fixture(scope="module")
def pocket():
    return ZImagePipeline.from_pretrained("pocket")


@pytest.fixture(scope="module")
def colours(pocket):
    return colours_of(pocket.encode_image)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_a_preview_resembles_the_finished_image_from_the_first_step_on(pocket, colours):
    request = GenerateRequest("a red circle on a blue background", width=128, height=128, seed=1, steps=2)
    *steps, image = pocket.stream(request)
    expected = image.pixels.reshape(16, 8, 16, 8, 3).mean((1, 3))
    found = [similarity(sketch(step.clean, colours), expected) for step in steps]
    # Measured over 8 images of 8 steps: mean 0.94 and minimum 0.88 at the first step, 0.96 and 0.90 from the third on;
    # here 0.98 and 0.99.
    assert found[0] > 0.8 and found[1] > 0.9, found
    noisy = similarity(sketch(steps[0].latents, colours), expected)
    assert noisy < found[0] - 0.3, "the noisy latents show far less"


PROMPTS = [
    "a red circle on a blue background",
    "two green squares on a white background",
    "一个黄色的三角形",
    "an orange ring",
    "a big purple star on a black background",
    "three small pink hearts",
    "a blue cross in the center",
    "绿色背景上的白色菱形",
]


@pytest.mark.slow
def test_each_of_eight_steps_previews_the_finished_image(pocket, colours):
    found = []
    for seed, prompt in enumerate(PROMPTS):
        *steps, image = pocket.stream(GenerateRequest(prompt, width=128, height=128, seed=seed))
        expected = image.pixels.reshape(16, 8, 16, 8, 3).mean((1, 3))
        found.append([similarity(sketch(step.clean, colours), expected) for step in steps])
    means = np.mean(found, axis=0)
    print("correlation of each step's preview:", *(f"{mean:.3f}" for mean in means))
    assert means[0] > 0.9 and means[2:].min() > 0.94
    assert np.min(found, axis=0)[2:].min() > 0.85, "no single image is much worse"


def test_images_of_a_batch_are_shown_side_by_side(colours):
    latents = mx.random.normal((3, 4, 6, 16), key=mx.random.key(0))
    both = sketch(latents, colours)
    assert both.shape == (4, 18, 3)
    assert np.array_equal(both[:, 6:12], sketch(latents[1:2], colours))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((128, 128, 3), (40, 20)), ((128, 256, 3), (80, 20)), ((16, 256, 3), (64, 2)), ((8192, 16, 3), (1, 20))],
)
def test_an_image_keeps_its_proportions_in_a_terminal(shape, expected):
    assert cells(shape, 80, 20, 0.5) == expected


@pytest.mark.parametrize("protocol", ["iterm", "kitty"])
def test_each_image_in_a_terminal_replaces_the_last(protocol):
    """Emulates a terminal: the cursor returns, and every image starts on the same line."""
    stream = io.BytesIO()  # not a terminal: 80 columns, 24 lines
    view = TerminalView(stream, protocol)
    starts, line, saved = [], 0, None
    for i in range(4):
        stream.seek(0), stream.truncate()
        view.finish(PIXELS) if i == 2 else view(PIXELS)
        # newline, cursor up and down, save and restore, start of an image
        for token in re.findall(rb"\n|\x1b\[\d+[AB]|\x1b[78]|\x1b\]1337|\x1b_Ga", stream.getvalue()):
            if token == b"\n":
                line += 1
            elif token[-1:] in b"AB" and token[1:2] == b"[":
                line += int(token[2:-1]) * (1 if token.endswith(b"B") else -1)
            elif token == b"\0337":
                saved = line
            elif token == b"\0338":
                line = saved
            else:
                starts.append(line)
    assert starts == [0, 0, 0, 20], "the one after a finished image goes below it"
    assert line == 40
    assert (b"width=40;height=20" if protocol == "iterm" else b"c=40,r=20,C=1") in stream.getvalue()


def test_an_image_in_kitty_is_replaced_until_it_is_finished():
    stream = io.BytesIO()
    view = TerminalView(stream, "kitty")
    view(PIXELS), view(PIXELS), view.finish(PIXELS), view(PIXELS)
    ids = [re.search(rb"i=(\d+)", keys)[1] for keys, _ in kitty_images(stream.getvalue())]
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_a_preview_file_is_replaced_and_finally_deleted(tmp_path):
    (tmp_path / "a.preview.png").write_bytes(b"mine")
    view = FileView(tmp_path / "a.preview.png")
    for _ in range(2):
        view(PIXELS)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.preview-1.png", "a.preview.png"]
        assert Image.open(tmp_path / "a.preview-1.png").size == (192, 192)
    view.close()
    assert (tmp_path / "a.preview.png").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 1


# ---- as users see them


def watched(tmp_path, *options: str, **variables: str) -> tuple[bytes, bytes]:
    """What `generate` with these options prints on stdout, and on a terminal as stderr."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, "-m", "mlx_zimage", "generate", "a", "-m", "pocket", "--width", "32", "--height", "32"]
    kept = {key: value for key, value in os.environ.items() if key not in ("TMUX", "TERM", "NO_COLOR")}
    process = subprocess.Popen(
        [*command, *options], cwd=tmp_path, env={**kept, **variables}, stdout=subprocess.PIPE, stderr=slave
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
    stdout = process.stdout.read()
    assert process.wait() == 0, seen
    return stdout, seen


def test_a_terminal_shows_each_preview_and_a_bar_for_each_phase(tmp_path):
    stdout, seen = watched(tmp_path, "--steps", "3", "--preview", "--show", TERM="xterm-kitty")
    assert stdout == b"image.png\n", "images go to the terminal, not to stdout"
    images = kitty_images(seen.replace(b"\r\n", b"\n"))
    sizes = [Image.open(io.BytesIO(content)).size for _, content in images]
    assert sizes == [(4, 4)] * 3 + [(32, 32)], "a preview per step, and the finished image once"
    assert len({keys for keys, _ in images}) == 1, "all in one place"
    for bar in (b"Encoding:   0%", b"Denoising:   0%", b"/step]", b"Decoding:   0%"):
        assert bar in seen
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def test_a_terminal_shows_the_calibration_of_float16(tmp_path):
    _, seen = watched(tmp_path, "--steps", "1", "--dtype", "float16")
    calibrating, encoding = seen.index(b"Calibrating float16:   0%"), seen.index(b"Encoding:   0%")
    assert calibrating < encoding < seen.rindex(b"Denoising: 100%")


def test_steps_get_their_own_bar_even_if_an_earlier_phase_was_abandoned():
    with Watch(2, quiet=True, leave=False) as watch:
        watch(Phase("scale", 0, 2))
        watch(Step(0, 2, 0.5, None, None))
        assert watch.name == "Denoising"


def test_with_no_color_the_preview_is_a_file(tmp_path):
    _, seen = watched(tmp_path, "--steps", "1", "--preview", "--show", TERM_PROGRAM="WezTerm", NO_COLOR="1")
    assert b"until the image is finished: image.preview.png" in seen
    assert b"NO_COLOR is set" in seen
    assert b"1337" not in seen
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def test_show_displays_the_image_in_a_terminal_that_supports_it(tmp_path):
    stdout, seen = watched(tmp_path, "--steps", "1", "--show", TERM_PROGRAM="WezTerm")
    assert stdout == b"image.png\n"
    assert b"]1337;File=inline=1" in seen


def test_no_image_is_sent_to_a_redirected_stderr_and_quiet_prints_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM_PROGRAM", "WezTerm")
    options = ["--steps", "2", "--size", "112x112", "--preview-dir", "kept", "-o", "a.webp"]
    command = ["generate", "a ring", "-m", "pocket", "--seed", "5"]
    result = CliRunner().invoke(cli.main, [*command, "--preview", "-q", *options])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "a.webp\n", "")
    assert sorted(str(path) for path in Path().rglob("*.*")) == ["a.webp", "kept/a-5-1.png", "kept/a-5-2.png"]
    result = CliRunner().invoke(cli.main, [*command, "--show", "--size", "32x32", "--steps", "1"])
    assert "1337" not in result.stderr and "cannot show images" in result.stderr
