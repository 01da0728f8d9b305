"""Ctrl-C and SIGTERM: what is under way is undone, and a download is not waited for.

A signal raises in the main thread, and all of ours is undone as the exception passes. The hub's client holds it up: it
waits for its threads first, which finish the files they are at, of many gigabytes, and a thread cannot be ended from
outside. So within the client a signal ends the process, once the partial files are gone that no later run could go on
with.

A child process for the client would be ended more simply. But it would not have what a program has set up in this one
(the client's HTTP, its bars), would live on after a killed parent, and who removes its partial files could not tell
them by name from another process's; and uploads, which are stopped here too, would need a child as well.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises Terminated within, as Ctrl-C does KeyboardInterrupt, so that what is under way is undone.

    Within the hub's client either one ends the process. Afterwards the signals mean what they meant.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        while frame:
            if frame.f_globals.get("__name__", "").startswith("huggingface_hub"):
                with suppress(OSError):
                    os.write(2, b"\nStopped.\n")
                try:
                    drop_downloads()
                finally:
                    os._exit(128 + number)
            frame = frame.f_back
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, stop)
    if before[signal.SIGINT] is not signal.SIG_IGN:  # as in the background of a shell
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def drop_downloads() -> None:
    """Remove the files that the hub's client is writing in this process, but for those that another could go on with.

    Newer clients give each file of each process a name of its own: DIGEST.12345678.incomplete. The process cannot go on
    afterwards: it can open no more files, nor log.
    """
    logging.disable()
    highest = max(map(int, os.listdir("/dev/fd"))) + 100  # with what other threads open before the next line
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for number in range(highest):
        with suppress(OSError):
            if sys.platform == "darwin":
                path = os.fsdecode(fcntl.fcntl(number, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
            else:
                path = os.readlink(f"/dev/fd/{number}")
            if re.search(r"\w\.[0-9a-f]{8}\.incomplete$", path):
                os.unlink(path)
    time.sleep(0.2)  # in which other threads rename what was whole, and closed
