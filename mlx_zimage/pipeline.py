"""ZImagePipeline: from a prompt to pictures, in the order in which it happens."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import headroom
from .dtypes import FLOATS
from .errors import NumericsError, RequestError
from .images.codec import to_pil, to_uint8
from .machine import default_dtype, machine_budget, wired
from .memory import Plan, Planner
from .models.layers import result, sum_dtype, vae_dtype
from .models.text_encoder import TextEncoder
from .models.transformer import PATCH, Transformer, times_of
from .models.vae import VAE
from .noise import initial_noise
from .request import GenerateRequest
from .sampling import Step, denoise, guide
from .sizes import parse_memory
from .tokenizer import MAX_TOKENS, PromptTruncated, Tokenizer
from .weights.blocks import Source
from .weights.checkpoint import Checkpoint, open_checkpoint
from .weights.library import embeddings_folder
from .weights.store import Store

MAX_EMBEDDINGS = 32  # prompts remembered, of at most 5 MB each


class Overflow(UserWarning):
    """float16 could not hold the numbers of a picture, which is drawn in bfloat16 instead."""


@dataclass(frozen=True)
class Generated:
    """One picture: pixels (H, W, 3) uint8, and the request that draws it again; index counts from 0.

    plan tells how it was run, and the memory that was predicted; dtype is what it was computed in.
    """

    index: int
    pixels: np.ndarray
    request: GenerateRequest
    plan: Plan
    dtype: str


@dataclass(frozen=True)
class Phase:
    """`done` of `total` parts of what goes on around the steps, which is named "encode", "decode" or "scale".

    A prompt is encoded in the text encoder's layers, a picture decoded in the VAE's blocks. Before all else the scale
    that a model needs in float16 may have to be found, network by network (see `mlx_zimage.headroom`).
    """

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class PipelineOutput:
    """images: a list of PIL images, or an array: (B, H, W, 3) in [0, 1] for "np", (B, 16, h, w) for "latent".

    seed is the one they were drawn from.
    """

    images: list | np.ndarray
    seed: int


class ZImagePipeline:
    """Z-Image's tokenizer, text encoder, transformer and VAE, opened from one folder."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype, budget: int | None = None, keep: bool | None = None):
        self.checkpoint = checkpoint
        self.budget = machine_budget() if budget is None else budget
        self.keep = keep
        self.tokenizer = Tokenizer(checkpoint.tokenizer_file)
        self._compute_in(dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: str | None = None,
        memory: str | int | None = None,
        keep: bool | None = None,
    ) -> ZImagePipeline:
        """Open a model: a folder (diffusers' or our converter's), a Hugging Face id, or "pocket".

        Reads and checks configs and headers; tensor data is read when first used. dtype is what the networks compute
        in, "bfloat16", "float16" or "float32"; see `default_dtype`. Where float16 overflows, in spite of all that is
        done against it, the pipeline goes on in bfloat16, and says so.

        memory is a budget such as "6GB", by default what the machine recommends. What does not fit beside the work is
        read from disk when it is needed: slower, but the same picture. A request that cannot fit is refused before
        any weight is read. keep=True keeps all networks for the next request, keep=False lets each go when its part
        of a request is done; by default they are kept where all fit at once.

        What the text encoder makes of a prompt is kept on disk, so that the same prompt needs no encoder again; see
        `mlx-zimage models --help`.
        """
        if dtype is None:
            dtype = default_dtype()
        if not isinstance(dtype, str) or dtype not in FLOATS:
            raise RequestError(f"dtype must be one of {', '.join(FLOATS)}, as text, got {dtype!r}")
        budget = None if memory is None else parse_memory(memory)
        return cls(open_checkpoint(source), getattr(mx, dtype), budget, keep)

    @property
    def sample_size(self) -> int:
        """The side of the square picture that the model draws by default, in pixels."""
        return self.checkpoint.vae.config.sample_size

    def __call__(
        self,
        prompt: str,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 0.0,
        negative_prompt: str | None = None,
        seed: int | None = None,
        num_images_per_prompt: int = 1,
        latents: np.ndarray | mx.array | None = None,
        output_type: str = "pil",
        shift: float | None = None,
        rng: str = "torch",
    ) -> PipelineOutput:
        """Draw pictures of one prompt; the arguments are those of diffusers' ZImagePipeline.

        width and height are pixels, multiples of 16, by default the model's own; num_inference_steps are calls of the
        transformer; guidance_scale 0 is off. Prompts are read up to 512 tokens. seed stands in for diffusers' generator
        and gives the same noise; left out, one is chosen and told in the output. latents (B, 16, height / 8, width / 8)
        float32 are the initial noise itself. output_type is "pil", "np" (floats in [0, 1]) or "latent". shift bends the
        schedule towards noise. rng "mlx" draws MLX's noise from the seed. Every fault of the arguments raises
        RequestError before any work.
        """
        if output_type not in ("pil", "np", "latent"):
            raise RequestError(f"output_type must be 'pil', 'np' or 'latent', got {output_type!r}")
        request = GenerateRequest(
            prompt=prompt,
            width=self.sample_size if width is None else width,
            height=self.sample_size if height is None else height,
            seed=secrets.randbits(32) if seed is None else seed,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt="" if negative_prompt is None else negative_prompt,
            shift=shift,
            num_images=num_images_per_prompt,
            rng=rng,
        )
        *_, last = self.denoise(request, latents)
        if output_type == "latent":
            images = np.array(last.latents.transpose(0, 3, 1, 2))
        else:
            images = [self.decode(item) for item in last.latents]
            if output_type == "np":
                images = np.stack(images).astype(np.float32) / 255
            else:
                images = [to_pil(pixels) for pixels in images]
        return PipelineOutput(images, request.seed)

    def stream(self, request: GenerateRequest, latents=None) -> Iterator[Step | Generated]:
        """Draw a request, yielding each denoising Step, then each picture. Leaving the loop stops the work.

        latents (B, 16, height / 8, width / 8), if given, are the initial noise in place of the seed's. If float16
        overflows, the Steps begin again from the first.
        """
        for event in self.events(request, latents):
            if not isinstance(event, Phase):
                yield event

    def events(self, request: GenerateRequest, latents=None) -> Iterator[Phase | Step | Generated]:
        """stream, with the Phases before and after the steps: what a progress bar wants to know."""
        plan, clean = yield from self._denoise(request, latents)
        blocks = self.vae.config.decoder_blocks
        for i in range(request.num_images):
            item = clean[i : i + 1]
            mx.eval(item)  # whoever takes the next event may do so in another thread
            pixels = yield from phases("decode", blocks, self.vae.decode_steps(item))
            yield Generated(i, to_uint8(pixels[0]), request, plan, str(self.dtype).rpartition(".")[2])

    def denoise(self, request: GenerateRequest, latents=None) -> Iterator[Step]:
        """The Steps of a request, from its noise (or the given latents) to clean latents (B, h, w, 16)."""
        for event in self._denoise(request, latents):
            if isinstance(event, Step):
                yield event

    def _denoise(self, request: GenerateRequest, latents) -> Generator[Phase | Step, None, tuple[Plan, mx.array]]:
        try:
            return (yield from self._attempt(request, latents))
        except NumericsError:
            if self.dtype != mx.float16:
                raise
        warnings.warn(
            "float16 overflows with this model; the picture is drawn again from its first step, in bfloat16",
            Overflow,
            stacklevel=2,
        )
        self._compute_in(mx.bfloat16)
        mx.clear_cache()
        return (yield from self._attempt(request, latents))

    def _attempt(self, request: GenerateRequest, latents) -> Generator[Phase | Step, None, tuple[Plan, mx.array]]:
        h, w = (size // self.checkpoint.vae.config.scale for size in (request.height, request.width))
        sigmas = self.checkpoint.scheduler.sigmas(request.steps, (h // PATCH) * (w // PATCH), request.shift)
        prompts = self._tokenize(request)
        plan = self._plan(request, prompts)
        noise = self._initial_latents(request, latents, h, w)
        self._adopt(plan)
        yield from self._scale(plan)
        self.transformer.forget_schedule_but(times_of(sigmas[:-1]))
        captions = []
        try:
            for ids in prompts:
                captions.append((yield from self._encode(ids)))
            if not plan.keep:
                self.text_encoder.source.release()
            with wired(self._resident(plan)):
                velocities = [self.transformer.velocity(caption, sigmas[:-1], h, w) for caption in captions]
                velocity = velocities[0] if len(velocities) == 1 else guide(*velocities, request.guidance_scale)
                for step in denoise(velocity, noise, sigmas):
                    yield step
        finally:  # whoever leaves the loop gets the memory back too
            if not plan.keep:
                self.text_encoder.source.release()
                self.transformer.release()
        return plan, step.latents

    def plan(self, request: GenerateRequest) -> Plan:
        """What of the model will be in memory when, for this request within the pipeline's budget."""
        return self._plan(request, self._tokenize(request))

    def _plan(self, request: GenerateRequest, prompts: list[tuple[int, ...]]) -> Plan:
        size, tokens = (request.width, request.height), max(map(len, prompts))
        return self.planner.plan(*size, request.num_images, tokens, request.steps, self.budget, self.keep)

    def _tokenize(self, request: GenerateRequest) -> list[tuple[int, ...]]:
        """The ids of the prompts that a request needs."""
        prompts = [request.prompt] + ([request.negative_prompt] if request.guidance_scale > 0 else [])
        return [self.tokenize(prompt) for prompt in prompts]

    def tokenize(self, prompt: str) -> tuple[int, ...]:
        """The prompt's ids, template included: at most 512, and a warning where that cuts it."""
        ids = self.tokenizer.encode(prompt)
        if len(ids) > MAX_TOKENS:
            warnings.warn(
                f"the prompt has {len(ids)} tokens and the model reads {MAX_TOKENS}; its end is left out",
                PromptTruncated,
                stacklevel=2,
            )
        return tuple(ids[:MAX_TOKENS])

    def encode(self, prompt: str) -> mx.array:
        """The prompt's embeddings (L, cap_feat_dim): one row a token, template included, at most 512.

        In float16, the first call finds the model's scale, as the first picture would: it also reads the transformer,
        and raises MemoryBudgetError where no picture can be drawn.
        """
        ids = self.tokenize(prompt)
        if self._unscaled:
            plan = self._plan(headroom.SAMPLE, [ids])
            self._adopt(plan)
            result(self._scale(plan))
        return result(self._encode(ids))

    @property
    def _unscaled(self) -> bool:
        return self.dtype == mx.float16 and not self._scaled

    def _scale(self, plan: Plan) -> Generator[Phase, None, None]:
        """In float16, give the networks the factors that this checkpoint needs: remembered ones, or found now."""
        if not self._unscaled:
            return
        networks = self.text_encoder, self.transformer
        ids = self.tokenize(headroom.SAMPLE.prompt)[: headroom.TOKENS]
        made = [network.source.component for network in networks], ("factors", headroom.SIDE, *ids)
        factors = self._stored.get(*made, (len(networks),), mx.float32)
        if factors is None:
            factors = mx.array((yield from self._find_factors(ids, plan)))
            self._stored.put(*made, factors)
        for network, factor in zip(networks, factors.tolist(), strict=True):
            if not factor:
                raise NumericsError(
                    f"float16 cannot hold the numbers of the {network.source.component.name}, even made "
                    f"{1 / headroom.LEAST:.0f} times smaller; choose dtype bfloat16"
                )
            network.factor = factor
        self._scaled = True

    def _find_factors(self, ids: tuple[int, ...], plan: Plan) -> Generator[Phase, None, tuple[float, float]]:
        h = w = headroom.SIDE // self.checkpoint.vae.config.scale
        noise = self._initial_latents(headroom.SAMPLE, None, h, w)
        try:
            yield Phase("scale", 0, 2)
            of_encoder, cap_feats = headroom.fit(self.text_encoder, lambda: self.text_encoder(ids))
            if not plan.keep:
                self.text_encoder.source.release()
            yield Phase("scale", 1, 2)
            of_transformer = 1.0
            if cap_feats is not None:
                of_transformer, _ = headroom.fit(
                    self.transformer, lambda: self.transformer.velocity(cap_feats, [1.0], h, w)(noise, 0)
                )
            yield Phase("scale", 2, 2)
            return of_encoder, of_transformer
        finally:
            if not plan.keep:
                self.text_encoder.source.release()
                self.transformer.release()

    def _encode(self, ids: tuple[int, ...]) -> Generator[Phase, None, mx.array]:
        if ids in self._embeddings:
            self._embeddings[ids] = self._embeddings.pop(ids)  # the last used go last
            return self._embeddings[ids]
        config = self.text_encoder.config
        made = [self.checkpoint.text_encoder], ids
        embeddings = self._stored.get(*made, (len(ids), config.hidden_size), sum_dtype(self.dtype))
        if embeddings is None:
            layers = config.used_layers
            embeddings = yield from phases("encode", layers, self.text_encoder.steps(ids))
            if not mx.isfinite(embeddings).all().item():
                raise NumericsError("the prompt's embeddings are not finite; nothing was drawn")
            self._stored.put(*made, embeddings)
        self._embeddings[ids] = embeddings
        self._forget_embeddings()
        return embeddings

    def _forget_embeddings(self) -> None:
        """Keep what prompts gave as far as the budget has room for it, the last used first."""
        while len(self._embeddings) > MAX_EMBEDDINGS or self._remembered > self._spare:
            del self._embeddings[next(iter(self._embeddings))]
        # what MLX keeps of freed memory counts too
        mx.set_cache_limit(self._spare - self._remembered)

    @property
    def _remembered(self) -> int:
        return sum(embeddings.nbytes for embeddings in self._embeddings.values())

    def decode(self, latents: mx.array) -> np.ndarray:
        """Clean latents (h, w, 16) to pixels (8h, 8w, 3) uint8."""
        return to_uint8(self.vae.decode(latents[None])[0])

    def _compute_in(self, dtype: mx.Dtype) -> None:
        """Begin anew in dtype, with nothing read."""
        checkpoint = self.checkpoint
        self.dtype = dtype
        self.planner = Planner(checkpoint, dtype)
        self._embeddings: dict[tuple[int, ...], mx.array] = {}
        self._spare = self.budget  # until a plan takes of it
        self._stored = Store(dtype, embeddings_folder())
        self._scaled = False
        self.text_encoder = TextEncoder(checkpoint.text_encoder.config, Source(checkpoint.text_encoder, dtype))
        self.transformer = Transformer(checkpoint.transformer.config, Source(checkpoint.transformer, dtype))
        self.vae = VAE(checkpoint.vae.config, Source(checkpoint.vae, vae_dtype(dtype)))

    def _adopt(self, plan: Plan) -> None:
        for network in (self.text_encoder, self.transformer, self.vae):
            network.source.streamed = plan.streamed
        if not plan.keep:
            self.text_encoder.source.release()
            self.transformer.release()
            self.vae.source.release()
        # where all stays and the steps need not be lean, they are given more room than encoding takes in any way
        self.text_encoder.lean = plan.lean or not plan.keep
        self.transformer.lean = plan.lean
        self.vae.strip_bytes = plan.strip_bytes
        self._spare = plan.budget - plan.room
        self._forget_embeddings()

    def _resident(self, plan: Plan) -> int:
        """Bytes of the weights that stay in memory through all steps."""
        networks = [self.planner.transformer] + ([self.planner.text_encoder] if plan.keep else [])
        blocks = (block for network in networks for block in network.blocks.items())
        return sum(size for name, size in blocks if name not in plan.streamed)

    def _initial_latents(self, request: GenerateRequest, latents, h: int, w: int) -> mx.array:
        """The initial noise, channels-last (B, h, w, 16) float32."""
        shape = (request.num_images, self.checkpoint.vae.config.latent_channels, h, w)
        if latents is None:
            noise = initial_noise(request.seed, shape, request.rng)
        else:
            noise = check_latents(latents, shape)
        noise = noise.transpose(0, 2, 3, 1)
        mx.eval(noise)  # as above
        return noise


def phases(name: str, total: int, steps: Generator[int, None, mx.array]) -> Generator[Phase, None, mx.array]:
    """Phases of work that yields how many of its `total` parts are done; returns what it returns."""
    done = 0
    while True:
        yield Phase(name, done, total)
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value


def check_latents(latents: np.ndarray | mx.array, shape: tuple[int, ...]) -> mx.array:
    """Initial latents from a caller, as float32, if they are numbers that fit (B, C, h, w) and are finite."""
    try:
        array = np.asarray(latents.astype(mx.float32) if isinstance(latents, mx.array) else latents)
    except (TypeError, ValueError) as error:
        raise RequestError(f"latents must be an array of {shape}, got {type(latents).__name__} ({error})") from None
    if array.dtype.kind not in "fiu":
        raise RequestError(f"latents must be real numbers, got {array.dtype}")
    if array.shape != shape:
        raise RequestError(
            f"latents have shape {array.shape}, wanted {shape}: pictures, channels, height / 8, width / 8"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise RequestError("latents hold values that are not finite")
    return mx.array(array)
