"""This machine's properties and speed, and the process-wide limits that are set on it.

Only this module sets MLX's limits, the C library's allocator and an environment variable. Limits and allocator are set
for the duration of a `with` block, then restored; the variable stays, since MLX reads it once, at its first operation.
Signal handlers are set in cli/stop.py, server/worker.py and distributed.py; cli/stop.py also limits open files when it
stops a download.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from itertools import takewhile
from math import inf
from pathlib import Path
from threading import RLock

import mlx.core as mx

from . import atomic
from .errors import MemoryBudgetError, ModelNotFoundError
from .launched import uses_nccl
from .sizes import size
from .untrusted import parse_json, read_bytes

# Bytes of a Mac's working set left for what is on its screen; at most a tenth of the set. A guess: a frame of a 5K
# display is 59 MB, and the display and each large window hold two or three frames.
WINDOW_SERVER = 500 * 10**6
LARGE_MAC = 36 * 2**30  # bytes: on a Mac with at least this much memory, macOS recommends a larger part
MEMORY_SHARE = 0.6  # share of the memory to use, if the system does not recommend one
# Bytes that threads' heaps and stacks and compiled kernels take of the address space (measured with pocket: 0.5 to 0.6
# GB), and the share of the rest to plan with: MLX's CPU backend unfolds convolutions in memory that it does not count;
# in all they took 2.4 times what it counted.
OVERHEAD, LIMIT_SHARE = 700 * 10**6, 1 / 3
# The number of input rows from which a quantized weight is unpacked for a dense product; with fewer, it is multiplied
# in packed form. Measured: on the CPU unpacking is always faster. On CUDA (H200) it is faster from 256 rows on, 2.5
# times at 4192; below, the packed product saves a few ms per prompt, but costs half a minute of compiling kernels. On
# Metal, we have measured nothing: reports on M1 to M4 agree that unpacking is faster at an image's thousands of rows,
# but do not cover a prompt's.
UNPACK_FROM = {"cpu": 0, "cuda": 0, "metal": 512}
# Peak TFLOP/s of the smallest GPU sold as each generation's M, M Pro, M Max and M Ultra: cores * 128 multiply-adds *
# clock. Later generations count as the last one listed; an M5's matrix units are not counted.
TIERS = ("", "Pro", "Max", "Ultra")
PEAK_TFLOPS = {
    1: (2.3, 4.6, 7.9, 15.9),
    2: (2.9, 5.7, 10.7, 21.5),
    3: (2.8, 4.9, 10.6, 21.2),
    4: (3.0, 6.0, 12.0, 24.0),
}
REACHED = 0.45  # share of the peak that large products reach: reported from 0.43 (bfloat16, M1 Max) to 0.87 (M3 Ultra)
UNKNOWN_RATE = 5e11  # FLOP/s for any other GPU that Metal drives, such as a virtual one
KERNEL_S = 0.5  # seconds at the products' rate; attention and convolutions reach half of it, so really a second
RATES = "product_rates.json"  # in home(): FLOP/s by device name
# Options of glibc's mallopt, and their defaults from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
ALLOCATOR_DEFAULTS = {M_ARENA_MAX: 0, M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 1024}
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # where Linux says what limits a process


# ---- what this machine is


def backend() -> str:
    """The backend MLX computes on: "cpu", "cuda" or "metal"."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def default_dtype() -> str:
    """The best dtype for this machine: float32 on a CPU; bfloat16 on a GPU, or float16 on M1 and M2, which emulate
    bfloat16, and in virtual machines, whose GPU may lack it.
    """
    if mx.default_device() != mx.gpu:
        return "float32"
    emulates = re.match(r"Apple M[12]\b", str(mx.device_info().get("device_name")))
    return "float16" if emulates or is_virtual() else "bfloat16"


def wide_dtype() -> str:
    """The dtype that replaces float16 when it overflows: bfloat16, or float32 on a GPU without bfloat16."""
    return "float32" if is_virtual() else "bfloat16"


def is_virtual() -> bool:
    """Whether the default device is the GPU that macOS offers to virtual machines."""
    return "Paravirtual" in str(mx.device_info().get("device_name"))


def supports_matrix_units() -> bool:
    """Whether MLX sees a GPU with the matrix units of an M5, which it calls NAX."""
    chip = re.fullmatch(r".*?(\d\d)([a-z])", str(mx.device_info().get("architecture")))
    return backend() == "metal" and chip is not None and int(chip[1]) >= (18 if chip[2] == "p" else 17)


def has_matrix_units() -> bool:
    """Whether MLX uses those units: macOS and MLX's wheel must be new enough as well."""
    wheel = metal_wheel()
    built = wheel is None or version_of(wheel.replace("_", ".").removeprefix("macosx.")) >= (26,)
    return supports_matrix_units() and version_of(platform.mac_ver()[0]) >= (26, 2) and built


def metal_wheel() -> str | None:
    """The platform tag of MLX's installed wheel for Metal, such as "macosx_26_0_arm64"; None if there is no wheel."""
    try:
        wheel = distribution("mlx-metal").read_text("WHEEL") or ""
    except PackageNotFoundError:
        return None
    tag = re.search(r"^Tag: .*-(macosx_\w+)$", wheel, re.MULTILINE)
    return tag[1] if tag else None


def version_of(text: str) -> tuple[int, ...]:
    """The numeric parts at the start of a version."""
    return tuple(int(part) for part in takewhile(str.isdecimal, text.split(".")))


def mlx_version() -> str:
    return mx.__version__  # type: ignore[attr-defined]  # missing from MLX's stubs


def unpack_from() -> int:
    """UNPACK_FROM for this backend, unless the environment variable MLX_ZIMAGE_UNPACK_FROM overrides it."""
    given = os.environ.get("MLX_ZIMAGE_UNPACK_FROM", "")
    return int(given) if given.isdecimal() else UNPACK_FROM[backend()]


def machine_budget() -> int:
    """The bytes of memory a process should use here: the GPU's recommended working set, or a share of system memory.

    The share is of what this process may use, which in containers and jobs is less than all of it.
    """
    device = mx.device_info()
    recommended = device.get("max_recommended_working_set_size")
    if recommended:
        return _beside_others(int(recommended))
    of_gpu = int(device.get("total_memory") or device.get("memory_size") or 0)
    if of_gpu:
        return int(MEMORY_SHARE * of_gpu)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(MEMORY_SHARE * min([total, *cgroup_limits()])), process_limit())


def mac_budget(memory: int) -> int:
    """machine_budget of a Mac with this many bytes of memory, as macOS recommends by default."""
    return _beside_others(mac_working_set(memory))


def mac_working_set(memory: int) -> int:
    """The part of a Mac's memory that macOS recommends for its GPU by default; newer systems may recommend more.

    Two thirds on small Macs and three quarters on large ones, as reported for Macs with 16, 24, 32 and 96 GB.
    """
    return memory * 2 // 3 if memory < LARGE_MAC else memory * 3 // 4


def _beside_others(recommended: int) -> int:
    return recommended - min(recommended // 10, WINDOW_SERVER)


def check_budget(budget: int) -> int:
    """A caller's memory budget in bytes; MemoryBudgetError if this process could not allocate that much."""
    limit = process_limit() if backend() == "cpu" else budget
    if budget > limit:
        raise MemoryBudgetError(
            f"the memory budget is {size(budget)}, but `ulimit` leaves this process only {size(limit)}; raise that "
            f"limit, or lower the budget with --memory (memory= in Python)"
        )
    return budget


def process_limit() -> int:
    """The bytes to use of what `ulimit -v` and `ulimit -d` leave this process; beyond those limits MLX crashes."""
    try:
        pages, *_, data, _ = map(int, Path("/proc/self/statm").read_text().split())
    except OSError:  # macOS sets no such limits
        return 2**63
    page = os.sysconf("SC_PAGE_SIZE")
    limits = ((resource.RLIMIT_AS, pages * page), (resource.RLIMIT_DATA, data * page))
    soft = ((resource.getrlimit(kind)[0], used) for kind, used in limits)
    left = min((limit - used for limit, used in soft if limit != resource.RLIM_INFINITY), default=2**63)
    return int(LIMIT_SHARE * max(0, left - OVERHEAD))


def max_buffer() -> int:
    """The bytes that one tensor may take: Metal allows less than a GPU's whole working set."""
    return int(mx.device_info().get("max_buffer_length") or 2**63)


def cgroup_limits() -> Iterator[int]:
    """The memory limits in bytes that this process's control groups on Linux, and their parent groups, set."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # cgroup v2, where one group has all controllers
            top, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        # in a container the path may be the host's, and the group itself is mounted at the top
        for folder in {top, group, *(parent for parent in group.parents if top in parent.parents)}:
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdecimal():  # "max" means no limit
                yield int(text)


# ---- how fast this machine is


def product_rate() -> float:
    """FLOP per second of large matrix products on this GPU: as measured here, otherwise estimated from its name.

    Infinite where no watchdog kills long kernels: on a CPU and on CUDA.
    """
    if backend() != "metal":
        return inf
    name = str(mx.device_info().get("device_name"))
    return _rates().get(name) or rate_of(name)


def rate_of(name: str) -> float:
    """FLOP per second of products on a Mac's GPU with this name, estimated on the low side."""
    chip = re.match(r"Apple M(\d+)(?: (Pro|Max|Ultra))?\b", name)
    if not chip:
        return UNKNOWN_RATE
    generation = min(int(chip[1]), max(PEAK_TFLOPS))
    return REACHED * 1e12 * PEAK_TFLOPS[generation][TIERS.index(chip[2] or "")]


def time_products(rows: int, dtype: mx.Dtype, dim: int, width: int, chain: int) -> float:
    """FLOP per second of matrix products (rows, dim) x (dim, width) and back, `chain` of them timed together."""
    x, w = mx.random.normal((rows, dim)).astype(dtype), (mx.random.normal((width, dim)) * width**-0.5).astype(dtype)
    mx.eval(x, w)
    times = []
    for _ in range(6):
        start, y = time.perf_counter(), x
        for _ in range(chain // 2):  # chained, since launching a single product can take longer than computing it
            y = mx.matmul(mx.matmul(y, w.T), w)
        mx.eval(y)
        times.append(time.perf_counter() - start)
    return chain * 2 * rows * dim * width / statistics.median(times[1:])


def comparable_rate(dtype: mx.Dtype, dim: int, width: int) -> float:
    """FLOP per second of products of a network's widths, measured in less than a second, to compare machines by."""
    if backend() == "cpu":
        return time_products(32, dtype, min(dim, 512), min(width, 512), chain=2)
    return time_products(1024, dtype, dim, width, chain=2)


def remember_product_rate(rate: float) -> None:
    """Save the rate measured on this GPU, in FLOP per second; if it cannot be saved, do nothing."""
    known = _rates() | {str(mx.device_info().get("device_name")): float(rate)}
    with suppress(OSError, ModelNotFoundError):
        home().mkdir(parents=True, exist_ok=True)
        atomic.write(home() / RATES, partial(Path.write_text, data=json.dumps(known)), lasting=False)


def kernel_flops() -> float:
    """The most FLOPs that one kernel should take: macOS kills kernels that occupy a GPU for seconds."""
    return KERNEL_S * product_rate()


def _rates() -> dict[str, float]:
    try:
        known = parse_json(read_bytes(home() / RATES))
        return {name: float(rate) for name, rate in known.items() if 0 < float(rate) < inf}
    except (OSError, ValueError, TypeError, AttributeError, ModelNotFoundError):
        return {}


def home() -> Path:
    """The folder for files that this program creates for itself: converted models and measurements."""
    given = os.environ.get("MLX_ZIMAGE_HOME")
    try:
        if given:
            return Path(given).expanduser()
        caches = Path(os.environ.get("XDG_CACHE_HOME", "")).expanduser()
        if not caches.is_absolute():  # the XDG specification says to ignore it
            caches = Path("~/.cache").expanduser()
        return caches / "mlx-zimage"
    except RuntimeError:  # the user has no home folder
        raise ModelNotFoundError("no home folder found to keep models in; set MLX_ZIMAGE_HOME to a folder") from None


# ---- what is set once


def avoid_cuda_graphs() -> None:
    """Have MLX launch kernels one by one where machines communicate through NCCL; the environment may say otherwise.

    The host launches single kernels faster than graphs with NCCL's in them. To be called before MLX's first operation
    on the GPU, when it reads this variable; later, it changes nothing.
    """
    if uses_nccl():
        os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")


# ---- limits that are set, then restored


class Shared:
    """A process-wide limit that several callers may set at once, such as pipelines in two threads.

    The last one set applies; once all callers have left, the original limit is restored.
    """

    def __init__(self, put: Callable[[int], int]):
        """put sets the limit and returns the previous one."""
        self._put = put
        self._asked: list[list[int]] = []
        self._before = 0
        # reentrant, since an abandoned generator may be finalized while the lock is held, and then exits its `limits`
        # block
        self._lock = RLock()

    @contextmanager
    def asked(self, nbytes: int) -> Iterator[Callable[[int], None]]:
        """Set the limit within the block; yields a function that changes it."""
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


# lambdas, so that tests can replace MLX's functions
_cache = Shared(lambda nbytes: mx.set_cache_limit(nbytes))
_wired = Shared(lambda nbytes: mx.set_wired_limit(nbytes))


def _keep_freed(keep: int) -> int:
    keep_freed_memory() if keep else give_freed_memory_back()
    return False  # the state before the first caller


_freed = Shared(_keep_freed)


@contextmanager
def limits(cache: int) -> Iterator[Callable[[int], None]]:
    """Limit MLX's cache of freed memory to `cache` bytes within the block; yields a function that changes the limit."""
    with kept_allocations(), _cache.asked(cache) as change:
        yield change


@contextmanager
def kept_allocations() -> Iterator[None]:
    """On CUDA, within the block, have the C library keep freed memory for the next tensor that is read."""
    if backend() != "cuda":
        yield
        return
    with _freed.asked(True):
        yield


@contextmanager
def wired(nbytes: int) -> Iterator[None]:
    """On macOS, within the block, wire nbytes of Metal's memory, so that other programs cannot page it out.

    Only for weights that stay resident, and only on request: macOS has been seen to panic under wired memory.
    """
    if backend() != "metal":
        yield
        return
    with _wired.asked(min(nbytes, int(mx.device_info(mx.gpu)["max_recommended_working_set_size"]))):
        try:
            yield
        finally:
            mx.synchronize()  # nothing may still be running on memory that is about to be unwired


def keep_freed_memory() -> None:
    """Have glibc's malloc keep up to 2 GB of the memory this process frees, in one heap for all threads.

    MLX's CUDA build reads every tensor into newly allocated memory. By default malloc returns it to the system each
    time, and touching new memory takes about as long as the read itself.
    """
    _set_allocator({M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def give_freed_memory_back() -> None:
    """Restore the defaults of glibc's malloc, and return the memory it kept to the system."""
    _set_allocator(ALLOCATOR_DEFAULTS)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _set_allocator(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option, value in options.items():
            mallopt(option, value)
