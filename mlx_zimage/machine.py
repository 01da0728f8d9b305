"""What this machine is, how fast it multiplies, and the limits that this process takes on it.

The only place that touches what a whole process shares: MLX's limits and the C library's allocator. Each is taken for
the length of a `with`, and what was there before comes back.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path
from threading import RLock

import mlx.core as mx

from . import atomic
from .errors import ModelNotFoundError

MEMORY_SHARE = 0.6  # of the memory, where the system does not recommend a share itself
# From how many rows of input on a packed weight is unpacked for the dense product; below, it is multiplied as it is.
# Measured: on the CPU unpacking always wins. So it does on CUDA (H200) from 256 rows on, 2.5 times at 4192; below, the
# packed product saves a few ms a prompt, and costs half a minute of compiling kernels. Not measured by us: on Metal,
# reports of M1 to M4 agree that unpacking wins at a picture's thousands of rows, and say nothing of a prompt's.
UNPACK_FROM = {"cpu": 0, "cuda": 0, "metal": 512}
# Peak TFLOP/s of the smallest GPU sold as each generation's M, M Pro, M Max and M Ultra: cores * 128 multiply-adds *
# clock. Later generations count as the last one here, and an M5 without its matrix units.
TIERS = ("", "Pro", "Max", "Ultra")
PEAK_TFLOPS = {
    1: (2.3, 4.6, 7.9, 15.9),
    2: (2.9, 5.7, 10.7, 21.5),
    3: (2.8, 4.9, 10.6, 21.2),
    4: (3.0, 6.0, 12.0, 24.0),
}
REACHED = 0.45  # of the peak, by large products: reports go from 0.43 (bfloat16 on an M1 Max) to 0.87 (an M3 Ultra)
UNKNOWN_RATE = 5e11  # FLOP/s, of any other GPU that Metal drives, such as a virtual one
KERNEL_S = 0.5  # seconds at the rate of products; attention and convolutions reach half of it, so a second in truth
RATES = "product_rates.json"  # in home(): FLOP/s by a device's name
# Options of glibc's mallopt, with the defaults that malloc.h names.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
ALLOCATOR_DEFAULTS = {M_ARENA_MAX: 0, M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 1024}
CGROUPS = Path("/sys/fs/cgroup")


# ---- what it is


def backend() -> str:
    """What MLX computes on: "cpu", "cuda" or "metal"."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def default_dtype() -> str:
    """What suits this machine: float32 on a CPU; on a GPU bfloat16, or float16 on M1 and M2, which emulate bfloat16,
    and in virtual machines, whose GPU may lack it.
    """
    if mx.default_device() != mx.gpu:
        return "float32"
    slow = re.match(r"Apple (M[12]\b|Paravirtual)", str(mx.device_info().get("device_name")))
    return "float16" if slow else "bfloat16"


def wide_dtype() -> str:
    """What takes float16's place where that overflows: bfloat16, or float32 on a GPU without bfloat16."""
    return "float32" if "Paravirtual" in str(mx.device_info().get("device_name")) else "bfloat16"


def mlx_version() -> str:
    return mx.__version__  # type: ignore[attr-defined]  # MLX's stubs leave it out


def unpack_from() -> int:
    """The rule above for this backend, or what the environment variable MLX_ZIMAGE_UNPACK_FROM says."""
    given = os.environ.get("MLX_ZIMAGE_UNPACK_FROM", "")
    return int(given) if given.isdecimal() else UNPACK_FROM[backend()]


def machine_budget() -> int:
    """What a process should use here: the working set that the GPU recommends, or a share of the memory.

    Of the system's own memory it is a share of what the process may have: containers and jobs are given less than all.
    """
    device = mx.device_info()
    recommended = device.get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    of_gpu = int(device.get("total_memory") or device.get("memory_size") or 0)
    if of_gpu:
        return int(MEMORY_SHARE * of_gpu)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(MEMORY_SHARE * min([total, *cgroup_limits()]))


def cgroup_limits(membership: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> Iterator[int]:
    """The limits of memory in bytes that this process's control groups, and those around them, set on Linux."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2, where one group has all controllers
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        # in a container the path may be the host's, and the group itself stands at the top
        for folder in {top, group, *(parent for parent in group.parents if top in parent.parents)}:
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdecimal():  # "max" is none
                yield int(text)


# ---- how fast it is


def product_rate() -> float:
    """FLOP per second of large matrix products on this GPU: as measured here, else by its name.

    Infinite where nothing ends a kernel for taking long: on a CPU, and on CUDA before it is measured.
    """
    if backend() == "cpu":
        return inf
    name = str(mx.device_info().get("device_name"))
    return _rates().get(name) or (rate_of(name) if backend() == "metal" else inf)


def rate_of(name: str) -> float:
    """FLOP per second of products on a Mac's GPU of this name, rather too low than too high."""
    chip = re.match(r"Apple M(\d+)(?: (Pro|Max|Ultra))?\b", name)
    if not chip:
        return UNKNOWN_RATE
    generation = min(int(chip[1]), max(PEAK_TFLOPS))
    return REACHED * 1e12 * PEAK_TFLOPS[generation][TIERS.index(chip[2] or "")]


def remember_product_rate(rate: float) -> None:
    """Keep what was measured on this GPU, in FLOP per second; without a folder to keep it in, it is forgotten."""
    known = _rates() | {str(mx.device_info().get("device_name")): float(rate)}
    with suppress(OSError, ModelNotFoundError):
        home().mkdir(parents=True, exist_ok=True)
        atomic.write(home() / RATES, partial(Path.write_text, data=json.dumps(known)), lasting=False)


def kernel_flops() -> float:
    """The most that one kernel should compute: macOS ends what keeps a GPU for seconds."""
    return KERNEL_S * product_rate()


def _rates() -> dict[str, float]:
    try:
        known = json.loads((home() / RATES).read_text())
        return {name: float(rate) for name, rate in known.items() if 0 < float(rate) < inf}
    except (OSError, ValueError, TypeError, AttributeError, ModelNotFoundError):
        return {}


def home() -> Path:
    """Where this program keeps what it makes for itself: converted models, and what it measured."""
    given = os.environ.get("MLX_ZIMAGE_HOME")
    try:
        if given:
            return Path(given).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-zimage"
    except RuntimeError:  # nobody's home
        raise ModelNotFoundError("there is no home folder to keep models in; set MLX_ZIMAGE_HOME to a folder") from None


# ---- limits that are taken, and given back


class Shared:
    """A limit of the whole process, which several may ask for at once, as pipelines in two threads do.

    Whoever asked last has it; once all have left, it is what it was before the first.
    """

    def __init__(self, put: Callable[[int], int]):
        """put sets the limit and returns the one before."""
        self._put = put
        self._asked: list[list[int]] = []
        self._before = 0
        # re-entered where a generator that was let go is finalized in the middle, which leaves its limits
        self._lock = RLock()

    @contextmanager
    def asked(self, nbytes: int) -> Iterator[Callable[[int], None]]:
        """The limit while within; what it yields changes it."""
        mine = [max(0, nbytes)]

        def change(nbytes: int) -> None:
            with self._lock:
                mine[0] = max(0, nbytes)
                self._put(self._asked[-1][0])

        with self._lock:
            first = not self._asked
            self._asked.append(mine)
            before = self._put(self._asked[-1][0])
            if first:
                self._before = before
        try:
            yield change
        finally:
            with self._lock:
                self._asked = [other for other in self._asked if other is not mine]
                self._put(self._asked[-1][0] if self._asked else self._before)


# looked up when they are called, since tests stand in for them
_cache = Shared(lambda nbytes: mx.set_cache_limit(nbytes))
_wired = Shared(lambda nbytes: mx.set_wired_limit(nbytes))


def _keep_freed(keep: int) -> int:
    keep_freed_memory() if keep else give_freed_memory_back()
    return False  # before the first who asked


_freed = Shared(_keep_freed)


@contextmanager
def limits(cache: int) -> Iterator[Callable[[int], None]]:
    """Have MLX hold on to at most `cache` bytes of freed memory, which what this yields changes; then as before."""
    with kept_allocations(), _cache.asked(cache) as change:
        yield change


@contextmanager
def kept_allocations() -> Iterator[None]:
    """On CUDA, have the C library keep what is freed for the next tensor that is read; then as before."""
    if backend() != "cuda":
        yield
        return
    with _freed.asked(True):
        yield


@contextmanager
def wired(nbytes: int) -> Iterator[None]:
    """Have macOS keep nbytes of what Metal holds in memory, against other programs' demands; then as before.

    Only for weights that stay, and only where someone asks for it: macOS has been seen to panic under wired memory.
    """
    if backend() != "metal":
        yield
        return
    with _wired.asked(min(nbytes, int(mx.device_info(mx.gpu)["max_recommended_working_set_size"]))):
        try:
            yield
        finally:
            mx.synchronize()  # nothing may still be running on what is let go


def keep_freed_memory() -> None:
    """Have glibc's malloc keep up to 2 GB of what this process frees, in one heap for all threads.

    MLX's CUDA build reads every tensor into memory of its own. By default that is given back to the system each time,
    and to touch new memory takes about as long as the reading.
    """
    _set_allocator({M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def give_freed_memory_back() -> None:
    """Have glibc's malloc do as by default again, and give back what it kept."""
    _set_allocator(ALLOCATOR_DEFAULTS)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _set_allocator(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option, value in options.items():
            mallopt(option, value)
