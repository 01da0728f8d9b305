"""A pipeline serves one request at a time, and only in the process that opened it."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, RLock, Thread, current_thread
from typing import Any, TypeVar

from .errors import RequestError, ZImageError

E = TypeVar("E")

_process: int | None = None  # the first process that used MLX through this package


def check_process() -> None:
    """Refuse to compute in a fork of a process that has used MLX: its threads are missing there, so MLX would hang."""
    global _process
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise ZImageError(
            f"this process ({os.getpid()}) was forked from one that uses MLX ({_process}), so MLX would hang here; "
            f"start workers with multiprocessing.get_context('spawn'), and open the pipeline in the worker"
        )


@dataclass(eq=False)
class _Turn:
    events: Generator
    thread: Thread  # the one that last requested an event


class Turns:
    """Lets one request at a time use the networks of a pipeline.

    A request is refused while another thread has one in progress. If the same thread starts a request while its own is
    still in progress, or the thread of an unfinished request has ended, the earlier request ends, and continuing it
    raises RequestError.
    """

    def __init__(self) -> None:
        check_process()
        self._computing = RLock()
        self._beginning = Lock()
        self._turn: _Turn | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """One thread at a time; others wait. Held while an event is computed, not while the caller handles it."""
        check_process()
        with self._computing:
            yield

    def take(self, events: Generator[E, Any, None]) -> Generator[E, Any, None]:
        """The events of one request, while it has its turn; values sent to this generator are passed on to events."""
        turn = self._begin(events)
        answer = None
        try:
            while True:
                with self.computing():
                    if self._turn is not turn:
                        raise RequestError(
                            "a later request on this pipeline has ended this one; finish or close a stream "
                            "before starting the next, or open a second pipeline"
                        )
                    turn.thread = current_thread()
                    try:
                        event = events.send(answer)
                    except StopIteration:
                        return
                answer = yield event
        finally:
            events.close()
            if self._turn is turn:
                self._turn = None

    def _begin(self, events: Generator) -> _Turn:
        with self._beginning:
            older, mine = self._turn, _Turn(events, current_thread())
            if older and older.thread is not mine.thread and older.thread.is_alive():
                raise RequestError(
                    "another thread is generating with this pipeline; put a threading.Lock around its requests, "
                    "or open a pipeline for each thread"
                )
            self._turn = mine
        if older:
            older.events.close()  # frees its memory and restores its limits
        return mine
