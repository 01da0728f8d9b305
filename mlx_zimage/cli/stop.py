"""Ctrl-C and SIGTERM: what is under way is undone, and a download is not waited for.

Python's way is to raise in the main thread, and everything here undoes itself then. The hub's client does not: its
threads finish the files they are at, of many gigabytes, before the exception goes on, and nothing ends a thread. So
within the client the process ends, once the files that no later run could go on with are gone. A child process for the
client would be ended more simply, but it would have to be handed what a program set up in this one (its HTTP client,
its bars), to outlive no parent, and to be told apart from other processes that write to the same cache; and uploading,
which is stopped here too, would need one of its own.
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

    Within the hub's client either one ends the process, since the client would first wait for the files under way, of
    many gigabytes. Afterwards the signals mean what they meant.
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
