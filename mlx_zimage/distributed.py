"""Images on several machines, through MLX's own communication: `mlx.launch` starts a process, a rank, on each.

Every rank has the whole model, resident or streamed within its own memory budget, and computes its share of the rows of
each sequence (see `models.runner.Ranks`). Rank 0 leads: it takes requests, encodes prompts and has the results. The
others follow: they run the same requests. With guidance, each of two ranks computes the velocity of one prompt instead.
If there are as many images as ranks, each rank generates a whole one and sends it to rank 0. Only `all_gather` and
`all_sum` are used, which every backend has: ring (TCP), jaccl (RDMA over Thunderbolt 5) and nccl (CUDA).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import IntFlag
from itertools import accumulate, pairwise
from typing import Any, TypeVar
from zipfile import BadZipFile

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from .errors import GroupError, NumericsError, RequestError
from .failures import LOST, explain
from .launched import is_launched, uses_nccl
from .sampling import Change, Step, Velocities

E = TypeVar("E")
R = TypeVar("R")
T = TypeVar("T")
# Seconds for rank 0's caller to continue, for an image's first step, which may read the weights, and for what each rank
# does by itself.
PATIENCE = 600.0
MEETING = 120.0  # seconds for all ranks to start and connect
LIMIT, SHORTEST_LIMIT = 5.0, 60.0  # times the longest step so far, and at least this many seconds
# Measured on H200s: at 512x512 (1024 tokens), four ranks and two teams of two were slower than one, and two faster.
# With at least this many rows per rank, queueing NCCL's transfers separately is faster: with 1048 it was, with 528 it
# was not.
LEAST, APART = 512, 1024
EVEN = 0.9  # of the mean speed: where the slowest rank has at least that, all may do the same work
MOST_ERRORS = 1000  # more than there are collectives in a queue
PERIOD = 0.2  # seconds between the watchdog's checks
# Properties of MLX's device: machines on which all match count as equally fast.
CHIP = "device_name", "architecture", "memory_size"
NOISE = 1.1  # up to this ratio, measured speeds count as equal


class Signal(IntFlag):
    """What ranks signal before each joint computation. The first three are rank 0's; nothing means: continue."""

    CHANGED = 1  # other latents follow
    STOPPED = 2  # the remaining steps are skipped
    ENDED = 4  # the request is over
    FAILED = 8  # a rank that follows has failed
    BUSY = 16  # a rank has more to do by itself


GO = Signal(0)


@contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """Interrupts system calls within the block once it has taken this many seconds; does nothing outside the main
    thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def preparing(group: Group | None) -> Iterator[None]:
    """Within the block, each machine of a group prepares by itself; if one fails, all do, at the end of the block."""
    if group is None:
        yield
        return
    try:
        yield
    except Exception as error:
        with suppress(GroupError):  # another is lost, too
            group.exchange(str(error) or type(error).__name__)
        raise
    for rank, problem in enumerate(group.exchange("")):
        if problem:
            raise GroupError(f"rank {rank} failed: {problem}")


class Ended(Exception):
    """Rank 0 has ended the request that this rank follows."""


class SharingBySpeed:
    """How ranks share rows, by the speed of each: a `models.runner.Sharing`."""

    def __init__(self, number: int, speeds: Sequence[float]):
        """number is this rank's."""
        self.number, self.count = number, len(speeds)
        self._ends = [0.0, *(end / sum(speeds) for end in accumulate(speeds))]

    def bounds(self, rows: int) -> list[tuple[int, int]]:
        """The first row of each rank's part of a sequence, and the row after its last."""
        return list(pairwise(round(end * rows) for end in self._ends))

    def shares(self, parts: Sequence[int]) -> tuple[int, ...]:
        if self.count == 1:
            return ()
        each = [self.bounds(rows) for rows in parts]
        return tuple(sum(end - start for start, end in bounds) for bounds in zip(*each, strict=True))

    def mine(self, rows: int) -> tuple[int, int]:
        return self.bounds(rows)[self.number]

    def own(self, x: mx.array, parts: Sequence[int], axis: int = 0) -> mx.array:
        pieces, before = [], 0
        for rows in parts:
            start, end = self.mine(rows)
            index = [slice(None)] * axis + [slice(before + start, before + end)]
            pieces.append(x[tuple(index)])
            before += rows
        return mx.concatenate(pieces, axis=axis)


def relative_speeds(rates: Sequence[float]) -> list[float]:
    """Multiples of the slowest rate, in tenths, so that they are the same in the next run; 1 if all are about equal."""
    slowest = min(rates)
    return [1.0 if max(rates) <= NOISE * slowest else round(rate / slowest, 1) for rate in rates]


class Group(SharingBySpeed):
    """The ranks that generate images together; a `models.runner.Ranks`.

    speeds are the ranks' relative speeds, one each, by which rows are shared; by default they are equal, or measured by
    `share_by`. A step that takes more than a minute, and five times as long as any earlier one of the same image, or as
    training expects, ends this process with an error: another rank has stalled, and MLX would wait forever.
    """

    def __init__(self, group: mx.distributed.Group, speeds: Sequence[float] | None = None):
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.settled = speeds is not None
        speeds = [1.0] * self.size if speeds is None else list(speeds)
        if len(speeds) != self.size or not all(0 < speed < float("inf") for speed in speeds):
            raise RequestError(f"speeds must be {self.size} positive numbers, one per rank, got {speeds}")
        self._share(speeds)
        # NCCL computes on the GPU, the other backends on the CPU
        self._on_gpu = uses_nccl()
        self._stream = mx.new_thread_local_stream(mx.gpu if self._on_gpu else mx.cpu)
        self._longest = 0.0
        self._broken = self._ended = False
        self._calls = 0  # calls of _gathered: the same number on all ranks
        self._deadline: float | None = None
        self._failure = ""  # what failed on this rank
        self._watchdog: threading.Thread | None = None

    @classmethod
    def of(cls, group: mx.distributed.Group | Group | None) -> Group | None:
        """A Group of these ranks; None if there is only one."""
        if group is None or isinstance(group, Group):
            return group
        return cls(group) if group.size() > 1 else None

    @classmethod
    def launched(cls) -> Group | None:
        """The processes that `mlx.launch` started with this one; None if there are none.

        GroupError if they do not connect in time. MLX's ring would wait forever, and no other thread could run.
        """
        if not is_launched():
            return None
        with interrupted(MEETING):
            try:
                return cls.of(mx.distributed.init(strict=True))
            except RuntimeError as error:
                raise GroupError(
                    f"the machines did not connect ({error}): see what the others printed, then start the whole group "
                    f"again"
                ) from error

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def _share(self, speeds: Sequence[float]) -> None:
        SharingBySpeed.__init__(self, self.rank, speeds)
        self.speeds = tuple(speeds)
        self.is_even = min(speeds) * self.size >= EVEN * sum(speeds)

    def share_by(self, measure: Callable[[], float]) -> None:
        """Share rows by what is measured on each rank, once, unless speeds were given or all have the same chip."""
        if self.settled:
            return
        self.settled, device = True, mx.device_info()
        chips = self.exchange([device.get(name) for name in CHIP])
        if any(chip != chips[0] for chip in chips):
            self._share(relative_speeds(self.exchange(measure())))

    # ---- rows: see `models.runner.Ranks`

    def among(self, tokens: int) -> SharingBySpeed:
        """All ranks; but each computes all of a small image by itself, since exchanging would take longer."""
        return self if tokens >= LEAST * self.size else SharingBySpeed(0, [1.0])

    def parts(self, rows: int) -> int:
        # NCCL's kernels wait for the GPU, so more parts only cost time; for few rows, even queueing one does
        return int(rows >= APART) if self._on_gpu else 2

    def gather(self, x: mx.array, shares: Sequence[int], apart: bool = True) -> mx.array:
        if not shares:
            return x
        batch, own, *rest = x.shape
        most = max(shares)
        if own < most:  # MLX gathers arrays of equal shapes
            x = mx.pad(x, [(0, 0), (0, most - own)] + [(0, 0)] * len(rest))
        every = self._all_gather(x) if apart else mx.distributed.all_gather(x, group=self.group)
        every = every.reshape(self.size, batch, most, *rest)
        if min(shares) == most:
            return every.swapaxes(0, 1).reshape(batch, -1, *rest)
        return mx.concatenate([every[i, :, :rows] for i, rows in enumerate(shares)], axis=1)

    # ---- MLX's collectives. They run one after another on a stream of their own, and each is queued on its own: NCCL
    # does not allow two at a time, and MLX runs two operations concurrently if neither needs the other's result.

    def _all_gather(self, x: mx.array) -> mx.array:
        return self._queued(mx.distributed.all_gather, x)

    def _all_sum(self, x: mx.array) -> mx.array:
        return self._queued(mx.distributed.all_sum, x)

    def _queued(self, collective: Callable[..., mx.array], x: mx.array) -> mx.array:
        if self._broken:  # what it would return is arbitrary, or never comes
            raise GroupError(LOST)
        mx.async_eval(x)
        result = collective(x, group=self.group, stream=self._stream)
        mx.async_eval(result)
        return result

    # ---- from rank 0 to the others

    def from_first(self, x: mx.array) -> mx.array:
        """Rank 0's x; the others pass any array of its shape and dtype."""
        return self._all_sum(x if self.leads else mx.zeros_like(x))

    def all_from_first(self, arrays: T) -> T:
        """Rank 0's tree of arrays, once it has them."""
        self.signal()
        return self.summed(arrays if self.leads else tree_map(mx.zeros_like, arrays))

    def summed(self, arrays: T) -> T:
        """A tree of arrays, each summed over all ranks. To be called once all are there, after a `signal`."""
        with self.computing(SHORTEST_LIMIT):
            found = tree_map(self._all_sum, arrays)
            mx.eval(found)
        return found

    def _totals(self, own: Sequence[int]) -> list[int]:
        """Each number summed over all ranks. GroupError if one is missing: MLX's ring may then return any numbers."""
        present, *totals = np.array(self._all_sum(mx.array([1, *own]))).tolist()
        if present != self.size:
            self._broken = True
            raise GroupError(LOST)
        return totals

    def _gathered(self, own: np.ndarray) -> np.ndarray:
        """Each rank's numbers, a row each. GroupError if one is missing: MLX's ring may then return any numbers, such
        as those of an earlier call, and would wait forever if asked again."""
        self._calls += 1
        mark = np.frombuffer(self._calls.to_bytes(8, "little"), np.uint8).astype(own.dtype)
        every = np.array(self._all_gather(mx.array(np.concatenate([mark, own])))).reshape(self.size, -1)
        if (every[:, : len(mark)] != mark).any():
            self._broken = True
            raise GroupError(LOST)
        return every[:, len(mark) :]

    def send(self, content: Mapping[str, np.ndarray]) -> None:
        """Send named arrays to the others, which `receive` them; no arrays at all, from rank 0, end their work."""
        buffer = io.BytesIO()
        if content:
            np.savez(buffer, **dict(content))  # type: ignore[arg-type]  # a name could be an option's
        data = np.frombuffer(buffer.getvalue(), np.uint8)
        with self.computing(PATIENCE):
            self._totals([len(data)])
            if len(data):
                mx.eval(self._all_sum(mx.array(data)))

    def end(self) -> None:
        """Rank 0 ends `receive` on the others."""
        if not (self._broken or self._ended):
            self._ended = True
            self.send({})

    def receive(self) -> dict[str, np.ndarray]:
        """What another rank sends next; this waits for as long as it takes."""
        (size,) = self._totals([0])
        if not size:
            return {}
        try:
            data = np.array(self._all_sum(mx.zeros(size, dtype=mx.uint8)))
            with np.load(io.BytesIO(data.tobytes()), allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, OSError, BadZipFile) as error:  # MLX's ring may return anything in its place
            raise GroupError(LOST) from error

    def send_in_turn(self, own: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """On rank 0, what each of the other ranks passes, in rank order; on the others, nothing."""
        every = []
        for rank in range(1, self.size):
            if rank == self.rank:
                self.send(own)
                continue
            with self.computing(PATIENCE):
                received = self.receive()
            every += [received] * self.leads
        return every

    def exchange(self, content: Any, patient: bool = True) -> list[Any]:
        """What each rank passes, in rank order: anything that JSON can hold. GroupError if one is missing.

        A patient rank waits PATIENCE for the others, otherwise as long as for a step; see `computing`.
        """
        text = json.dumps(content).encode()
        with self.computing(PATIENCE if patient else None):
            most = int(self._gathered(np.array([len(text)])).max())
            return [json.loads(row.tobytes()) for row in self._gathered(np.frombuffer(text.ljust(most), np.uint8))]

    def check_same(self, shown: Mapping[str, str], **others: Any) -> None:
        """GroupError on every rank if a value is not the same on all of them, with each rank's own if it is shown.

        shown are those that mean something to a reader, which checksums do not.
        """
        digests = {name: hashlib.sha256(str(value).encode()).hexdigest() for name, value in others.items()}
        machines = self.exchange({"host": platform.node(), "values": {**shown, **digests}})

        def named(rank: int, name: str) -> str:
            host, value = machines[rank]["host"], machines[rank]["values"].get(name)
            return f"{rank} ({host}: {value})" if name in shown else f"{rank} ({host})"

        for name, first in machines[0]["values"].items():
            ranks = [named(rank, name) for rank, own in enumerate(machines) if own["values"].get(name) != first]
            if ranks:
                have = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {' and '.join(ranks)} have"
                raise GroupError(
                    f"{have} a different {name} from rank {named(0, name)}; all machines need the same one"
                )

    # ---- a request

    @contextmanager
    def leading(self, work: Mapping[str, np.ndarray]) -> Iterator[None]:
        """On rank 0: within the block, the others follow this work; when the block ends, they stop."""
        if self._ended:
            raise GroupError(
                "the pipeline was closed, which ended the processes on the other machines: start the whole group again"
            )
        self._longest = 0.0
        self.send(work)
        try:
            yield
        finally:
            if not self._broken:
                self.signal(Signal.ENDED)

    @contextmanager
    def following(self) -> Iterator[None]:
        """On the other ranks: within the block, do the work that was given to `leading`."""
        self._longest = 0.0
        with suppress(Ended):
            try:
                yield
                self.signal()
            except Ended:
                raise
            except Exception:
                if not self._broken:
                    self.signal(Signal.FAILED)
                raise

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Within the block, all ranks do the same work, with a `signal` before each thing that they do together.

        Rank 0 may leave the block at any time, which ends it on all; if one rank fails, all do.
        """
        try:
            yield
        except Ended:
            return
        except BaseException:
            if not self._broken:
                with suppress(Ended, GroupError):  # if another has failed, too
                    self.signal(Signal.ENDED if self.leads else Signal.FAILED)
            raise
        with suppress(Ended):
            self.signal(Signal.ENDED if self.leads else GO)

    def each(self, events: Iterable[E], patient: bool = True) -> Iterator[E]:
        """This rank's own events. Each rank may have a different number of them, and all end together.

        patient is as in `exchange`, for each event.
        """
        own = iter(events)
        while True:
            event = next(own, None)
            if Signal.BUSY not in self.signal(GO if event is None else Signal.BUSY, patient):
                return
            if event is not None:
                yield event
            event = None  # not kept in memory while the next is computed

    def expect(self, seconds: float) -> None:
        """Say how long a step takes, before the first one."""
        self._longest = max(self._longest, seconds)

    def between(self, own: Signal = GO) -> Signal:
        """`signal` between two steps, where only rank 0's caller may take its time, so that only the others wait."""
        return self.signal(own, patient=not self.leads)

    def signal(self, own: Signal = GO, patient: bool = True) -> Signal:
        """What all ranks signal; Ended on the others if rank 0 has ended the work, GroupError if another one failed.

        If rank 0 ends the work just as another rank fails, the work counts as ended: both may have had the same error,
        which rank 0 reports.
        """
        with self.computing(PATIENCE if patient else None):
            counts = self._totals([int(flag in own) for flag in Signal])
        said = Signal(sum(flag for flag, count in zip(Signal, counts, strict=True) if count))
        if Signal.ENDED in said and not self.leads:
            raise Ended
        if Signal.FAILED in said and Signal.ENDED not in own:
            if Signal.FAILED in own:
                return own
            self._broken = True
            raise GroupError("another machine failed; its own message says why")
        return said

    def together(self, steps: Generator[Step, Change | None, R]) -> Generator[Step, Change | None, R]:
        """Steps that all ranks compute. The answers of rank 0's caller are everyone's."""
        change: Change | None = None
        latents = mx.zeros(())
        while True:
            own = GO
            if change is not None and self.leads:
                own = (GO if change.latents is None else Signal.CHANGED) | (Signal.STOPPED if change.stop else GO)
            said = self.between(own)
            begin = time.monotonic()
            with self.computing():
                if said:
                    given = self.from_first(latents) if said & Signal.CHANGED else None
                    change = Change(given, bool(said & Signal.STOPPED))
                try:
                    step = steps.send(change)
                except StopIteration as end:
                    return end.value
            self._longest = max(self._longest, time.monotonic() - begin)
            change = yield step
            latents = step.latents if change is None or change.latents is None else change.latents

    def one_each(self, velocities: Velocities) -> Velocities:
        """The velocities of as many prompts as there are ranks, of which each rank computes its own."""

        def all_of_them(latents: mx.array, i: int, count: int | None = None) -> list[mx.array]:
            (own,) = velocities(latents, i, None)
            return list(self._all_gather(own[None]))[:count]

        return all_of_them

    def abreast(self, events: Generator[E, Change | None, None]) -> Generator[E, Change | None, None]:
        """The events of a whole image of this rank's own, while the others compute theirs, step by step.

        If a rank fails or stalls, or rank 0's caller leaves, that ends the work of all.
        """
        change, begin = None, time.monotonic()
        while True:
            try:
                event = events.send(change)
            except StopIteration:
                break
            change = yield event
            if isinstance(event, Step):
                stops = self.leads and change is not None and change.stop
                if Signal.STOPPED in self.signal(Signal.BUSY | (Signal.STOPPED if stops else GO), patient=False):
                    change = Change(stop=True)
                self._longest, begin = max(self._longest, time.monotonic() - begin), time.monotonic()
        while Signal.BUSY in self.signal(patient=False):
            pass

    def in_step(self, steps: Generator[int, None, R]) -> Generator[int, None, R]:
        """Steps that all ranks compute; rank 0's caller may end them between any two."""
        while True:
            self.between()
            with self.computing():
                try:
                    done = next(steps)
                except StopIteration as end:
                    result = end.value
                    mx.eval(result)  # what all compute may so far have only been queued
                    break
            yield done
        self.signal()  # it is not used if a rank was lost
        return result

    # ---- failures

    @contextmanager
    def computing(self, limit: float | None = None) -> Iterator[None]:
        """Wraps what all ranks compute together: if it fails on only one of them, the others wait in vain.

        A rank that failed can do nothing more for the group; once its process ends, the others fail, too. If another
        rank stalls for longer than the limit in seconds, this process ends. By default, the limit is LIMIT times the
        longest step so far, but at least SHORTEST_LIMIT, and PATIENCE before the first step.
        """
        if self._watchdog is None:
            self._watchdog = threading.Thread(target=self._watch, daemon=True, name="watchdog of the group")
            self._watchdog.start()
        usual = max(SHORTEST_LIMIT, LIMIT * self._longest) if self._longest else PATIENCE
        self._deadline = time.monotonic() + (limit or usual)
        try:
            yield
        except NumericsError:  # on all ranks, since they have the same latents
            raise
        except BaseException as error:
            self._broken = True
            self._failure = str(explain(error) or error)
            self._deadline = time.monotonic() + max(SHORTEST_LIMIT, LIMIT * self._longest)
            # Other calls would wait for what is queued while holding Python's lock, which the watchdog needs.
            for stream in (mx.default_stream(mx.default_device()), self._stream):
                _wait_for(stream)
            raise
        finally:
            self._deadline = None

    def _watch(self) -> None:
        while True:
            time.sleep(PERIOD)
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                stalled = (
                    f"rank {self.rank} waited too long for the other machines: one of them has stalled, or is much "
                    f"slower. Start the whole group again"
                )
                os.write(2, f"Error: {self._failure or stalled}\n".encode())
                os._exit(GroupError.exit_code)  # MLX cannot be interrupted while it waits


def _wait_for(stream: mx.Stream | mx.ThreadLocalStream) -> None:
    """Wait until nothing is queued on a stream: an error of what was queued ends MLX's wait, but not the rest."""
    for _ in range(MOST_ERRORS):  # a GPU that failed may fail every time
        with suppress(RuntimeError):
            mx.synchronize(stream)
            return
