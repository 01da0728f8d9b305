"""Metadata as exiftool reads it. Skipped where exiftool is missing; .ci/run installs it on Linux."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from mlx_zimage.images.files import save
from mlx_zimage.images.metadata import AI_MADE, Origin, parameters
from mlx_zimage.request import GenerateRequest

pytestmark = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
PROMPTS = ["a cat", "一只猫\nin two lines, \U0001f431"]


def read(file) -> dict:
    command = ["exiftool", "-json", "-groupNames", "-validate", "-warning", "-a", "-all", "-n", str(file)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    ("ending", "tag"), [("png", "PNG:Parameters"), ("jpg", "EXIF:UserComment"), ("webp", "EXIF:UserComment")]
)
def test_exiftool_reads_how_an_image_was_made(tmp_path, ending, tag, prompt):
    origin = Origin(GenerateRequest(prompt, 64, 64, seed=1), "pocket", "0123456789", "bfloat16")
    tags = read(save(np.zeros((16, 16, 3), np.uint8), tmp_path / f"a.{ending}", origin=origin))
    assert tags[tag] == parameters(origin)
    assert tags["XMP:DigitalSourceType"] == AI_MADE
    assert not [text for key, text in tags.items() if "Warning" in key and "UserComment" in str(text)]
