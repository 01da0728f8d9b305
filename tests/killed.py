"""Kill a conversion after its n-th change to the disk, for increasing n, and check what is left.

    python killed.py SOURCE FOLDER STEP      n = 1, 1 + STEP, ...

Prints how many changes one conversion makes. Each conversion runs in a child of this process, which never uses MLX
itself, since a process with threads cannot be forked safely.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import mlx_zimage.convert as converter
from mlx_zimage.convert import layout

CHANGES = ("write", "fsync", "replace", "mkdir", "unlink", "rmdir")


def convert_in_child(source: str, dest: Path, last: int | None = None) -> int:
    """Convert in a child process that kills itself after change number `last`; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def counted(change):
            def call(*args, **kwargs):
                nonlocal count
                result = change(*args, **kwargs)
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        converter.convert(source, dest)
        print(count, flush=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(source: str, folder: Path, step: int) -> None:
    layout.SHARD_BYTES = 60_000
    assert convert_in_child(source, folder / "whole") == 0
    expected, dest, last = content(folder / "whole"), folder / "out", 1
    while convert_in_child(source, dest, last) == -signal.SIGKILL:
        if os.path.lexists(dest):
            assert content(dest) == expected, f"killed after change {last}: {dest} is not complete"
        else:
            assert convert_in_child(source, dest) == 0, f"killed after change {last}: the next run fails"
            assert content(dest) == expected, f"killed after change {last}: the next run gives a different result"
            assert sorted(os.listdir(folder)) == ["out", "whole"], os.listdir(folder)
        shutil.rmtree(dest)
        last += step
    assert content(dest) == expected


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
