"""Finding the modules and names of the package, from a clone and from its metadata. .ci/run builds and installs it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import mlx_zimage
from mlx_zimage import errors

ROOT = Path(__file__).parents[1]


def test_python_started_in_the_clone_finds_the_converter_in_the_clone():
    # there, `mlx_zimage` is the clone's folder, however the package is installed, and convert/ is reached by a symlink
    program = "import importlib.util as u; print(u.find_spec('mlx_zimage.convert').origin)"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == ROOT / "mlx_zimage/convert/__init__.py"
    assert (ROOT / "mlx_zimage/convert").resolve() == ROOT / "convert"


def test_every_folder_with_modules_is_packaged():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = {file.parent.relative_to(ROOT) for file in (ROOT / "mlx_zimage").rglob("*.py")}
    assert sorted(listed) == sorted({".".join(folder.parts) for folder in inside} | {"mlx_zimage.convert"})


def test_every_error_can_be_imported_from_the_package():
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert {"ZImageError", "GroupError"} <= raised <= set(mlx_zimage.__all__)
