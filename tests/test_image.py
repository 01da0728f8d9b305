import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from lanes import slow
from PIL import Image

import mlx_zimage
from mlx_zimage.errors import NumericsError, OutputError, RequestError
from mlx_zimage.images.codec import to_uint8
from mlx_zimage.images.files import check_output, save


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def test_pixels_are_rounded_as_in_diffusers():
    # diffusers: (x / 2 + 0.5).clamp(0, 1), then numpy round (half to even) of 255 times it
    values = np.linspace(-1.2, 1.2, 3 * 64, dtype=np.float32).reshape(8, 8, 3)
    expected = (np.clip(values / 2 + 0.5, 0, 1) * 255).round().astype("uint8")
    assert np.array_equal(to_uint8(mx.array(values)), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_is_refused(value):
    pixels = np.zeros((16, 16, 3), dtype=np.float32)
    pixels[3, 4, 1] = value
    with pytest.raises(NumericsError, match="not finite"):
        to_uint8(mx.array(pixels))


def test_a_png_stores_the_pixels_exactly(tmp_path, pixels):
    assert save(pixels, tmp_path / "a.png") == tmp_path / "a.png"
    assert np.array_equal(Image.open(tmp_path / "a.png"), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_the_file_suffix_selects_the_format(tmp_path, pixels, name, kind):
    save(pixels, tmp_path / name)
    assert Image.open(tmp_path / name).format == kind


def test_an_existing_name_gets_a_number_unless_overwriting(tmp_path, pixels):
    names = [save(pixels, tmp_path / "a.png").name for _ in range(3)]
    assert names == ["a.png", "a-1.png", "a-2.png"]
    assert save(255 - pixels, tmp_path / "a.png", overwrite=True).name == "a.png"
    assert np.array_equal(Image.open(tmp_path / "a.png"), 255 - pixels)


CREATE_FILES_WHILE_SAVING = """
import stat, sys, threading
from pathlib import Path
import numpy as np
from mlx_zimage.images.files import save

folder, pixels, done = Path(sys.argv[1]), np.zeros((16, 16, 3), np.uint8), threading.Event()
images, others = set(), set()

def create():
    for i in range(10**9):
        (folder / f"{i}.txt").touch()
        others.add(stat.S_IMODE((folder / f"{i}.txt").stat().st_mode))
        if done.is_set():
            break

thread = threading.Thread(target=create)
thread.start()
for ending in ("png", "jpg", "webp") * 10:
    images.add(stat.S_IMODE(save(pixels, folder / f"a.{ending}").stat().st_mode))
done.set()
thread.join()
print(*map(oct, images), *map(oct, others))
"""


@pytest.mark.parametrize(("umask", "mode"), [(0o022, "0o644"), slow(0o077, "0o600"), slow(0o002, "0o664")])
def test_images_and_files_of_other_threads_get_the_usual_mode_for_new_files(tmp_path, umask, mode):
    command = [sys.executable, "-c", CREATE_FILES_WHILE_SAVING, str(tmp_path)]
    result = subprocess.run(command, umask=umask, capture_output=True, text=True, check=True)
    assert result.stdout == f"{mode} {mode}\n"


def test_the_umask_is_never_changed_as_all_threads_share_it():
    package = Path(mlx_zimage.__file__).parent
    files = [*package.rglob("*.py"), *(package / "convert").rglob("*.py")]
    assert not [file for file in files if "umask(" in file.read_text(encoding="utf-8")]


def test_a_failed_write_names_the_image_and_leaves_no_files(tmp_path, pixels, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=r"could not write .*a\.png: No space left on device"):
        save(pixels, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path, pixels):
    assert save(pixels, tmp_path / f"{'x' * 251}.png").is_file()


def test_an_output_path_that_cannot_be_written_is_refused(tmp_path):
    check_output(tmp_path / "a.png")
    check_output(tmp_path / "none" / "a.png")
    assert list(tmp_path.iterdir()) == [], "a missing folder is created later, with the image"
    for path, message in (
        (tmp_path / "a.gif", "must end in"),
        (tmp_path / "a", "must end in"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(RequestError, match=message):
            check_output(path)
