"""Writing a converted model: safetensors shards, their index and checksums, in a folder that appears when complete.

Names, shapes and dtypes are known before any tensor is read, so the header of a shard is written first and its tensors
one by one after it; no shard is ever in memory as a whole. A killed run leaves its finished shards in a hidden folder
next to the destination, from which the same command resumes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from .. import atomic
from ..errors import LockedError, OutputError, RequestError, ZImageError
from ..untrusted import read_bytes
from ..weights.manifest import MANIFEST, parse_manifest, read_manifest, render_manifest, sha256
from .disk import OutputFile, render_json, sync_folder
from .shards import Shard, Task, header

JOB, JOURNAL = ".job.json", ".journal"  # in a partial folder: the conversion it belongs to, and its finished shards


class OutputFolder:
    """Writes to a hidden folder next to dest, which becomes dest on exit, or is deleted if there was an error.

    job identifies the conversion, down to the source's files. If a killed run left a hidden folder with an equal job,
    its finished shards are kept. Only one process at a time can write dest; nbytes is how much it will write. If
    single, dest becomes the one file written, which has the same name as dest.
    """

    def __init__(self, dest: Path, job: dict, nbytes: int, single: bool = False):
        self.dest = dest
        self.folder = dest.with_name(f".{dest.name}.partial")
        self._lock = FileLock(dest.with_name(f".{dest.name}.lock"), timeout=0)
        self._job = render_json(job)
        self._nbytes = nbytes
        self._single = single
        self._finished: dict[str, str] = {}
        self._sums: dict[str, str] = {}

    def __enter__(self) -> OutputFolder:
        try:
            self.dest.parent.mkdir(parents=True, exist_ok=True)
            _refuse_link(Path(self._lock.lock_file))
            try:
                self._acquire()
                Path(self._lock.lock_file).write_text(str(os.getpid()))
                _refuse_link(self.folder)
                _refuse_others(self.folder)
                check_absent(self.dest)
                self._resume()
            except BaseException:
                if self._lock.is_locked:
                    self._remove()
                raise
        except OSError as error:
            raise self._explain(error) from error
        return self

    def __exit__(self, kind, error, _):
        try:
            if kind is None:
                self._publish()
        except OSError as failure:
            kind, error = OSError, failure
        finally:
            self._remove()
        if isinstance(error, OSError) and not isinstance(error, ZImageError):
            raise self._explain(error) from error

    def keeps(self, name: str) -> bool:
        """Whether an earlier run finished this file; its checksum is verified."""
        path = self.folder / name
        if name not in self._finished or not path.is_file() or sha256(path) != self._finished[name]:
            return False
        self._sums[name] = self._finished[name]
        return True

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        with OutputFile(self.folder / name) as file:
            file.write(content)
        self._sums[name] = file.sha256

    def write_shard(self, shard: Shard, dtype: str) -> Iterator[Task]:
        """Write a shard, or keep the one of an earlier run, yielding each task when it is done."""
        if self.keeps(shard.name):
            yield from shard.tasks
            return
        (self.folder / shard.name).parent.mkdir(exist_ok=True)
        with OutputFile(self.folder / shard.name) as file:
            file.write(header(shard))
            expected = file.size + sum(slot.nbytes for slot in shard.slots)
            for task in shard.tasks:
                for array in task.arrays(dtype):
                    file.write_array(array)
                yield task
            assert file.size == expected, f"{shard.name} has {file.size} bytes, but its header declares {expected}"
        self._sums[shard.name] = file.sha256
        with (self.folder / JOURNAL).open("ab", buffering=0) as journal:
            journal.write(render_manifest({shard.name: file.sha256}))
            atomic.sync(journal.fileno())

    def _acquire(self) -> None:
        file = Path(self._lock.lock_file)
        file.touch()  # raises if it cannot be created; acquire would silently succeed
        try:
            self._lock.acquire()
        except Timeout:
            holder = _read(file).decode(errors="replace") or "?"
            raise LockedError(f"{self.dest} is being written by process {holder}; wait for it, or stop it") from None

    def _resume(self) -> None:
        """Keep the finished shards of a killed run of the same job, or start over; check that the rest fits on disk."""
        if _read(self.folder / JOB) != self._job:
            shutil.rmtree(self.folder, ignore_errors=True)
        lines = _read(self.folder / JOURNAL).decode(errors="replace").split("\n")[:-1]
        self._finished = parse_manifest(lines)
        kept = sum(path.stat().st_size for name in self._finished if (path := self.folder / name).is_file())
        check_disk(self.dest, self._nbytes - kept)
        if not self._finished:
            self.folder.mkdir(exist_ok=True)
            (self.folder / JOB).write_bytes(self._job)

    def _publish(self) -> None:
        if self._single:
            check_absent(self.dest)
            os.replace(self.folder / self.dest.name, self.dest)
            sync_folder(self.dest.parent)
            return
        self.write(MANIFEST, render_manifest(self._sums))
        for name in (JOB, JOURNAL):
            (self.folder / name).unlink(missing_ok=True)
        for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
            sync_folder(folder)
        check_absent(self.dest)
        os.replace(self.folder, self.dest)
        sync_folder(self.dest.parent)

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _explain(self, error: OSError) -> OSError:
        if isinstance(error, ZImageError):
            return error
        return OutputError(f"could not write {self.dest}: {error.strerror or error}")


def add_files(folder: Path, files: dict[str, bytes]) -> None:
    """Add small files to a finished folder and its manifest; each is written completely or not at all."""
    own = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    sums = read_manifest(folder) | own
    try:
        for name, content in (files | {MANIFEST: render_manifest(sums)}).items():
            atomic.write(folder / name, partial(Path.write_bytes, data=content))
        sync_folder(folder)
    except OSError as error:
        raise OutputError(f"could not write {folder}: {error.strerror or error}") from error


def check_absent(dest: Path) -> None:
    if os.path.lexists(dest):
        raise RequestError(f"{dest} already exists; remove it, or choose another name")


def check_outside(dest: Path, source: Path) -> None:
    """Raise if dest is inside the folder of the source."""
    if source.resolve() in dest.resolve().parents:
        raise RequestError(f"{dest} is inside the source {source}; choose a folder outside it")


def check_disk(dest: Path, nbytes: int) -> None:
    """Raise if nbytes do not fit on the disk of dest."""
    free = shutil.disk_usage(dest.parent).free
    if nbytes > free:
        unit, size = ("GB", 1e9) if nbytes >= 1e9 else ("MB", 1e6)
        raise OutputError(
            f"{dest} needs {nbytes / size:.2f} {unit} more, but its disk has only {free / size:.2f} {unit} free; "
            f"free up space, or choose another disk or fewer bits"
        )


def _refuse_link(path: Path) -> None:
    """Raise if a name that this module uses is a link, through which it would write elsewhere."""
    if path.is_symlink():
        raise OutputError(
            f"{path} is a link to {os.readlink(path)}, and nothing is written through links; remove the link"
        )


def _refuse_others(folder: Path) -> None:
    """Raise if the folder was made by another user, who could have put links into it."""
    if folder.exists() and folder.stat().st_uid != os.geteuid():
        raise OutputError(f"{folder} belongs to another user; remove it, or choose another name")


def _read(path: Path) -> bytes:
    """The content of a file; none if it cannot be read."""
    try:
        return read_bytes(path)
    except OSError:
        return b""
