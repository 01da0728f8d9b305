"""Plans what of a model is in memory at once, so that a request stays within a budget.

The plan is made before a weight is read, from the tensors' sizes and the request alone, and from bounds on working
memory that were measured as MLX's peaks.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

import mlx.core as mx

from .errors import MemoryBudgetError, RequestError
from .models.layers import sum_dtype
from .models.transformer import MAX_TOKENS, PAD_MULTIPLE, PATCH
from .models.vae import VAEConfig
from .request import SIZE_MULTIPLE
from .weights import Checkpoint, Component

SHARE = 0.6  # of the memory, where the system does not recommend a share itself
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
STRIPS = (None, *(2**power for power in range(26, 14, -2)))  # bytes of the VAE's strips, fastest first

LARGEST = 2**30  # elements: MLX's CUDA kernels fail on more, so larger pictures are decoded by strips


@dataclass(frozen=True)
class Work:
    """Bytes of intermediates on one backend, as upper bounds.

    block, lean_block: of a transformer block in its two ways, per token and feature; picture: beside it, of each of
    several pictures that take turns. layer: of a layer of the text encoder, per token and feature. score: of attention,
    per head and pair of tokens. unpacked, lean_unpacked: of a packed block's dense form, per byte of it. whole: of
    decoding at once, per pixel and channel at full size; strips: of decoding by strips of so many bytes, per pixel and
    channel, and in all.
    """

    block: float
    lean_block: float
    picture: float
    layer: float
    score: float
    unpacked: float
    lean_unpacked: float
    whole: float
    strips: dict[int, tuple[float, float]]


# The CPU's were measured there, where nothing is fused and memory is taken ahead; the GPU's with MLX's CUDA build.
CPU = Work(
    block=116, lean_block=84, picture=12, layer=150, score=4, unpacked=1.35, lean_unpacked=1.35, whole=152,
    strips={strip: (8, 200 * strip) for strip in STRIPS[1:]},
)  # fmt: skip
GPU = Work(
    block=66.5, lean_block=21.3, picture=7.5, layer=70, score=0, unpacked=2, lean_unpacked=0.67, whole=50.1,
    strips={
        2**26: (3.6, 1.01e9), 2**24: (3.77, 2.52e8), 2**22: (2.57, 2.07e8), 2**20: (2.48, 5.48e7),
        2**18: (2.25, 1.58e7), 2**16: (2.25, 1.58e7),
    },
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Bytes of a network's weights as computed with: of each block, in running order, and of all the rest."""

    blocks: dict[str, int]
    rest: int
    unpacked: int  # the dense form of the largest packed block

    @property
    def total(self) -> int:
        return sum(self.blocks.values()) + self.rest

    def moving(self) -> int:
        """Streaming holds one block and the next."""
        return 2 * max(self.blocks.values())


@dataclass(frozen=True)
class Plan:
    """How a request is to be run.

    keep: all networks stay for the next request; otherwise each goes when its phase is over. streamed names the blocks
    read from disk whenever they are needed. peaks bounds the memory of each phase, in bytes.
    """

    budget: int
    keep: bool
    streamed: frozenset[str]
    lean: bool
    strip_bytes: int | None
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def parse_memory(text: str | int) -> int:
    """ "6GB", "800 MB", "4GiB" or a number of bytes."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG]i?B)\s*", str(text), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise RequestError(f"memory must be a size such as 6GB or 800MB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def machine_budget() -> int:
    """What a process should use here: the working set that the GPU recommends, or a share of the memory."""
    device = mx.device_info()
    recommended = device.get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    total = device.get("total_memory") or device.get("memory_size")
    return int(SHARE * (total or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def measure(component: Component, blocks: list[str], dtype: mx.Dtype, without: str = "") -> Network:
    """The sizes of a network that computes in dtype; tensors beginning with `without` in a block are not counted."""
    sizes, dense, rest = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0), 0
    shapes = component.config.shapes()
    for name, entry in component.entries.items():
        nbytes = entry.nbytes if entry.dtype.startswith("U") else prod(entry.shape) * dtype.size
        block = ".".join(name.split(".")[: 3 if name.startswith("model.") else 2])
        if block not in sizes:
            rest += nbytes
        elif not (without and name.startswith(f"{block}.{without}")):
            sizes[block] += nbytes
            if entry.dtype == "U32":
                dense[block] += prod(shapes[name]) * dtype.size
    return Network(sizes, rest, max(dense.values(), default=0))


class Planner:
    """Knows a checkpoint's sizes; `plan` fits a request to a budget."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.work = CPU if mx.default_device() == mx.cpu else GPU
        transformer, encoder = checkpoint.transformer.config, checkpoint.text_encoder.config
        refiners = [f"context_refiner.{i}" for i in range(transformer.n_refiner_layers)]
        layers = [f"model.layers.{i}" for i in range(encoder.used_layers)]
        self.transformer = measure(
            checkpoint.transformer, refiners + transformer.modulated, dtype, without="adaLN_modulation"
        )
        # the rest of the text encoder is its embedding, of which only rows are read, and an unused layer
        self.text_encoder = replace(measure(checkpoint.text_encoder, layers, dtype), rest=0)
        self.vae_dtype = sum_dtype(dtype)
        self.vae_decoder = sum(
            prod(entry.shape) * self.vae_dtype.size
            for name, entry in checkpoint.vae.entries.items()
            if name.startswith("decoder.")
        )

    def plan(
        self, width: int, height: int, images: int, tokens: int, steps: int, budget: int, keep: bool | None = None
    ) -> Plan:
        """The fastest plan for pictures of width x height pixels, a prompt of `tokens` and `steps`, in the budget.

        keep says whether all networks stay for the next request; None chooses.
        """
        work = images, tokens, steps, budget, keep
        best = self._best(width, height, *work)
        if best.peak <= budget:
            return best
        side = self._largest_side(max(width, height), *work)
        smaller = f"at most {side}x{side} pixels at once fit {tell(budget)}" if side else "no size fits it"
        kept = " with the model kept" if keep else ""
        move = "do not keep the model" if keep else "allow more, draw less at once"
        raise MemoryBudgetError(
            f"{images} picture{'s' * (images > 1)} of {width}x{height} cannot be drawn in {tell(budget)}{kept}: the "
            f"least that works is {tell(best.peak)}, and {smaller}; {move}, or convert the model to fewer bits"
        )

    def _best(self, width: int, height: int, *work) -> Plan:
        """The first plan that fits the budget, else the leanest."""
        *_, budget, _ = work
        plans = list(self._candidates(width, height, *work))
        return next((plan for plan in plans if plan.peak <= budget), min(plans, key=lambda plan: plan.peak))

    def _largest_side(self, side: int, *work) -> int:
        """The side of the largest square that fits the budget, at most `side`; 0 if none does."""

        *_, budget, _ = work

        def too_large(n: int) -> bool:
            return self._best(n, n, *work).peak > budget

        return SIZE_MULTIPLE * bisect_left(range(SIZE_MULTIPLE, side + 1, SIZE_MULTIPLE), True, key=too_large)

    def _candidates(
        self, width: int, height: int, images: int, tokens: int, steps: int, budget: int, keep: bool | None
    ) -> Iterator[Plan]:
        """Plans from the fastest to the leanest."""
        keeps = (True, False) if keep is None else (keep,)
        ways = STRIPS if decodes_whole(self.checkpoint.vae.config, width, height) else STRIPS[1:]
        plans = ((keep, lean, strips) for keep in keeps for lean in (False, True) for strips in ways)
        for keep, lean, strip_bytes in plans:
            encode = self.encode_work(tokens)
            denoise = self.denoise_work(width, height, images, tokens, lean) + self.modulations(steps)
            decode = self.vae_decoder + self.decode_work(width, height, strip_bytes)
            if keep:
                kept = self.text_encoder.total + self.transformer.total + self.vae_decoder
                peaks = {"encode": kept + encode, "denoise": kept + denoise, "decode": kept + decode - self.vae_decoder}
                yield Plan(budget, True, frozenset(), lean, strip_bytes, peaks)
                continue
            streamed_layers, layers = _stream(self.text_encoder, budget - encode)
            streamed_blocks, blocks = _stream(self.transformer, budget - denoise)
            peaks = {"encode": layers + encode, "denoise": blocks + denoise, "decode": decode}
            yield Plan(budget, False, streamed_layers | streamed_blocks, lean, strip_bytes, peaks)

    def encode_work(self, tokens: int) -> int:
        config, work = self.checkpoint.text_encoder.config, self.work
        widths = tokens * max(config.hidden_size, config.num_attention_heads * config.head_dim)
        scores = work.score * config.num_attention_heads * tokens**2
        return int(work.layer * widths + scores + work.unpacked * self.text_encoder.unpacked)

    def denoise_work(self, width: int, height: int, images: int, tokens: int, lean: bool) -> int:
        config, scale, work = self.checkpoint.transformer.config, self.checkpoint.vae.config.scale * PATCH, self.work
        image_tokens = (width // scale) * (height // scale)
        length = sum(-(-n // PAD_MULTIPLE) * PAD_MULTIPLE for n in (image_tokens, tokens))
        together = min(images, max(1, MAX_TOKENS // length))
        block = (work.lean_block if lean else work.block) * length * config.dim
        block += work.score * config.n_heads * length**2
        others = work.picture * images * length * config.dim if images > together else 0
        unpacked = (work.lean_unpacked if lean else work.unpacked) * self.transformer.unpacked
        return int(together * block + others + unpacked)

    def modulations(self, steps: int) -> int:
        """The scales and gates of a schedule, twice while they are put together, and two of the weights behind them."""
        config = self.checkpoint.transformer.config
        given = 2 * steps * (4 * len(config.modulated) + 1) * config.dim
        return (given + 2 * 4 * config.dim * config.time_dim) * self.dtype.size

    def decode_work(self, width: int, height: int, strip_bytes: int | None) -> int:
        widths, itemsize = self.checkpoint.vae.config.block_out_channels, self.vae_dtype.size
        whole = self.work.whole * width * height * widths[0] * itemsize / 2
        if strip_bytes is None:
            return int(whole)
        by_pixel, at_least = self.work.strips[strip_bytes]
        return int(min(whole, by_pixel * width * height * widths[0] * itemsize / 2 + at_least))


def decodes_whole(config: VAEConfig, width: int, height: int) -> bool:
    """Whether a picture of width x height pixels may be decoded at once, memory aside."""
    return width * height * config.block_out_channels[1] < LARGEST


def _stream(network: Network, room: int) -> tuple[frozenset[str], int]:
    """The blocks to stream so that the weights fit into room, and what is then in memory; all of them if none fit."""
    if network.total <= room:
        return frozenset(), network.total
    kept, held = [], network.rest + network.moving()
    for name, size in network.blocks.items():
        if held + size > room:
            break
        kept.append(name)
        held += size
    return frozenset(network.blocks).difference(kept), held


def tell(nbytes: int) -> str:
    """Bytes for people, in two or three digits, rounded up: the answer is a budget that works."""
    unit, name = (10**9, "GB") if nbytes >= 10**9 else (10**6, "MB")
    return f"{ceil(100 * nbytes / unit) / 100:g} {name}"
