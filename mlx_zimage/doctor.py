"""Facts, speeds and limits of this machine. Whether it computes correctly is checked by `selftest`."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .machine import (
    backend,
    default_dtype,
    has_matrix_units,
    home,
    is_virtual,
    kernel_flops,
    machine_budget,
    metal_wheel,
    mlx_version,
    remember_product_rate,
    supports_matrix_units,
    time_products,
)
from .models.layers import pieces
from .models.transformer import PATCH, TransformerConfig
from .models.vae import VAEConfig
from .quantization import Quantization
from .request import MAX_TOKENS
from .selftest import Check
from .version import __version__
from .weights.checkpoint import Checkpoint
from .weights.component import Component
from .weights.library import CHOICES, DOWNLOAD, WEIGHTS_SHARE, choose_bits, planned

MACOS = 14  # the oldest version that MLX's wheels are built for
DISK_SAMPLE = 256 * 10**6  # bytes read to measure a disk
SLOW_BLOCK = 2.0  # seconds to read a block
LONG_KERNEL = 1.01  # seconds; the networks keep theirs to one, and macOS kills those that take a few
WITHOUT_MATRIX_UNITS = {"MLX_METAL_GPU_ARCH": "applegpu_g16s"}  # that of an M4 Max


# ---- what it is


def facts() -> dict[str, Any]:
    """This machine and its versions, ready for JSON; None where the backend does not report a value.

    memory_budget and max_buffer_length (the limit of a single array) are bytes. metal_wheel is the platform tag of
    MLX's wheel, None if MLX was built from source. matrix_units: whether MLX uses the matrix units of an M5 ("NAX").
    fast_synch: whether MLX_METAL_FAST_SYNCH is set.
    """
    device = mx.device_info()
    return {
        "mlx_zimage": __version__,
        "mlx": mlx_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "macos": platform.mac_ver()[0] or None,
        "device": device.get("device_name") or platform.processor() or platform.machine(),
        "backend": backend(),
        "architecture": device.get("architecture"),
        "dtype": default_dtype(),
        "memory_budget": machine_budget(),
        "max_buffer_length": device.get("max_buffer_length"),
        "metal_wheel": metal_wheel(),
        "matrix_units": has_matrix_units(),
        "fast_synch": os.environ.get("MLX_METAL_FAST_SYNCH", "0") != "0",
    }


# ---- how fast it is


@dataclass(frozen=True)
class Speeds:
    """FLOP per second of large matrix products in the default dtype; for a model, the bytes per second read from its
    disk, and the bytes of its largest block there. longest_kernel_s is predicted, None on a CPU."""

    product_rate: float
    longest_kernel_s: float | None = None
    disk_rate: float | None = None
    block_bytes: int | None = None

    @property
    def block_s(self) -> float | None:
        """Seconds to read a block."""
        return self.block_bytes / self.disk_rate if self.block_bytes and self.disk_rate else None


def speeds(width: int, height: int, model: Checkpoint | None = None) -> Speeds:
    """Measure this machine, and the disk of a model if one is given, for images of width x height.

    On Metal the product rate is stored: the networks split their work by it.
    """
    rows, dim, width = (1024, 2048, 2048) if backend() != "cpu" else (256, 512, 512)
    rate = time_products(rows, getattr(mx, default_dtype()), dim, width, chain=8)
    longest = None
    if backend() != "cpu":
        if backend() == "metal":
            remember_product_rate(rate)
        # kernels other than products reach half of the rate
        longest = 2 * longest_kernel(width, height, kernel_flops()) / rate
    if model is None:
        return Speeds(rate, longest)
    files = {entry.file for entry in model.transformer.entries.values()}
    disk_rate = read_rate(max(files, key=lambda file: file.stat().st_size))
    return Speeds(rate, longest, disk_rate, largest_block(model.transformer))


def longest_kernel(width: int, height: int, most: float) -> float:
    """FLOP of the longest kernel for images of width x height: attention, feed-forward or convolution, split into
    pieces of at most `most`.

    For a caption of MAX_TOKENS, in the full model.
    """
    transformer, vae = TransformerConfig(), VAEConfig()
    tokens = width * height // (vae.scale * PATCH) ** 2 + MAX_TOKENS
    convolved = max(vae.block_out_channels[:2])  # channels of the last upsampling, at full size
    rows = {  # how many, and the FLOP of each
        "attention": (tokens, 4 * tokens * transformer.dim),
        "feed-forward": (tokens, 2 * transformer.dim * transformer.ffn_dim),
        "convolution": (width * height, 2 * 9 * convolved**2),
    }
    return max((b - a) * flops for count, flops in rows.values() for a, b in pieces(count, flops, most)[:1])


def read_rate(file: Path) -> float:
    """Bytes per second of reading the last 256 MB of a file, bypassing the system's cache.

    On macOS this keeps what is read out of the cache, but what is there already may still come from it.
    """
    nbytes = min(DISK_SAMPLE, file.stat().st_size)
    with file.open("rb", buffering=0) as stream:
        if sys.platform == "darwin":
            fcntl.fcntl(stream, fcntl.F_NOCACHE, 1)
        else:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        stream.seek(-nbytes, os.SEEK_END)
        piece, begin = bytearray(8 * 2**20), time.perf_counter()
        while stream.readinto(piece):
            pass
        return nbytes / (time.perf_counter() - begin)


def largest_block(component: Component) -> int:
    """Bytes on disk of a network's largest block."""
    sizes = dict.fromkeys(component.config.blocks, 0)
    for name, entry in component.entries.items():
        for block in sizes:
            if name.startswith(f"{block}."):
                sizes[block] += entry.nbytes
    return max(sizes.values(), default=0)


# ---- what it is good for


@dataclass(frozen=True)
class Verdict:
    """Whether one aspect of this machine is good enough for the full model, why, and what to do if it is not."""

    name: str
    ok: bool
    message: str
    advice: str = ""


def verdicts(facts: dict[str, Any], speeds: Speeds) -> list[Verdict]:
    """All verdicts on this machine except the one on its arithmetic."""
    place = next(path for path in (home(), *home().absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    return [
        judge_system(platform.system(), platform.mac_ver()[0], platform.machine()),
        judge_gpu(facts["backend"], is_virtual()),
        *judge_room(facts["memory_budget"], free),
        *judge_build(facts, supports_matrix_units()),
        *judge_kernels(speeds),
        *judge_disk(speeds),
    ]


def judge_system(system: str, macos: str, cpu: str) -> Verdict:
    if system == "Darwin" and cpu != "arm64":
        advice = "install Python for arm64"
        return Verdict("system", False, "MLX needs Apple silicon, and a native Python (not one under Rosetta)", advice)
    if system == "Darwin" and int(macos.partition(".")[0]) < MACOS:
        return Verdict("system", False, f"MLX needs macOS {MACOS} or newer; this is macOS {macos}", "update macOS")
    return Verdict("system", system in ("Darwin", "Linux"), f"{system} on {cpu}")


def judge_gpu(backend: str, virtual: bool) -> Verdict:
    if backend == "cpu":
        advice = "on Linux with an NVIDIA GPU, install mlx-zimage[cuda]; on a Mac, leave MLX's default device unchanged"
        return Verdict("MLX build", False, "computes on the CPU: correct, but minutes per step at 1024x1024", advice)
    if virtual:
        message = "computes on the GPU of a virtual machine, in float16"
        return Verdict("MLX build", False, message, "run it outside the virtual machine for full speed")
    return Verdict("MLX build", True, "computes on the GPU")


def judge_room(budget: int, free: int) -> list[Verdict]:
    """The full model within this memory budget and free disk space, in bytes."""
    sizes = {bits: planned(bits).nbytes for bits in CHOICES}
    bits = choose_bits(sizes, budget)
    kind, size = "bfloat16" if bits is None else f"{bits}-bit", f"{sizes[bits] / 1e9:.1f} GB"
    if sizes[bits] <= WEIGHTS_SHARE * budget:
        memory = Verdict("memory", True, f"the {kind} model ({size}) stays in memory")
    else:
        message = f"the {kind} model ({size}) is read from disk for each image, or in parts for each step"
        memory = Verdict("memory", False, message, "keep the model on a fast disk; see mlx-zimage plan")
    needed = DOWNLOAD + sizes[bits]
    message = f"a first run needs {needed / 1e9:.0f} GB; {free / 1e9:.0f} GB is free"
    advice = "" if free >= needed else "free up space, or set MLX_ZIMAGE_HOME and HF_HOME to folders on a larger disk"
    return [memory, Verdict("disk", free >= needed, message, advice)]


def judge_build(facts: dict[str, Any], supports_matrix_units: bool) -> list[Verdict]:
    """How MLX was built and configured; empty if there is nothing to report."""
    found = []
    if supports_matrix_units:
        used, wheel = facts["matrix_units"], facts["metal_wheel"]
        message = f"MLX {'uses' if used else 'does not use'} this GPU's matrix units"
        if not used:
            message += f" (macOS {facts['macos']}, MLX built {f'for {wheel}' if wheel else 'from source'})"
        elif wheel is None:
            message += "; this MLX was built from source"
        advice = "update macOS to 26.2 or newer, then pip install --force-reinstall mlx mlx-metal"
        found.append(Verdict("matrix units", used, message, "" if used else advice))
    if facts["fast_synch"]:
        message, advice = "MLX_METAL_FAST_SYNCH is set; hangs have been reported with it", "unset it"
        found.append(Verdict("environment", False, message, advice))
    return found


def judge_kernels(speeds: Speeds) -> list[Verdict]:
    """The longest kernel, if something limits its time."""
    if speeds.longest_kernel_s is None:
        return []
    ok, message = speeds.longest_kernel_s <= LONG_KERNEL, f"the longest takes about {speeds.longest_kernel_s:.2g} s"
    advice = (
        "macOS stops GPU work that runs too long: generate smaller images, and set MLX_ZIMAGE_HOME to a writable "
        "folder, so that the measured speed can be stored"
    )
    return [Verdict("kernels", ok, message, "" if ok else advice)]


def judge_disk(speeds: Speeds) -> list[Verdict]:
    """The disk of a model, if it was measured."""
    if speeds.block_s is None or speeds.disk_rate is None:
        return []
    message = f"{speeds.disk_rate / 1e9:.2f} GB/s, {speeds.block_s:.2f} s per block"
    advice = "copy the model to the internal disk, or convert it to fewer bits"
    ok = speeds.block_s <= SLOW_BLOCK
    return [Verdict("model's disk", ok, message, "" if ok else advice)]


def judge_numbers(checks: Sequence[Check], retried: Sequence[Check] | None = None) -> Verdict:
    """The result of the self-test; `retried` has its checks without an M5's matrix units, if they were run."""
    wrong = sorted({check.name for check in checks if not check.passed})
    if not wrong:
        return Verdict("numbers", True, f"all {len(checks)} checks passed")
    advice = "try another version of MLX (pip install -U mlx); until then, no image from this machine can be trusted"
    if retried and all(check.passed for check in retried):
        (variable, value), *_ = WITHOUT_MATRIX_UNITS.items()
        advice = f"set {variable}={value}: all checks passed without this GPU's matrix units"
    return Verdict("numbers", False, f"wrong results for {', '.join(map(repr, wrong))}", advice)


def without_matrix_units(dtypes: Sequence[str], model: str | None) -> list[Check]:
    """Run the checks in a new process in which MLX does not use an M5's matrix units; empty if the process failed."""
    options = [option for dtype in dtypes for option in ("--dtype", dtype)] + (["--model", model] if model else [])
    command = [sys.executable, "-m", "mlx_zimage", "doctor", "--json", *options]
    ended = subprocess.run(command, env=os.environ | WITHOUT_MATRIX_UNITS, capture_output=True, text=True)
    try:
        return [Check(**check) for check in json.loads(ended.stdout)["checks"]]
    except (ValueError, KeyError):
        return []


def packed_otherwise(quantizations: Sequence[Quantization]) -> list[str]:
    """The quantizations that pack to different bits on this GPU and on the CPU, which is not an error."""
    weight = mx.random.normal((256, 512), key=mx.random.key(0))

    def differs(q: Quantization) -> bool:
        here, there = (
            mx.quantize(weight, group_size=q.group_size, bits=q.bits, mode=q.mode, stream=stream)
            for stream in (mx.default_device(), mx.cpu)
        )
        return not all(mx.array_equal(*pair) for pair in zip(here, there, strict=True))

    found = []
    for q in quantizations:
        with suppress(RuntimeError, ValueError):  # where MLX cannot pack here, the self-test says so
            found += [str(q)] if differs(q) else []
    return found


def report(
    facts: dict[str, Any],
    speeds: Speeds,
    verdicts: Sequence[Verdict],
    checks: Sequence[Check],
    retried: Sequence[Check] | None,
    otherwise: Sequence[str],
) -> dict[str, Any]:
    """Everything that was found, ready for JSON. Other programs depend on the keys."""
    return {
        "machine": facts,
        "speeds": {
            "product_tflops": speeds.product_rate / 1e12,
            "longest_kernel_s": speeds.longest_kernel_s,
            "disk_gb_per_s": speeds.disk_rate and speeds.disk_rate / 1e9,
            "block_s": speeds.block_s,
        },
        "passed": all(check.passed for check in checks),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "checks": [asdict(check) for check in checks],
        "checks_without_matrix_units": None if retried is None else [asdict(check) for check in retried],
        "packed_unlike_cpu": list(otherwise),
        "seconds": sum(check.seconds for check in checks),
    }
