"""The networks of one checkpoint in one dtype, loaded and unloaded as a plan says. Everything else uses them like this:

    with networks.running(plan):
        prompts = yield from networks.encode(request, sigmas)
        image = yield from networks.encode_image(pixels)  # for image to image
        latents = yield from networks.denoise(prompts, noise, sigmas, guidance)
        pixels = yield from networks.decode(latents)

A stage's weights are read when it begins and, unless the plan keeps them in memory, unloaded when it ends. Embeddings
of earlier prompts are cached, here as far as the budget allows and on disk by `mlx_zimage.weights.store`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from . import headroom
from .distributed import GO, Group, Signal
from .errors import NumericsError, warn
from .failures import explained
from .machine import kernel_flops, limits, unpack_from, wired
from .memory import Plan, Planner, Workload
from .models import CONTROLNET
from .models.controlnet import Controlled
from .models.layers import product_from, result, sum_dtype, vae_dtype
from .models.runner import ALONE
from .models.text_encoder import TextEncoder
from .models.transformer import Transformer
from .models.vae import VAE
from .noise import initial_noise
from .request import LATENT_PIXELS, TOKENS
from .sampling import Change, Guidance, Kept, Step, Velocities, denoise, guide
from .scheduler import times
from .tiles import Tiles, tiled
from .tokenizer import PromptTruncated
from .weights.blocks import Blocks
from .weights.checkpoint import Checkpoint
from .weights.component import Component
from .weights.joined import Joined
from .weights.library import embeddings_folder
from .weights.lora import ADAPTED, Lora
from .weights.overlay import Extra, Overlay
from .weights.store import Store

SMALL_STRIP = 2**18  # bytes per strip where memory is not planned
CONTROLNET_PREFIX = "controlnet"  # of a ControlNet's weights among the transformer's
MAX_EMBEDDINGS = 32  # cached prompts, at most 5 MB each

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Phase:
    """Progress outside the steps: `done` of `total` parts of the phase "encode", "image", "decode" or "scale".

    While a LoRA is trained, it is "captions", "images" or "previews".

    Encoding a prompt counts text encoder layers; encoding or decoding an image, VAE blocks. In float16, the model's
    scale may have to be found first, network by network (see `mlx_zimage.headroom`).
    """

    name: str
    done: int
    total: int


def phases(name: str, total: int, steps: Generator[int, None, mx.array]) -> Generator[Phase, None, mx.array]:
    """Wrap a generator that yields how many of `total` parts are done into Phases; returns its return value."""
    done = 0
    while True:
        yield Phase(name, done, total)
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value


class Networks:
    """A checkpoint's tokenizer, text encoder, transformer and VAE, computing in dtype within a budget in bytes.

    wired locks the weights that stay through all steps in physical memory on macOS (see `machine.wired`). With a group,
    several machines do what a plan says: rank 0 encodes prompts, and each rank computes its share of every step.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: mx.Dtype, budget: int, wired: bool = False, group: Group | None = None
    ):
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.budget = budget
        self.wired = wired
        self.group = self._shared = group  # those that share the next image
        self.tokenizer = checkpoint.open_tokenizer()
        self.planner = Planner(checkpoint, dtype)
        most = kernel_flops()
        product = product_from(unpack_from(), most)
        self.runners = {
            name: Blocks(component, vae_dtype(dtype) if name == "vae" else dtype)
            for name, component in checkpoint.networks.items()
        }
        configs = {name: component.config for name, component in checkpoint.networks.items()}
        self.overlays = {name: Overlay(self.runners[name], configs[name]) for name in ADAPTED}
        self.text_encoder = TextEncoder(configs["text_encoder"], self.overlays["text_encoder"], product)
        self.transformer = Transformer(
            configs["transformer"], self.overlays["transformer"], product, group or ALONE, most=most
        )
        self.vae = VAE(configs["vae"], self.runners["vae"], most=most, ranks=group or ALONE)
        self._store = Store(dtype, embeddings_folder())
        self._embeddings: dict[tuple[Hashable, ...], mx.array] = {}
        self._strengths: Mapping[str, float] = {}
        self._encoder_loras: tuple[tuple[str, float], ...] = ()
        self._plan: Plan | None = None
        self._limit_cache: Callable[[int], None] | None = None
        self._scaled = dtype != mx.float16

    # ---- before a request

    def tokenize(self, prompt: str, most: int = TOKENS) -> Ids:
        """The prompt's ids, template included: at most `most`; warns if that truncates the prompt."""
        ids = self.tokenizer.encode(prompt)
        if len(ids) > most:
            warn(
                f"the prompt has {len(ids)} tokens, but the model reads only {most}; the rest is ignored",
                PromptTruncated,
            )
        return tuple(ids[:most])

    def plan(self, work: Workload, keep: bool | None = None) -> Plan:
        """The plan for a workload within the budget; MemoryBudgetError if it cannot fit."""
        return self.planner.plan(work, self.budget, keep)

    # ---- LoRAs

    def attach(self, lora: Lora) -> None:
        """Bring a LoRA's differences into memory; it changes nothing until `set_loras` gives it a strength."""
        for name, deltas in lora.deltas.items():
            self.overlays[name].attach(lora.sha256, deltas)

    def detach(self, lora: Lora) -> None:
        """Unload a LoRA."""
        for name in lora.deltas:
            self.overlays[name].detach(lora.sha256)
        self.transformer.forget_schedule_but(())

    def set_loras(self, strengths: Mapping[str, float]) -> None:
        """Use attached LoRAs, by their SHA-256, at these strengths from now on, and no others."""
        self._strengths = strengths
        for overlay in self.overlays.values():
            if overlay.set(strengths):
                self.transformer.forget_schedule_but(())
        self._encoder_loras = tuple(self.overlays["text_encoder"].strengths.items())

    @contextmanager
    def with_loras(self, strengths: Mapping[str, float]) -> Iterator[None]:
        """Within the block, use attached LoRAs at these strengths instead."""
        before = self._strengths
        self.set_loras(strengths)
        try:
            yield
        finally:
            self.set_loras(before)

    def lora_extras(self, strengths: Mapping[str, float]) -> dict[str, Extra]:
        """What attached LoRAs at these strengths add to the memory of each network."""
        return {name: overlay.extra(strengths) for name, overlay in self.overlays.items()}

    def extras_of(self, loras: Mapping[str, Lora], strengths: Mapping[str, float]) -> dict[str, Extra]:
        """The same if these LoRAs, by any names, were attached instead; it is enough that they were read for
        planning."""
        return {
            name: overlay.extra_of({key: lora.deltas.get(name, {}) for key, lora in loras.items()}, strengths)
            for name, overlay in self.overlays.items()
        }

    # ---- a ControlNet

    def set_controlnet(self, component: Component | None) -> None:
        """Have the transformer run this ControlNet beside it, or none; its weights are read when first used."""
        self.release("transformer")
        own = self.checkpoint.transformer
        others = {} if component is None else {CONTROLNET_PREFIX: component}
        self.runners["transformer"].weights = Joined(own, others) if others else own
        self.planner.set_controlnet(component, CONTROLNET_PREFIX)

    # ---- a request

    def guarded(self) -> AbstractContextManager[None]:
        """Within the block, a GPU failure is explained, and resets the networks as if they had just been opened.

        MLX reports a failure at a later evaluation, so everything computed before may be wrong, and is dropped.
        """
        return explained(self._start_over)

    @contextmanager
    def running(self, plan: Plan) -> Iterator[Networks]:
        """The networks, managed as the plan says; what it does not keep is unloaded once the block ends or fails."""
        self._plan = plan
        for runner in self.runners.values():
            runner.streamed = plan.streamed
        if not plan.keep:
            self.release()
        # if everything is kept and the steps are not lean, they are given more memory than encoding needs in any case
        self.text_encoder.lean = plan.lean or not plan.keep
        self.transformer.lean = plan.lean
        self.vae.strip_bytes = plan.strip_bytes
        self._forget_embeddings()
        with limits(self._spare - self._remembered) as self._limit_cache:
            try:
                yield self
            finally:
                if not plan.keep:
                    self.release()
                self._limit_cache = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block, this machine generates images by itself, even in a group."""
        shared, ranks = self._shared, self.transformer.ranks
        self._shared, self.transformer.ranks, self.vae.ranks = None, ALONE, ALONE
        try:
            yield
        finally:
            self._shared, self.transformer.ranks, self.vae.ranks = shared, ranks, ranks

    def encode(
        self, prompts: Sequence[Ids | mx.array], sigmas: Sequence[float] | np.ndarray
    ) -> Generator[Phase, None, list[mx.array]]:
        """The embeddings (L, cap_feat_dim) of tokenized prompts; those given as arrays are used as is.

        sigmas are those of the schedule that `denoise` will follow.
        """
        yield from self._scale()
        self.transformer.forget_schedule_but(times(sigmas[:-1]))
        embeddings, group = [], self._shared
        follows = group is not None and not group.leads
        if group is not None:
            missing = group.leads and any(not isinstance(one, mx.array) and self._known(one) is None for one in prompts)
            if Signal.BUSY in group.signal(Signal.BUSY if missing else GO) and follows:
                self._read_transformer()
        for prompt in prompts:
            if isinstance(prompt, mx.array):
                embeddings.append(prompt.astype(sum_dtype(self.dtype)))
            elif follows:
                embeddings.append(mx.zeros((len(prompt), self.text_encoder.config.hidden_size), sum_dtype(self.dtype)))
            else:
                embeddings.append((yield from self.encode_prompt(prompt)))
        self.end_stage("text_encoder")
        return embeddings if group is None else group.all_from_first(embeddings)

    def denoise(
        self,
        embeddings: Sequence[mx.array],
        noise: mx.array,
        sigmas: Sequence[float] | np.ndarray,
        guidance: Guidance,
        kept: Kept | None = None,
        tile: int = 0,
        controls: Sequence[Controlled] = (),
        first: int = 0,
    ) -> Generator[Step, Change | None, mx.array]:
        """The Steps from noise (B, h, w, 16) along the sigmas, from number `first` on; returns the final latents.

        A second prompt is the negative prompt. kept is what inpainting leaves as it is. Unless tile is 0, the
        transformer sees tiles of at most that many pixels per side instead of the whole. controls are what a
        ControlNet is shown.
        """
        _, h, w, _ = noise.shape
        tiles = Tiles.if_several(w * LATENT_PIXELS, h * LATENT_PIXELS, tile) if tile else None
        if tiles is not None:
            h, w = tiles.h, tiles.w
            controls = [replace(control, latents=tiles.cut(control.latents)) for control in controls]
        group = self._shared
        # for two machines, a prompt each is faster than sharing the rows of both, whose keys and values every block
        # exchanges
        apart = group is not None and group.is_even and len(embeddings) == group.size
        apart = apart and all(map(guidance.applies, times(sigmas[first:-1])))
        prompts = [embeddings[group.rank]] if group is not None and apart else embeddings
        with wired(self._resident()) if self.wired else nullcontext(), self.alone() if apart else nullcontext():
            velocities: Velocities = self.transformer.velocities(prompts, sigmas[:-1], h, w, controls, first)
            if tiles is not None:
                velocities = tiled(velocities, tiles)
            if group is not None and apart:
                velocities = group.one_each(velocities)
            sigmas = sigmas[first:]
            steps = denoise(guide(velocities, guidance, sigmas), noise, sigmas, kept)
            latents = yield from steps if group is None else group.together(steps)
        self.end_stage("transformer")
        return latents

    def decode(self, latents: mx.array, planned: bool = True) -> Generator[Phase, None, mx.array]:
        """Final latents (B, h, w, 16) to pixels (B, 8h, 8w, 3) float32, nominally in [-1, 1].

        With planned=False, for use outside a request, this machine computes all of it.
        """
        vae = self.vae
        if not planned:
            vae = VAE(vae.config, vae.runner, vae.strip_bytes, most=vae.most)
        steps = self._in_step(vae.decode_steps(latents), planned)
        return (yield from phases("decode", vae.config.decoder_blocks, steps))

    def _in_step(self, steps: Generator[int, None, mx.array], planned: bool) -> Generator[int, None, mx.array]:
        """The steps, computed by all machines together if they belong to a request."""
        return steps if self._shared is None or not planned else self._shared.in_step(steps)

    def encode_image(
        self, pixels: mx.array, noise: mx.array | None = None, planned: bool = True
    ) -> Generator[Phase, None, mx.array]:
        """Pixels (B, H, W, 3) in [-1, 1] to latents (B, H / 8, W / 8, 16); the encoder is unloaded afterwards.

        noise is as in `VAE.encode_steps`. With planned=False, for use outside a request, strips are small, and this
        machine computes all of them.
        """
        strip_bytes = self._plan.ways["image"].strip_bytes if planned and self._plan else SMALL_STRIP
        runner = Blocks(self.runners["vae"].weights, self.vae.runner.dtype)
        ranks = self.vae.ranks if planned else ALONE
        vae = VAE(self.vae.config, runner, strip_bytes, most=self.vae.most, ranks=ranks)
        steps = self._in_step(vae.encode_steps(pixels, noise), planned)
        latents = yield from phases("image", vae.config.encoder_blocks, steps)
        mx.eval(latents)
        if not mx.isfinite(latents).all().item():
            raise NumericsError(
                "the image's latents are not finite; no image was generated. Try dtype float32; if that fails too, the "
                "VAE's weights are damaged"
            )
        if not planned:
            runner.release()  # within a request, freed memory is limited already, and of use to the steps
        return latents

    def encode_prompt(self, ids: Ids) -> Generator[Phase, None, mx.array]:
        """The embeddings of one tokenized prompt, from a cache if they are there."""
        embeddings = self._known(ids)
        if embeddings is None:
            layers = self.text_encoder.config.used_layers
            embeddings = yield from phases("encode", layers, self.text_encoder.steps(ids))
            if not mx.isfinite(embeddings).all().item():
                raise NumericsError(
                    "the prompt's embeddings are not finite; no image was generated. Lower the strength of any LoRA, "
                    "or try dtype float32; if that fails too, the weights are damaged"
                )
            self._store.put([self.checkpoint.text_encoder], self._key(ids), embeddings)
        self._embeddings.pop(self._key(ids), None)
        self._embeddings[self._key(ids)] = embeddings  # the most recently used come last
        self._forget_embeddings()
        return embeddings

    def _known(self, ids: Ids) -> mx.array | None:
        """The embeddings of a tokenized prompt from a cache, if they are there."""
        key = self._key(ids)
        if key not in self._embeddings:
            shape = len(ids), self.text_encoder.config.hidden_size
            stored = self._store.get([self.checkpoint.text_encoder], key, shape, sum_dtype(self.dtype))
            if stored is None:
                return None
            self._embeddings[key] = stored
        return self._embeddings[key]

    def _key(self, ids: Ids) -> tuple[Hashable, ...]:
        return (*ids, *self._encoder_loras)

    def _read_transformer(self) -> None:
        """Read what stays in memory, while another machine encodes a prompt."""
        if self._plan and (self._plan.keep or "image" not in self._plan.ways):  # which may need that memory first
            config = self.transformer.config
            self.runners["transformer"].load(config.blocks, config.read_once)

    # ---- float16

    def find_scale(self, ids: Ids, keep: bool | None = None) -> None:
        """In float16, find the model's scale before encoding a prompt, unless it is known already.

        This reads the transformer, too, and raises MemoryBudgetError if no image could be generated.
        """
        if not self._scaled:
            work = Workload(headroom.SIDE, headroom.SIDE, images=1, tokens=len(ids), steps=1)
            with self.running(self.plan(work, keep)):
                result(self._scale())

    def _scale(self) -> Generator[Phase, None, None]:
        """In float16, set the networks' factors to what this checkpoint needs, from the cache or found now."""
        if self._scaled:
            return
        networks: list[TextEncoder | Transformer] = [self.text_encoder, self.transformer]
        components = [self.checkpoint.text_encoder, self.checkpoint.transformer]
        ids = self.tokenize(headroom.SAMPLE.prompt)[: headroom.SAMPLE_TOKENS]
        made = components, ("factors", headroom.SIDE, *ids)
        factors = self._store.get(*made, (len(networks),), mx.float32)
        if factors is None:
            with self.with_loras({}):  # the scale is the model's own, whatever LoRAs a request uses
                factors = mx.array((yield from self._find_factors(ids)))
            self._store.put(*made, factors)
        for network, component, factor in zip(networks, components, np.array(factors).tolist(), strict=True):
            if not factor:
                raise NumericsError(
                    f"the {component.name} overflows float16, even scaled down by "
                    f"{1 / headroom.SMALLEST:.0f}; choose dtype bfloat16"
                )
            network.factor = factor
        self._scaled = True

    def _find_factors(self, ids: Ids) -> Generator[Phase, None, tuple[float, float]]:
        side = headroom.SIDE // self.checkpoint.vae.config.scale
        channels = self.checkpoint.vae.config.latent_channels
        noise = initial_noise(headroom.SAMPLE.seed, (1, channels, side, side)).transpose(0, 2, 3, 1)
        mx.eval(noise)  # the next event may be requested from another thread
        try:
            yield Phase("scale", 0, 2)
            of_encoder, cap_feats = headroom.fit(self.text_encoder, lambda: self.text_encoder(ids))
            self.end_stage("text_encoder")
            yield Phase("scale", 1, 2)
            of_transformer = 1.0
            if cap_feats is not None:
                of_transformer, _ = headroom.fit(
                    self.transformer, lambda: self.transformer.velocity(cap_feats, [1.0], side, side)(noise, 0)
                )
            yield Phase("scale", 2, 2)
            return of_encoder, of_transformer
        finally:
            self.end_stage("text_encoder", "transformer")

    # ---- memory

    def _start_over(self) -> None:
        self._embeddings.clear()
        self.release()
        self._strengths, self._encoder_loras = {}, ()
        mx.synchronize()  # work queued after the failure fails too, and is reported here
        for overlay in self.overlays.values():
            overlay.start_over()

    def end_stage(self, *names: str) -> None:
        """Unload networks whose work on a request is done, unless the plan keeps them."""
        if self._plan and not self._plan.keep:
            self.release(*names)

    def release(self, *names: str) -> None:
        """Unload networks, all of them unless some are named; what is needed is read again."""
        names = names or tuple(self.runners)
        if "transformer" in names:
            self.transformer.forget()
        for name in names:
            self.runners[name].release()

    @property
    def _spare(self) -> int:
        """The part of the budget that the plan leaves free."""
        return self.budget if self._plan is None else self._plan.budget - self._plan.room

    @property
    def _remembered(self) -> int:
        return sum(embeddings.nbytes for embeddings in self._embeddings.values())

    def _forget_embeddings(self) -> None:
        """Drop the least recently used embeddings until the rest fit in the budget."""
        while len(self._embeddings) > MAX_EMBEDDINGS or self._remembered > self._spare:
            del self._embeddings[next(iter(self._embeddings))]
        if self._limit_cache:
            self._limit_cache(self._spare - self._remembered)  # freed memory that MLX caches counts, too

    def _resident(self) -> int:
        """Bytes of weights that stay in memory during all steps."""
        if self._plan is None:
            return 0
        footprints, streamed = self.planner.footprints, self._plan.streamed
        networks = ["transformer", *(["text_encoder"] if self._plan.keep else []), CONTROLNET]
        blocks = (block for name in networks if name in footprints for block in footprints[name].blocks.items())
        return sum(size for name, size in blocks if name not in streamed)
