"""For one release, public names that moved still work in their old places, with a DeprecationWarning."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_zimage

PACKAGE = Path(mlx_zimage.__file__).parent
OLD = {
    "image": ["FORMATS", "to_uint8", "to_pil", "to_png", "enlarge", "read_pixels", "read_latents", "check_output",
              "make_folder", "check_folder", "save"],
    "metadata": ["Origin", "parameters", "save_options", "read_origin", "fingerprint", "AI_MADE"],
    "quantize": ["MODES", "Quantization", "default_quantization", "QUANTIZED", "recipe"],
    "weights": ["open_checkpoint", "resolve", "POCKET"],
    "convert.pack": ["pack", "unpack"],
    "convert.plan": ["plan_folder"],
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in OLD.items() for name in names])
def test_an_old_name_gives_the_new_object_with_a_warning(module, name):
    with pytest.warns(DeprecationWarning, match=rf"^mlx_zimage\.{module}\.{name} is now mlx_zimage\.") as warned:
        found = getattr(importlib.import_module(f"mlx_zimage.{module}"), name)
    home, new = re.search(r"is now (\S+)\.(\w+);", str(warned[0].message)).groups()
    assert found is getattr(importlib.import_module(home), new)
    assert warned[0].filename == __file__


def test_the_warning_points_at_the_import():
    program = "import warnings; warnings.simplefilter('default')\n\nfrom mlx_zimage.{} import {}"
    for module, names in OLD.items():
        result = subprocess.run(
            [sys.executable, "-c", program.format(module, names[0])], capture_output=True, text=True, check=True
        )
        assert re.match(rf"<string>:3: DeprecationWarning: mlx_zimage\.{module}\.", result.stderr), result.stderr
        assert result.stderr.count("DeprecationWarning") == 1


def test_unknown_names_raise_attribute_errors():
    for module in OLD:
        with pytest.raises(AttributeError, match=f"module 'mlx_zimage.{module}' has no attribute 'nothing'"):
            _ = importlib.import_module(f"mlx_zimage.{module}").nothing


def test_nothing_in_the_package_or_the_examples_uses_an_old_name():
    old = re.compile(
        r"^ *((from (mlx_zimage\.|\.\.?)|import mlx_zimage\.)(image|metadata|quantize|convert\.pack|convert\.plan)"
        r"|from (mlx_zimage)?\.*weights import (open_checkpoint|resolve|POCKET))\b",
        re.MULTILINE,
    )
    assert old.search("from ..metadata import Origin") and old.search("from mlx_zimage.weights import resolve")
    assert old.search("import mlx_zimage.convert.plan") and not old.search("from mlx_zimage.convert import convert")
    for folder in (PACKAGE, PACKAGE / "convert", PACKAGE.parent / "examples"):
        for file in folder.rglob("*.py"):
            if file.parent.name not in ("images", "weights"):  # they have sibling modules with these names
                assert not old.search(file.read_text(encoding="utf-8")), file
