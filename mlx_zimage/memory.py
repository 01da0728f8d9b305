"""Plans what of a model is in memory at once, so that a request stays within a budget.

The plan is made before a weight is read, from the tensors' sizes and the request alone, and from bounds on working
memory that were measured as MLX's peaks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx

from .dtypes import STORED
from .errors import MemoryBudgetError
from .headroom import SIDE, TOKENS
from .machine import backend
from .models.layers import vae_dtype
from .models.transformer import MAX_TOKENS, PAD_MULTIPLE, PATCH, TURNED
from .models.vae import CPU_STRIP, VAEConfig
from .request import SIZE_MULTIPLE
from .sizes import tell
from .weights.blocks import READS_AHEAD
from .weights.checkpoint import READERS, Checkpoint, Component

LARGEST = 2**30  # elements: MLX's CUDA kernels fail on more, so larger pictures are decoded by strips


@dataclass(frozen=True)
class Work:
    """Bytes of intermediates on one backend and in one dtype, as upper bounds.

    block, lean_block: of a transformer block in its two ways, per token and feature; picture: beside it, of each of
    several pictures that take turns. layer: of a layer of the text encoder, per token and feature. score: of attention,
    per head and pair of tokens. unpacked, lean_unpacked: of a packed block's dense form, per byte of it;
    layer_unpacked: of a layer's. strips: the ways to decode, fastest first, whole or by strips of so many bytes: per
    pixel and channel at full size, and in all; most: of any of them, per pixel and channel. late: what a GPU may hold
    longer than it must of blocks that nothing waits for, as a part of the work: seen in one run of about ten.
    """

    block: float
    lean_block: float
    picture: float
    layer: float
    score: float
    unpacked: float
    lean_unpacked: float
    layer_unpacked: float
    strips: dict[int | None, tuple[float, float]]
    most: float
    late: float = 0


# The CPU's were measured there in float32, where nothing is fused and memory is taken ahead; the GPU's with MLX's CUDA
# build, in each dtype. In float16 blocks add up, and the VAE computes, in float32.
CPU = Work(
    block=116, lean_block=84, picture=12, layer=150, score=4, unpacked=1.35, lean_unpacked=1.35, layer_unpacked=1.35,
    strips={None: (24.4, 4.1e7), 2**20: (12.2, 5.1e7), 2**18: (12.2, 1.27e7), 2**16: (6.16, 6.7e6)}, most=64,
)  # fmt: skip
FLOAT32_STRIPS = {  # by its bytes, as in Work: of a VAE that computes in float32
    None: (30.1, 9e6), 2**26: (6.1, 1.16e9), 2**24: (7.15, 3e8), 2**22: (4.03, 3.7e8), 2**20: (4.02, 9.6e7),
    2**18: (4, 2.45e7), 2**16: (4, 5.1e6),
}  # fmt: skip
GPU = {
    mx.bfloat16: Work(
        block=66.5, lean_block=21.3, picture=7.5, layer=40, score=0, unpacked=2, lean_unpacked=0.67, layer_unpacked=1.1,
        strips={
            None: (27.5, 0), 2**26: (2.06, 1.235e9), 2**24: (3.77, 2.56e8), 2**22: (2.57, 2.07e8),
            2**20: (2.48, 5.48e7), 2**18: (2.25, 1.58e7), 2**16: (2.25, 1.58e7),
        },
        most=27.5, late=0.5,
    ),
    mx.float16: Work(
        block=102.7, lean_block=35.4, picture=15, layer=54, score=0, unpacked=2, lean_unpacked=0.67, layer_unpacked=1.1,
        strips=FLOAT32_STRIPS, most=43, late=0.5,
    ),
    mx.float32: Work(
        block=97.5, lean_block=66, picture=15, layer=130, score=4, unpacked=1.1, lean_unpacked=0.67, layer_unpacked=1.1,
        strips=FLOAT32_STRIPS, most=43, late=0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Bytes of a network's weights as computed with: of each block, in running order, and of all the rest.

    unpacked is the dense form of the largest packed block; reading is what is needed beside the weights while they are
    read: tensors as stored, where they are computed with in another dtype or order, of a block or of all READERS.
    """

    blocks: dict[str, int]
    rest: int
    unpacked: int
    reading: int

    @property
    def total(self) -> int:
        return sum(self.blocks.values()) + self.rest

    def moving(self) -> int:
        """What streaming holds: a block, and the next where that is read ahead."""
        return (2 if READS_AHEAD[backend()] else 1) * max(self.blocks.values())


@dataclass(frozen=True)
class Plan:
    """How a request is to be run.

    keep: all networks stay for the next request; otherwise each goes when its phase is over. streamed names the blocks
    read from disk whenever they are needed. peaks predicts the memory of each phase, in bytes; rooms is what it must
    find in the budget, which is more where a GPU may still hold, at rare moments, what it has done with.
    """

    budget: int
    keep: bool
    streamed: frozenset[str]
    lean: bool
    strip_bytes: int | None
    peaks: dict[str, int]
    rooms: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def room(self) -> int:
        return max(self.rooms.values())


def measure(component: Component, blocks: list[str], dtype: mx.Dtype, without: str = "") -> Network:
    """The sizes of a network that computes in dtype; tensors beginning with `without` in a block are not counted."""
    sizes, dense, stored = (dict.fromkeys(blocks, 0) for _ in range(3))
    rest = largest = 0
    shapes = component.config.shapes()
    for name, entry in component.entries.items():
        packed = entry.dtype.startswith("U")
        nbytes = entry.nbytes if packed else prod(entry.shape) * dtype.size
        block = ".".join(name.split(".")[: 3 if name.startswith("model.") else 2])
        if block not in sizes:
            rest += nbytes
        elif not (without and name.startswith(f"{block}.{without}")):
            sizes[block] += nbytes
            cast = not packed and getattr(mx, STORED[entry.dtype]) != dtype
            beside = entry.nbytes * cast + nbytes * bool(TURNED.search(name))
            stored[block] += beside
            largest = max(largest, beside)
            if entry.dtype == "U32":
                dense[block] += prod(shapes[name]) * dtype.size
    at_once = 0 if READS_AHEAD[backend()] else READERS * largest
    return Network(sizes, rest, max(dense.values(), default=0), max(*stored.values(), at_once))


class Planner:
    """Knows a checkpoint's sizes; `plan` fits a request to a budget."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.work = CPU if backend() == "cpu" else GPU[dtype]
        transformer, encoder = checkpoint.transformer.config, checkpoint.text_encoder.config
        refiners = [f"context_refiner.{i}" for i in range(transformer.n_refiner_layers)]
        layers = [f"model.layers.{i}" for i in range(encoder.used_layers)]
        self.transformer = measure(
            checkpoint.transformer, refiners + transformer.modulated, dtype, without="adaLN_modulation"
        )
        # the rest of the text encoder is its embedding, of which only rows are read, and an unused layer
        self.text_encoder = replace(measure(checkpoint.text_encoder, layers, dtype), rest=0)
        self.vae_dtype = vae_dtype(dtype)
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
        if best.room <= budget:
            return best
        side = self._largest_side(max(width, height), *work)
        smaller = f"at most {side}x{side} pixels at once fit {tell(budget)}" if side else "no size fits it"
        kept = " with the model kept" if keep else ""
        move = "do not keep the model" if keep else "allow more, draw less at once"
        raise MemoryBudgetError(
            f"{images} picture{'s' * (images > 1)} of {width}x{height} cannot be drawn in {tell(budget)}{kept}: the "
            f"least that works is {tell(best.room)}, and {smaller}; {move}, or convert the model to fewer bits"
        )

    def _best(self, width: int, height: int, *work) -> Plan:
        """The fastest plan that fits the budget, else the leanest.

        What is kept is not read for the next picture; reading a block takes longer than all that waiting costs.
        """
        *_, budget, _ = work
        plans = list(self._candidates(width, height, *work))
        fitting = [plan for plan in plans if plan.room <= budget]
        if not fitting:
            return min(plans, key=lambda plan: plan.room)
        return min(fitting, key=lambda plan: (not plan.keep, len(plan.streamed), plan.lean))

    def _largest_side(self, side: int, *work) -> int:
        """The side of the largest square that fits the budget, at most `side`; 0 if none does."""

        *_, budget, _ = work

        def too_large(n: int) -> bool:
            return self._best(n, n, *work).room > budget

        return SIZE_MULTIPLE * bisect_left(range(SIZE_MULTIPLE, side + 1, SIZE_MULTIPLE), True, key=too_large)

    def _candidates(
        self, width: int, height: int, images: int, tokens: int, steps: int, budget: int, keep: bool | None
    ) -> Iterator[Plan]:
        """Plans of every kind; of those that differ only in how they decode, the fastest first."""
        if self.dtype == mx.float16:  # what its scale is found with must fit, too
            width, height, tokens = max(width, SIDE), max(height, SIDE), max(tokens, TOKENS)
        keeps = (True, False) if keep is None else (keep,)
        whole = decodes_whole(self.checkpoint.vae.config, width, height)
        ways = [strip for strip in self.work.strips if strip or whole]
        plans = ((keep, lean, strips) for keep in keeps for lean in (False, True) for strips in ways)
        modulations = self.modulations(steps)
        for keep, lean, strip_bytes in plans:
            remembered = modulations if keep else 0
            work = {
                "encode": self.encode_work(tokens) + remembered,
                "denoise": self.denoise_work(width, height, images, tokens, lean) + modulations,
                "decode": self.decode_work(width, height, strip_bytes) + remembered,
            }
            late = 0 if lean else int(self.work.late * work["denoise"])
            rooms = work | {"denoise": work["denoise"] + late}
            if keep:
                streamed = frozenset()
                networks = self.text_encoder, self.transformer
                weights = sum(network.total for network in networks) + max(network.reading for network in networks)
                held = dict.fromkeys(work, weights + self.vae_decoder)
            else:
                streamed_layers, layers = _stream(self.text_encoder, budget - rooms["encode"])
                streamed_blocks, blocks = _stream(self.transformer, budget - rooms["denoise"])
                streamed = streamed_layers | streamed_blocks
                held = {"encode": layers, "denoise": blocks, "decode": self.vae_decoder}
            peaks, rooms = ({phase: held[phase] + part[phase] for phase in work} for part in (work, rooms))
            yield Plan(budget, keep, streamed, lean, strip_bytes, peaks, rooms)

    def encode_work(self, tokens: int) -> int:
        config, work = self.checkpoint.text_encoder.config, self.work
        widths = tokens * max(config.hidden_size, config.num_attention_heads * config.head_dim)
        scores = work.score * config.num_attention_heads * tokens**2
        return int(work.layer * widths + scores + work.layer_unpacked * self.text_encoder.unpacked)

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
        by_pixel, at_least = self.work.strips[strip_bytes]
        row = width * widths[1] * itemsize  # of the widest tensor: a strip has one at least
        at_least *= max(1, row / (strip_bytes or CPU_STRIP))
        size = width * height * widths[0]
        return int(min(self.work.most * size, by_pixel * size + at_least))


def decodes_whole(config: VAEConfig, width: int, height: int) -> bool:
    """Whether a picture of width x height pixels may be decoded without strips, memory aside."""
    return backend() == "cpu" or width * height * config.block_out_channels[1] < LARGEST


def largest_strip(config: VAEConfig, width: int, height: int) -> int | None:
    """The strip_bytes that decode a picture of width x height pixels fastest, memory aside."""
    return None if decodes_whole(config, width, height) else max(filter(None, FLOAT32_STRIPS))


def _stream(network: Network, room: int) -> tuple[frozenset[str], int]:
    """The blocks to stream so that the weights fit into room, and what is then in memory; all of them if none fit."""
    if network.total + network.reading <= room:
        return frozenset(), network.total + network.reading
    kept, held = [], network.rest + network.reading + network.moving()
    for name, size in network.blocks.items():
        if held + size > room:
            break
        kept.append(name)
        held += size
    return frozenset(network.blocks).difference(kept), held
