"""Checking that a model folder is intact: checksums, headers, names, shapes, and finite values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, NumericsError
from ..models import CONTROLNET, NETWORKS
from ..weights import official
from ..weights.checkpoint import open_checkpoint, resolve
from ..weights.component import find_network, needs_converting, read_entries
from ..weights.controlnets import find_controlnet, is_controlnet, open_controlnet
from ..weights.hub import check_inside, is_snapshot, locate
from ..weights.listing import is_hidden, visible
from ..weights.manifest import MANIFEST, MAX_HASHED, read_manifest, sha256
from .rows import Tensor, read_rows
from .sources import Source, open_controlnet_source, open_folder, open_part, open_source

# Types of files that the loader reads: an extra one, not listed in the manifest, could change the model.
LOADED = (".json", ".safetensors", ".txt", ".jinja")
MAX_OTHER = 32 * 2**20  # bytes of a file that contains no weights; Qwen3's tokenizer.json takes 11 MB


@dataclass(frozen=True)
class Checked:
    """A file or tensor has been checked; fault describes what is wrong with it, or is None."""

    name: str
    fault: str | None
    done_bytes: int
    total_bytes: int


def verify(folder: str | Path) -> list[str]:
    """The faults of a model folder; empty if it is intact. See verify_steps."""
    return [f"{step.name}: {step.fault}" for step in verify_steps(folder) if step.fault]


def fetch_all(source: str | Path) -> Path:
    """The folder or file of a model or ControlNet; of a repository, every file in its manifest is downloaded."""
    if is_controlnet(source):
        path, repository = find_controlnet(source)
        if repository:
            open_controlnet(source)
        return path
    folder = resolve(source)
    _, repository = locate(source)
    if repository:
        with suppress(CheckpointError):  # a damaged manifest is reported by verify_steps
            repository.fetch({folder / name for name in read_manifest(folder)} & repository.sizes.keys())
    return folder


def verify_steps(folder: str | Path) -> Iterator[Checked]:
    """Check a model or ControlNet (anything that the converter reads), yielding Checked per file and tensor.

    A ControlNet in a model's folder is checked with it.

    Every file is compared with the folder's SHA256SUMS. A folder not written by our converter has none; then only
    headers, names, shapes and values are checked. Raises CheckpointError for anything that is not a model.
    """
    folder = fetch_all(folder)
    files = [folder] if folder.is_file() else [path for path in visible(folder, "**/*") if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    total = 2 * sum(sizes.values())
    done = 0
    try:
        sums = {name: digest for name, digest in read_manifest(folder).items() if not is_hidden(name)}
    except CheckpointError as error:
        yield Checked(MANIFEST, str(error).removeprefix(f"{folder / MANIFEST} "), 0, total)
        return
    if excess := _excess(sum(sizes.get(folder / name, 0) for name in sums)):
        yield Checked(MANIFEST, f"lists files totalling {excess}", done, total)
        return
    intact = True
    for name, digest in sums.items():
        path = folder / name
        if is_snapshot(folder) and not path.exists() and not name.endswith(LOADED):
            continue  # such as README.md: the client fetches only what a model needs
        done += sizes.get(path, 0)
        fault = _file_fault(folder, path, digest)
        intact = intact and not fault
        yield Checked(name, fault, done, total)
    if sums:
        names = (path.relative_to(folder).as_posix() for path in sizes)
        for name in names:
            if name not in sums and name.endswith(LOADED):
                yield Checked(name, f"is not listed in {MANIFEST}, so it was added later; remove it", done, total)
    if not intact:
        return
    done = total // 2
    try:
        source = _open(folder)
    except CheckpointError as error:
        if not sums and not (folder / "model_index.json").is_file():
            raise
        yield Checked(str(folder), str(error), done, total)
        return
    if excess := _excess(source.nbytes):
        yield Checked(str(folder), f"has weights totalling {excess}", done, total)
        return
    for component in source.components.values():
        for tensor in component.tensors:
            done += tensor.nbytes
            yield Checked(f"{component.name} {tensor.name}", _values_fault(tensor), done, total)


def _open(path: Path) -> Source:
    """What is at a path, checked as in the loader or, if only the converter reads it (fp8, GGUF), as in the
    converter."""
    if is_controlnet(path):
        return _open_controlnet(path)
    if not (path / "model_index.json").is_file():
        return open_part(path, official.CONFIGS)
    if any(needs_converting(read_entries(find_network(path, name))) for name in NETWORKS):
        opened = open_source(path)
    else:
        open_checkpoint(path).open_tokenizer()
        opened = open_folder(path, str(path), NETWORKS)
    own = path / CONTROLNET
    if any(own.glob("*.safetensors")):  # pocket has one, and so may what diffusers saved
        opened = replace(opened, components=opened.components | _open_controlnet(own).components)
    return opened


def _open_controlnet(path: Path) -> Source:
    opened = open_controlnet_source(path)
    if path.is_dir():
        check_inside(path, opened.weights)
    return opened


def _excess(nbytes: int) -> str:
    """What to say about files or weights of this many bytes, if no model has that many; otherwise ""."""
    return f"{nbytes:,} bytes, expected at most {MAX_HASHED:,}" if nbytes > MAX_HASHED else ""


def _file_fault(folder: Path, path: Path, digest: str) -> str | None:
    try:
        check_inside(folder, [path])
        found = sha256(path, MAX_HASHED if path.suffix == ".safetensors" else MAX_OTHER)
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError) as error:  # a damaged manifest can contain any name
        return f"cannot be read: {error}"
    return None if found == digest else f"has sha256 {found}, expected {digest}; convert or copy it again"


def _values_fault(tensor: Tensor) -> str | None:
    try:
        for _ in read_rows(tensor, "float32"):
            pass
    except (NumericsError, CheckpointError) as error:
        return str(error)
    return None
