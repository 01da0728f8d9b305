"""The queue in front of the worker: bounded, first in first out, and alive when the worker is not."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from .. import errors
from ..errors import GroupError, ZImageError
from ..launched import is_launched
from .errors import STATUS, Refusal, unavailable
from .messages import Accepted, Cancel, Done, Failed, Job, Loaded, Model, Note, Options, Progress, Ready, Started

log = logging.getLogger(__name__)
GRACE_S = 600.0  # for a cancelled job to stop, before its worker is ended: a step of a large image can take minutes
RESTART_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # waits before a restart, by how many workers ended since the last image
NEWEST = 0.3  # weight of the last job in the estimate of speed


@dataclass(frozen=True)
class Moved:
    """A job before this one has ended."""


class Ticket:
    """A place in the queue for one job. The end of its `with` block gives the place up; a job that has not ended is
    then cancelled."""

    def __init__(self, queue: Queue, job: Job):
        self.queue, self.job = queue, job
        self.accepted: Accepted | None = None
        self.progress = 0.0  # from 0 to 1
        self.arrived = queue.loop.time()
        self.started: float | None = None
        self._messages: asyncio.Queue[Any] = asyncio.Queue()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.queue.cancel(self)

    def put(self, message: object) -> None:
        self._messages.put_nowait(message)

    async def next(self) -> Any:
        """The worker's next message about the job, up to Done; Refusal if it failed or took too long."""
        deadline = self.queue.deadline_s
        left = None if deadline is None else max(self.arrived + deadline - self.queue.loop.time(), 0)
        try:
            message = await asyncio.wait_for(self._messages.get(), left)
        except TimeoutError:
            late = f"the images were not finished within {deadline:g} s; ask for fewer or smaller ones"
            raise unavailable(late, retry=False) from None
        if isinstance(message, Refusal):
            raise message
        return message

    async def fits(self) -> Accepted:
        """Wait until the worker has checked the job; Refusal if it is invalid or does not fit in memory."""
        while not isinstance(message := await self.next(), Accepted):
            pass
        return message

    @property
    def position(self) -> int:
        """The number of jobs before this one."""
        return list(self.queue.tickets).index(self.job.id) if self.job.id in self.queue.tickets else 0

    @property
    def left(self) -> float:
        """The work that is left, in pixels times steps."""
        return (self.accepted.work if self.accepted else 0) * (1 - self.progress)


class Queue:
    """Runs jobs in a worker process, in the order of their arrival; at most `limit` wait.

    deadline_s is the time from a request's arrival to its answer, in seconds.

    When the worker dies, for example of a failed allocation, all its jobs fail and another one is started. In a group,
    the other machines would have to start again along with it, so its death ends the server; lost says so.
    """

    def __init__(self, options: Options, limit: int = 16, deadline_s: float | None = None):
        self.options, self.limit, self.deadline_s = options, limit, deadline_s
        self.models: tuple[Model, ...] = ()
        self.loaded: str | None = None  # the model with weights in memory
        self.tickets: dict[int, Ticket] = {}  # in the order of their arrival
        self.running: int | None = None
        self.process: subprocess.Popen | None = None
        self._pace: dict[str, float] = {}  # seconds per pixel and step, by model
        self._count = 0  # of all jobs
        self._ends = 0  # of workers since the last image
        self.why = ""  # why the worker could not start or go on
        self._outgoing: SimpleQueue[object] = SimpleQueue()
        self._restarting: asyncio.Task | None = None
        self._stopping = False
        self.lost = asyncio.Event()  # the worker of a group has ended, and could not join it again

    # ---- the worker process

    async def start(self) -> None:
        """Start the worker and wait until its models are open; ZImageError if they cannot be opened."""
        self.loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self.loop.create_future()
        self._spawn()
        await self._ready

    async def stop(self) -> None:
        """End the worker and all its jobs."""
        self._stopping = True
        if self._restarting:
            self._restarting.cancel()
        self._fail_all(unavailable("the server is shutting down"))
        if self.process:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", f"{__package__}.worker", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        connection = Connection(ours.detach())
        self._outgoing = SimpleQueue()
        self._outgoing.put(self.options)
        Thread(target=self._write, args=(connection, self._outgoing), daemon=True).start()
        Thread(target=self._read, args=(connection, self._outgoing, self.process), daemon=True).start()

    def _write(self, connection: Connection, outgoing: SimpleQueue) -> None:
        """In a thread of its own: send what is put, which may take as long as the worker needs to read it."""
        try:
            while (message := outgoing.get()) is not None:
                if not isinstance(message, Job) or message.id in self.tickets:
                    connection.send(message)
        except OSError:
            pass  # the worker has ended, which the other thread reports

    def _read(self, connection: Connection, outgoing: SimpleQueue, process: subprocess.Popen) -> None:
        """In a thread of its own: pass on what the worker sends, and finally how it ended."""
        try:
            while True:
                self._call(self._received, connection.recv())
        except (EOFError, OSError):
            outgoing.put(None)
            self._call(self._ended, process.wait())

    def _call(self, function: Callable[[Any], None], argument: object) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, argument)

    def _ended(self, code: int) -> None:
        """Answer everyone who waits, and start another worker."""
        self.process = self.loaded = self.running = None
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        reason = self.why or f"the process that generates images ended ({how}); perhaps it ran out of memory"
        if self._stopping:
            return
        if not self.models:  # it never started
            if not self._ready.done():
                self._ready.set_exception(ZImageError(f"{reason}; lower --memory, or close other programs"))
            return
        if is_launched():
            self._fail_all(unavailable("the group has lost a machine, so the server is shutting down", retry=False))
            stalled = "another machine has stalled" if code == GroupError.exit_code else reason
            self.why = self.why or stalled
            self.lost.set()
            return
        wait = RESTART_S[min(self._ends, len(RESTART_S) - 1)]
        self._ends += 1
        log.error("%s; starting another%s", reason, f" in {wait:g} s" if wait else "")
        if self.why:  # may contain a path
            self._fail_all(unavailable("the models cannot be opened again; the server's log says why"))
        else:
            self._fail_all(unavailable(f"{reason}. It is being restarted: try again, or ask for a smaller image"))
        self._restarting = self.loop.create_task(self._restart(wait))

    async def _restart(self, wait: float) -> None:
        await asyncio.sleep(wait)
        self.why = ""
        self._spawn()

    # ---- jobs

    def submit(self, job: Job) -> Ticket:
        """Queue a job and give it an id; Refusal if the queue is full, or if there is no worker."""
        if self.process is None:
            raise unavailable("the process that generates images is being restarted; try again in a few seconds")
        if len(self.tickets) > self.limit:
            raise Refusal(
                429,
                f"the queue is full ({self.limit} waiting); try again later",
                headers={"Retry-After": str(ceil(self.estimate(1) or 5))},
            )
        self._count += 1
        ticket = Ticket(self, replace(job, id=self._count))
        self.tickets[self._count] = ticket
        self._outgoing.put(ticket.job)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Take a job out of the queue; if it runs, it stops before its next step. Does nothing once it has ended."""
        if ticket.job.id in self.tickets:
            self._forget(ticket)
            self._outgoing.put(Cancel(ticket.job.id))
            if self.running == ticket.job.id:
                self.loop.call_later(GRACE_S, self._end_stuck, ticket.job.id)

    def interrupt(self) -> None:
        """Stop the running job before its next step; its client gets the images that are finished."""
        if self.running is not None:
            self._outgoing.put(Cancel(self.running))

    def _end_stuck(self, id: int) -> None:
        if self.running == id and self.process:
            log.error("a cancelled job did not stop within %g s; ending its process", GRACE_S)
            self.process.kill()

    def estimate(self, count: int | None = None) -> float | None:
        """Seconds until the first `count` jobs, by default all, have ended; None if that is not known yet."""
        tickets = list(self.tickets.values())[:count]
        if any(ticket.job.model not in self._pace for ticket in tickets):
            return None
        return sum(ticket.left * self._pace[ticket.job.model] for ticket in tickets)

    def _received(self, message: Any) -> None:
        if isinstance(message, Ready):
            self.models = message.models
            if not self._ready.done():
                self._ready.set_result(None)
        elif isinstance(message, Loaded):
            self.loaded = message.model
        elif isinstance(message, Note):
            log.warning(message.message)
        elif isinstance(message, Failed) and message.id is None:
            self.why = message.message
            if not self._ready.done():
                self._ready.set_exception(getattr(errors, message.kind, ZImageError)(message.message))
        else:
            self._about_job(message)

    def _about_job(self, message: Any) -> None:
        ended = isinstance(message, (Done, Failed))
        if isinstance(message, Started):
            self.running = message.id
        elif ended and self.running == message.id:
            self.running = None
        ticket = self.tickets.get(message.id)
        if ticket is None:  # cancelled
            return
        if isinstance(message, Accepted):
            ticket.accepted = message
        elif isinstance(message, Started):
            ticket.started = self.loop.time()
        elif isinstance(message, Progress):
            ticket.progress = message.done / message.steps
        elif ended:
            self._forget(ticket)
        if isinstance(message, Done):
            self._ends = 0
            self._learn_pace(ticket)
        ticket.put(Refusal(STATUS.get(message.kind, 500), message.message) if isinstance(message, Failed) else message)

    def _learn_pace(self, ticket: Ticket) -> None:
        if ticket.accepted and ticket.started is not None:
            pace, model = (self.loop.time() - ticket.started) / ticket.accepted.work, ticket.job.model
            self._pace[model] = pace + (1 - NEWEST) * (self._pace.get(model, pace) - pace)

    def _forget(self, ticket: Ticket) -> None:
        del self.tickets[ticket.job.id]
        for other in self.tickets.values():
            other.put(Moved())

    def _fail_all(self, refusal: Refusal) -> None:
        for ticket in self.tickets.values():
            ticket.put(refusal)
        self.tickets.clear()
