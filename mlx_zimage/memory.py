"""Plans which parts of the networks are in memory at any time, so that a request stays within a memory budget.

A request is a list of stages, each of which runs some networks. The plan is made before any weights are read, from the
tensors' sizes, the request, and the measured bounds on working memory in `mlx_zimage.bounds`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import mlx.core as mx

from .bounds import ENCODED, FUSED_ON_METAL, LARGEST_WHOLE, LORA_BY_OUTPUT, LORA_BY_WEIGHT, bounds
from .dtypes import STORED
from .errors import MemoryBudgetError
from .headroom import SAMPLE_TOKENS, SIDE
from .machine import backend, kernel_flops, max_buffer
from .models import CONTROLNET
from .models.layers import sum_dtype, vae_dtype
from .models.transformer import PAD_MULTIPLE, PATCH, TOKENS_AT_ONCE, TURNED
from .models.vae import CPU_STRIP, SCORES, VAEConfig, convolution_flops, strip_within
from .request import LATENT_PIXELS, SIZE_MULTIPLE
from .sizes import counted, rounded_up
from .tiles import Tiles
from .weights.blocks import READS_AHEAD
from .weights.checkpoint import Checkpoint
from .weights.component import READERS, Component
from .weights.overlay import Extra

# A ControlNet's tokens and the caption's, twice while a block replaces them; the control image's; and the hint.
BESIDE = 4

# ---- the work, and the plan for it


@dataclass(frozen=True)
class Workload:
    """The size of a request: `images` of width x height pixels at once, prompts of at most `tokens`, and steps.

    prompts is the number of prompts run in each step: two with guidance. loras has what LoRAs add, by network.
    from_image says that an image is encoded first, which the steps start from or follow. Unless tile is 0, they run on
    tiles of at most that many pixels per side. controls is the number of control images that they follow.
    """

    width: int
    height: int
    images: int
    tokens: int
    steps: int
    prompts: int = 1
    loras: Mapping[str, Extra] = field(default_factory=dict)
    from_image: bool = False
    tile: int = 0
    controls: int = 0

    @property
    def tiles(self) -> Tiles | None:
        """The tiles that the steps run on, if there is more than one."""
        return Tiles.if_several(self.width, self.height, self.tile) if self.tile else None

    @property
    def parts(self) -> Workload:
        """What the steps run on: the images, or their tiles."""
        tiles = self.tiles
        if tiles is None:
            return self
        width, height = tiles.w * LATENT_PIXELS, tiles.h * LATENT_PIXELS
        return replace(self, width=width, height=height, images=self.images * tiles.count, tile=0)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a network's weights in memory: of each block, in the order they run, and of everything else.

    unpacked is the dense form of the largest quantized block. reading is needed in addition while weights are read: a
    second copy of tensors that are stored in a different dtype or layout, of one block, or of one tensor per reader.
    """

    blocks: Mapping[str, int]
    rest: int
    unpacked: int = 0
    reading: int = 0

    @property
    def total(self) -> int:
        return sum(self.blocks.values()) + self.rest

    @property
    def moving(self) -> int:
        """Bytes in memory while streaming: one block, and the next one if it is read ahead."""
        return (2 if READS_AHEAD[backend()] else 1) * max(self.blocks.values(), default=0)


@dataclass(frozen=True)
class Way:
    """One way to do a stage's work: bytes of intermediates, and of those that a GPU may free late.

    lean blocks free memory halfway through; a VAE works on strips of strip_bytes, or on whole tensors if None. buffer
    is the bytes of the largest tensor, and flops the FLOP of the longest kernel.
    """

    work: int
    late: int = 0
    lean: bool = False
    strip_bytes: int | None = None
    buffer: int = 0
    flops: float = 0


@dataclass(frozen=True)
class Stage:
    """A part of a request: the networks it runs, by the names of their footprints, and its ways, fastest first.

    leaves is the bytes of its work that stay for the next request if its networks are kept in memory.
    """

    name: str
    networks: tuple[str, ...]
    ways: tuple[Way, ...]
    leaves: int = 0


@dataclass(frozen=True)
class Plan:
    """How to run a request.

    keep: all networks stay in memory for the next request; otherwise each is unloaded after its stage. streamed names
    the blocks read from disk each time they are needed. ways has the way chosen for each stage. peaks predicts each
    stage's peak memory in bytes; rooms is the part of the budget it needs, which is more than the peak where a GPU may
    occasionally free memory late.
    """

    budget: int
    keep: bool
    streamed: frozenset[str]
    ways: Mapping[str, Way]
    peaks: Mapping[str, int]
    rooms: Mapping[str, int]

    @property
    def lean(self) -> bool:
        """Whether blocks free memory halfway through."""
        return any(way.lean for way in self.ways.values())

    @property
    def strip_bytes(self) -> int | None:
        """The bytes per strip when decoding images; None to decode them whole."""
        return self.ways["decode"].strip_bytes if "decode" in self.ways else None

    @property
    def buffer(self) -> int:
        """Bytes of the largest single tensor."""
        return max(way.buffer for way in self.ways.values())

    @property
    def flops(self) -> float:
        """FLOP of the longest kernel."""
        return max(way.flops for way in self.ways.values())

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def room(self) -> int:
        return max(self.rooms.values())


# ---- planning


@dataclass(frozen=True)
class _Choice:
    """A way to run a stage, the blocks it streams, and the bytes of weights then in memory."""

    way: Way
    streamed: frozenset[str]
    held: int

    @property
    def room(self) -> int:
        return self.held + self.way.work + self.way.late


def make_plan(
    stages: Sequence[Stage], footprints: Mapping[str, Footprint], budget: int, keep: bool | None = None
) -> Plan:
    """The fastest plan that fits the budget; if none fits, the one that needs the least memory.

    keep says whether all networks stay in memory for the next request; if it is None, this is decided here. Keeping
    them saves reading them again for the next image, and the time to read even one block is longer than what faster
    ways to compute save.
    """
    plans = []
    for kept in (True, False) if keep is None else (keep,):
        choose = _all_kept(stages, footprints, budget) if kept else _one_by_one(footprints, budget)
        chosen = {stage.name: choose(stage) for stage in stages}
        plan = Plan(
            budget,
            kept,
            frozenset[str]().union(*(choice.streamed for choice in chosen.values())),
            {name: choice.way for name, choice in chosen.items()},
            {name: choice.held + choice.way.work for name, choice in chosen.items()},
            {name: choice.room for name, choice in chosen.items()},
        )
        if plan.room <= budget:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.room)


def _all_kept(stages: Sequence[Stage], footprints: Mapping[str, Footprint], budget: int) -> Callable[[Stage], _Choice]:
    weights = sum(network.total for network in footprints.values())
    weights += max(network.reading for network in footprints.values())
    left = sum(stage.leaves for stage in stages)

    def choose(stage: Stage) -> _Choice:
        held = weights + left - stage.leaves
        return _fastest([_Choice(way, frozenset(), held) for way in stage.ways], budget)

    return choose


def _one_by_one(footprints: Mapping[str, Footprint], budget: int) -> Callable[[Stage], _Choice]:
    def choose(stage: Stage) -> _Choice:
        network = _together([footprints[name] for name in stage.networks])
        return _fastest([_Choice(way, *_stream(network, budget - way.work - way.late)) for way in stage.ways], budget)

    return choose


def _fastest(choices: Sequence[_Choice], budget: int) -> _Choice:
    fitting = [choice for choice in choices if choice.room <= budget]
    if not fitting:
        return min(choices, key=lambda choice: choice.room)
    return min(fitting, key=lambda choice: len(choice.streamed))


def _together(networks: Sequence[Footprint]) -> Footprint:
    blocks = {name: size for network in networks for name, size in network.blocks.items()}
    unpacked, reading = (max((getattr(n, part) for n in networks), default=0) for part in ("unpacked", "reading"))
    return Footprint(blocks, sum(network.rest for network in networks), unpacked, reading)


def _stream(network: Footprint, room: int) -> tuple[frozenset[str], int]:
    """The blocks to stream so that the weights fit in room, and the bytes then in memory; all blocks if none fit."""
    if network.total + network.reading <= room:
        return frozenset(), network.total + network.reading
    kept, held = [], network.rest + network.reading + network.moving
    for name, size in network.blocks.items():
        if held + size > room:
            break
        kept.append(name)
        held += size
    return frozenset(network.blocks).difference(kept), held


# ---- this model's stages


def footprint(component: Component, dtype: mx.Dtype) -> Footprint:
    """The footprint of a network that computes in dtype, without weights that are not in memory while it runs."""
    blocks, without = component.config.blocks, component.config.read_once
    sizes, dense, stored = (dict.fromkeys(blocks, 0) for _ in range(3))
    rest = largest = 0
    shapes = component.shapes
    for name, entry in component.entries.items():
        packed = entry.dtype.startswith("U")
        nbytes = entry.nbytes if packed else prod(entry.shape) * dtype.size
        block = _block_of(name, sizes)
        if block is None:
            rest += nbytes * component.config.stays(name)
        elif not (without and name.startswith(f"{block}.{without}")):
            sizes[block] += nbytes
            cast = not packed and getattr(mx, STORED[entry.dtype]) != dtype
            beside = entry.nbytes * cast + nbytes * bool(TURNED.search(name))
            stored[block] += beside
            largest = max(largest, beside)
            if entry.dtype == "U32":
                dense[block] += prod(shapes[name]) * dtype.size
    at_once = 0 if READS_AHEAD[backend()] else READERS * largest
    return Footprint(sizes, rest, max(dense.values(), default=0), max([*stored.values(), at_once]))


def _block_of(name: str, blocks: Mapping[str, int]) -> str | None:
    """The block that a tensor belongs to, if any."""
    prefixes = (name[:i] for i, letter in enumerate(name) if letter == ".")
    return next((prefix for prefix in prefixes if prefix in blocks), None)


class Planner:
    """Knows a checkpoint's sizes; `plan` fits a request into a budget."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.bounds = bounds(dtype)
        self.vae_dtype = vae_dtype(dtype)
        vae = checkpoint.vae
        sizes = {name: prod(shape) * self.vae_dtype.size for name, shape in vae.shapes.items()}
        self.encoder = sum(sizes[name] for name in sizes if not vae.config.stays(name))  # bytes of its weights
        self.max_buffer = max_buffer()
        self.most = kernel_flops()
        self.footprints = {
            name: footprint(component, self.vae_dtype if name == "vae" else dtype)
            for name, component in checkpoint.networks.items()
        }

    def set_controlnet(self, component: Component | None, prefix: str) -> None:
        """Plan with this ControlNet, whose blocks the transformer's runner names with a prefix; with none if None."""
        self.footprints.pop(CONTROLNET, None)
        if component is not None:
            own = footprint(component, self.dtype)
            blocks = {f"{prefix}.{name}": size for name, size in own.blocks.items()}
            self.footprints[CONTROLNET] = replace(own, blocks=blocks)

    def plan(self, work: Workload, budget: int, keep: bool | None = None) -> Plan:
        """The fastest plan for a workload within a budget in bytes; MemoryBudgetError if there is none."""
        best = self.best(work, budget, keep)
        if self._fits(best):
            return best
        side = self._largest_side(work, budget, keep)
        images = f"{counted(work.images, 'image')} of {work.width}x{work.height}"
        it = "they need" if work.images > 1 else "it needs"
        smaller = f"the largest size that fits is {side}x{side}" if side else "no smaller size fits"
        kept = " with the model kept in memory" if keep else ""
        fewer = ", generate fewer images at once" if work.images > 1 else ""
        move = f"raise the budget{', use smaller tiles' if work.tiles else fewer}"
        move = "let networks be unloaded after use" if keep else move
        if best.buffer > self.max_buffer:
            raise MemoryBudgetError(
                f"{images} cannot be generated on this GPU: {it} a tensor of {rounded_up(best.buffer)}, but the "
                f"GPU's buffers hold at most {rounded_up(self.max_buffer)}; {smaller}"
            )
        raise MemoryBudgetError(
            f"{images} cannot be generated within {rounded_up(budget)}{kept}: {it} at least {rounded_up(best.room)}, "
            f"and {smaller}; {move}, or convert the model to fewer bits"
        )

    def _fits(self, plan: Plan) -> bool:
        return plan.room <= plan.budget and plan.buffer <= self.max_buffer

    def best(self, work: Workload, budget: int, keep: bool | None = None) -> Plan:
        """The fastest plan that fits the budget; if none fits, the one that needs the least memory."""
        return make_plan(self.stages(work), self.footprints, budget, keep)

    def _largest_side(self, work: Workload, budget: int, keep: bool | None) -> int:
        """The side of the largest square image that fits, no larger than the work's longer side; 0 if none does."""

        def too_large(side: int) -> bool:
            return not self._fits(self.best(replace(work, width=side, height=side), budget, keep))

        side = max(work.width, work.height)
        return SIZE_MULTIPLE * bisect_left(range(SIZE_MULTIPLE, side + 1, SIZE_MULTIPLE), True, key=too_large)

    def stages(self, work: Workload) -> list[Stage]:
        """Encoding the prompts, and the image if there is one, denoising, and decoding the images."""
        if self.dtype == mx.float16:  # the sample that its scale is found with must fit, too
            width, height, tokens = max(work.width, SIDE), max(work.height, SIDE), max(work.tokens, SAMPLE_TOKENS)
            work = replace(work, width=width, height=height, tokens=tokens)
        modulations = self.modulations(work.steps, work.controls)
        denoise = []
        for lean in (False, True):
            nbytes = self.denoise_work(work.parts, lean) + modulations
            late = 0 if lean else int(self.bounds.late * nbytes)
            denoise.append(Way(nbytes, late, lean, buffer=self._widest(work.parts), flops=self._longest(work.parts)))
        whole = decodes_whole(self.checkpoint.vae.config, work.width, work.height)
        decode = [self._decode_way(work.width, work.height, strip) for strip in self.bounds.strips if strip or whole]
        decode = [way for way in decode if way.flops <= self.most] or decode[-1:]
        # The encoder's weights are part of the work, since they are unloaded even where networks are kept.
        image = [replace(way, work=int(ENCODED * way.work) + self.encoder) for way in decode] if work.from_image else []
        encode = [Way(self.encode_work(work.tokens) + self.lora_work(work.loras.get("text_encoder"), work.tokens))]
        # The factors of all LoRAs stay in memory from stage to stage.
        held = sum(extra.held for extra in work.loras.values())
        encode, image, denoise, decode = (
            [replace(way, work=way.work + held) for way in ways] for ways in (encode, image, denoise, decode)
        )
        controlnet = (CONTROLNET,) if work.controls else ()
        stages = [
            Stage("encode", ("text_encoder",), tuple(encode)),
            Stage("image", (), tuple(image)),
            Stage("denoise", ("transformer", *controlnet), tuple(denoise), leaves=modulations),
            Stage("decode", ("vae",), tuple(decode)),
        ]
        return [stage for stage in stages if stage.ways]

    def lora_work(self, extra: Extra | None, tokens: int) -> int:
        """Bytes of a block's intermediates that LoRAs add."""
        if extra is None:
            return 0
        return int(self.dtype.size * (LORA_BY_OUTPUT * tokens * extra.features + LORA_BY_WEIGHT * extra.weights))

    def encode_work(self, tokens: int) -> int:
        config, bound = self.checkpoint.text_encoder.config, self.bounds
        widths = tokens * max(config.hidden_size, config.num_attention_heads * config.head_dim)
        scores = self._score(config.head_dim) * config.num_attention_heads * tokens**2
        unpacked = bound.layer_unpacked * self.footprints["text_encoder"].unpacked
        return int(bound.layer * widths + scores + unpacked)

    def denoise_work(self, work: Workload, lean: bool) -> int:
        config, bound = self.checkpoint.transformer.config, self.bounds
        length, together = self.tokens_of(work)
        block = (bound.lean_block if lean else bound.block) * length * config.dim
        block += self._score(config.dim // config.n_heads) * config.n_heads * length**2
        waiting = work.prompts * work.images if work.prompts * work.images > together else 0
        others = bound.waiting * waiting * length * config.dim
        # A ControlNet's tokens and image for each control, and what they add.
        beside = BESIDE * work.controls + (work.controls > 0)
        others += beside * work.prompts * work.images * length * config.dim * sum_dtype(self.dtype).size
        networks = ("transformer", CONTROLNET) if work.controls else ("transformer",)
        dense = max(self.footprints[name].unpacked for name in networks)
        unpacked = (bound.lean_unpacked if lean else bound.unpacked) * dense
        return int(together * block + others + unpacked) + self.lora_work(
            work.loras.get("transformer"), together * length
        )

    def _score(self, head_dim: int) -> float:
        """Bytes of an attention's scores, per head and pair of tokens."""
        if backend() == "metal":
            return 0 if head_dim in FUSED_ON_METAL else 4
        return self.bounds.score

    def tokens_of(self, work: Workload) -> tuple[int, int]:
        """The tokens of an image with its prompt, and how many images go through a block at once."""
        scale = self.checkpoint.vae.config.scale * PATCH
        image_tokens = (work.width // scale) * (work.height // scale)
        length = sum(-(-n // PAD_MULTIPLE) * PAD_MULTIPLE for n in (image_tokens, work.tokens))
        return length, min(work.images, max(1, TOKENS_AT_ONCE // length))

    def _widest(self, work: Workload) -> int:
        """Bytes of a block's largest tensor: what is between the two products of a feed-forward, or scores."""
        config, (length, together) = self.checkpoint.transformer.config, self.tokens_of(work)
        scores = self._score(config.dim // config.n_heads) * config.n_heads * length**2
        return int(together * max(length * config.ffn_dim * self.dtype.size, scores))

    def _longest(self, work: Workload) -> float:
        """FLOP of a block's longest kernel: an attention or a product, in pieces of at most `most`."""
        config, (length, together) = self.checkpoint.transformer.config, self.tokens_of(work)
        return min(self.most, together * length * config.dim * max(4 * length, 2 * config.ffn_dim))

    def modulations(self, steps: int, controls: int = 0) -> int:
        """Bytes of a schedule's scales and gates, twice while they are stacked, plus two blocks' adaLN weights."""
        config = self.checkpoint.transformer.config
        blocks = len(config.modulated) + (controls * len(self.footprints[CONTROLNET].blocks) if controls else 0)
        given = 2 * steps * (4 * blocks + 1) * config.dim
        return (given + 2 * 4 * config.dim * config.time_dim) * self.dtype.size

    def _decode_way(self, width: int, height: int, strip_bytes: int | None) -> Way:
        config, itemsize = self.checkpoint.vae.config, self.vae_dtype.size
        row = width * config.block_out_channels[1] * itemsize
        strip = strip_bytes or (CPU_STRIP if backend() == "cpu" else strip_within(config, self.vae_dtype, self.most))
        tensor = min(height * row, max(row, strip)) if strip else height * row
        scores = min(SCORES, 4 * (width // config.scale * (height // config.scale)) ** 2)
        return Way(
            self.decode_work(width, height, strip_bytes),
            strip_bytes=strip_bytes,
            buffer=max(tensor, scores),
            flops=tensor // itemsize * convolution_flops(config),
        )

    def decode_work(self, width: int, height: int, strip_bytes: int | None) -> int:
        widths, itemsize = self.checkpoint.vae.config.block_out_channels, self.vae_dtype.size
        strip = self.bounds.strips[strip_bytes]
        row = width * widths[1] * itemsize  # of the widest tensor: a strip is at least one row
        at_least = strip.at_least * max(1, row / (strip_bytes or CPU_STRIP))
        size = width * height * widths[0]
        return int(min(self.bounds.most * size, strip.by_pixel * size + at_least))


def decodes_whole(config: VAEConfig, width: int, height: int) -> bool:
    """Whether an image of width x height pixels can be decoded without strips, regardless of memory."""
    return backend() != "cuda" or width * height * config.block_out_channels[1] < LARGEST_WHOLE
