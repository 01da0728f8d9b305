"""There is one door for untrusted files; whatever else is opened is listed here."""

import ast
from pathlib import Path

import mlx_zimage

ROOT = Path(mlx_zimage.__file__).parent
OPENING = {
    *("json.load", "json.loads", "np.load", "mx.load", "Image.open", "os.open", "open", "deserialize", "safe_open"),
    *(".open", ".read_text", ".read_bytes"),  # of a Path
}
# The door itself: only regular files, within limits, and headers before MLX or safetensors.
DOOR = {
    "untrusted.py": {"os.open", "json.loads"},
    "weights/headers.py": {"safe_open"},
}
BEHIND = {  # opened by open_regular, after headers.read, or received within a limit or from a rank of the group
    "cli/remote.py": {"Image.open"},
    "distributed.py": {"json.loads", "np.load"},
    "images/metadata.py": {"Image.open"},
    "images/source.py": {"Image.open"},
    "train/output.py": {"mx.load"},
    "weights/component.py": {"mx.load"},
    "weights/lora.py": {"mx.load"},
    "weights/store.py": {"deserialize"},
}
OURS = {  # written by this process, or by the system
    "atomic.py": {"os.open"},
    "battery.py": {".read_text"},
    "cli/__init__.py": {"os.open"},
    "cli/output.py": {".read_bytes"},
    "convert/disk.py": {"os.open"},
    "convert/report.py": {"json.loads", ".read_text"},
    "convert/writer.py": {".open"},
    "doctor.py": {"json.loads", ".open"},
    "generate.py": {"json.loads", ".read_bytes"},
    "groups.py": {"json.loads"},
    "images/codec.py": {"Image.open"},
    "machine.py": {".read_text"},
    "selftest.py": {"mx.load"},
    "server/a1111.py": {"json.loads"},
    "server/static.py": {".read_bytes"},
    "server/worker.py": {"json.loads"},
    "train/record.py": {"json.loads", ".open", ".read_text"},
}


def openings(tree: ast.AST) -> set[str]:
    found = set()
    for call in (node.func for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call)
        if name in OPENING:
            found.add(name)
        elif isinstance(call, ast.Attribute) and f".{call.attr}" in OPENING and name.split(".")[0] != "os":
            found.add(f".{call.attr}")
    return found


def test_no_file_is_opened_except_through_the_door():
    found = {}
    for file in sorted({*ROOT.rglob("*.py"), *(ROOT / "convert").glob("*.py")}):
        if names := openings(ast.parse(file.read_text())):
            found[file.relative_to(ROOT).as_posix()] = names
    assert found == DOOR | BEHIND | OURS
