"""Ctrl-C, SIGTERM and SIGHUP: clean up unfinished work, and do not wait for a download.

A signal raises an exception in the main thread, and our code cleans up as it propagates. The Hugging Face client would
delay this: it first waits for its threads to finish the files they are downloading, which can be many gigabytes, and a
thread cannot be killed from outside. So inside the client a signal exits the process, after deleting the partial files
that no later run could resume.

Running the client in a child process would make stopping it simpler. But the child would not share what the program has
configured in this process (HTTP settings, progress bars), would outlive a killed parent, and its partial files could
not be distinguished by name from those of other processes; uploads, which are stopped here too, would need a child as
well.
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
    """SIGTERM or SIGHUP was received: the number of the signal."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Within this context SIGTERM and SIGHUP (the terminal was closed) raise Terminated, as Ctrl-C raises
    KeyboardInterrupt, so that cleanup code runs.

    Inside the Hugging Face client each of them exits the process. The previous handlers are restored at the end.
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
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        # a background job of a shell ignores Ctrl-C, and what nohup starts ignores SIGHUP
        if handler is not signal.SIG_IGN or number == signal.SIGTERM:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def drop_downloads() -> None:
    """Delete the partial files that the Hugging Face client is writing in this process, except resumable ones.

    Newer clients give each file a name that is unique to the process: DIGEST.12345678.incomplete. The process must exit
    afterwards: it can no longer open files or log.
    """
    logging.disable()
    # The margin is for files that other threads open before the next line.
    highest = max(map(int, os.listdir("/dev/fd"))) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for number in range(highest):
        with suppress(OSError):
            if sys.platform == "darwin":
                path = os.fsdecode(fcntl.fcntl(number, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
            else:
                path = os.readlink(f"/dev/fd/{number}")
            if re.search(r"\w\.[0-9a-f]{8}\.incomplete$", path):
                os.unlink(path)
    time.sleep(0.2)  # lets other threads rename files that are complete and closed
