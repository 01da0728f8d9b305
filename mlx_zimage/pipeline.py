"""ZImagePipeline: from a prompt to images, step by step."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .dtypes import FLOATS
from .errors import NumericsError, RequestError
from .failures import explained
from .images.codec import to_pil, to_uint8
from .inputs import Inputs
from .machine import default_dtype, machine_budget, wide_dtype
from .memory import Plan, Planner, Workload
from .models.layers import result
from .models.text_encoder import TextEncoder
from .models.transformer import PATCH, Transformer
from .models.vae import VAE
from .networks import Networks, Phase
from .request import GenerateRequest
from .sampling import Step
from .sizes import parse_memory
from .turns import Turns
from .variants import Variant
from .weights.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Generated", "Overflow", "Phase", "PipelineOutput", "ZImagePipeline"]


class Overflow(UserWarning):
    """An image overflowed float16 and is generated in a wider dtype instead."""


@dataclass(frozen=True)
class Generated:
    """One image: pixels (H, W, 3) uint8, and the request that reproduces it; index counts from 0.

    plan says how it was run and how much memory was predicted; dtype is the compute dtype.
    """

    index: int
    pixels: np.ndarray
    request: GenerateRequest
    plan: Plan
    dtype: str


@dataclass(frozen=True)
class PipelineOutput:
    """images: a list of PIL images, or an array: (B, H, W, 3) in [0, 1] for "np", (B, 16, h, w) for "latent".

    seed is the seed that was used.
    """

    images: list | np.ndarray
    seed: int


class ZImagePipeline:
    """Z-Image's tokenizer, text encoder, transformer and VAE, opened from one folder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        budget: int | None = None,
        keep: bool | None = None,
        wired: bool = False,
    ):
        self.checkpoint = checkpoint
        self.keep = keep
        self.turns = Turns()
        self.networks = Networks(checkpoint, dtype, machine_budget() if budget is None else budget, wired)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: str | None = None,
        memory: str | int | None = None,
        keep: bool | None = None,
        variant: str | None = None,
        wired: bool = False,
    ) -> ZImagePipeline:
        """Open a model: a folder (from diffusers or our converter), a Hugging Face id, or "pocket".

        Reads and checks configs and headers; tensor data is read when first used. dtype is the compute dtype,
        "bfloat16", "float16" or "float32"; `default_dtype` has the default. If float16 overflows in spite of
        `mlx_zimage.headroom`, the pipeline warns and continues in bfloat16 (float32 in virtual machines).

        memory is the memory budget, such as "6GB"; by default the one the machine recommends. Weights that do not fit
        are streamed from disk: slower, but the same image. A request that cannot fit is refused before any weights are
        read. keep=True keeps all networks in memory for the next request, keep=False unloads each one after use; by
        default they are kept if all fit at once.

        variant, "turbo" or "base", overrides which model of the family the folder is recognized as; any other value,
        such as "fp16", selects which of a network's files are read, as in diffusers.

        wired=True locks the resident weights in physical memory on macOS while the steps run. Leave it off unless other
        programs push the model out: kernel panics have been reported with wired memory.

        Prompt embeddings are cached on disk, so that a prompt used before needs no text encoder; see
        `mlx-zimage models --help`.
        """
        with explained():  # a Mac may have no GPU for this session
            if dtype is None:
                dtype = default_dtype()
            if not isinstance(dtype, str) or dtype not in FLOATS:
                raise RequestError(f"dtype must be one of the strings {', '.join(FLOATS)}, got {dtype!r}")
            budget = None if memory is None else parse_memory(memory)
            return cls(open_checkpoint(source, variant), getattr(mx, dtype), budget, keep, wired)

    def __call__(
        self,
        prompt: str,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        num_images_per_prompt: int = 1,
        latents: np.ndarray | mx.array | None = None,
        output_type: str = "pil",
        shift: float | None = None,
        rng: str = "torch",
    ) -> PipelineOutput:
        """Generate images from one prompt; the arguments are those of diffusers' ZImagePipeline.

        width and height are in pixels, multiples of 16; num_inference_steps is the number of denoising steps;
        guidance_scale 0 is off; all of these default to the model's own. Prompts are read up to 512 tokens. seed
        replaces diffusers' generator and gives the same noise; without it a random seed is used, which the output has.
        latents (B, 16, height / 8, width / 8) float32 replace the initial noise. output_type is "pil", "np" (floats in
        [0, 1]) or "latent". shift is the timestep shift: higher spends more steps at high noise. rng="mlx" uses MLX's
        random numbers for the noise. Invalid arguments raise RequestError before any work starts.
        """
        if output_type not in ("pil", "np", "latent"):
            raise RequestError(f"output_type must be 'pil', 'np' or 'latent', got {output_type!r}")
        request = GenerateRequest(
            prompt=prompt,
            width=width,
            height=height,
            seed=secrets.randbits(32) if seed is None else seed,
            steps=num_inference_steps,
            guidance_scale=self.variant.guidance_scale if guidance_scale is None else guidance_scale,
            negative_prompt="" if negative_prompt is None else negative_prompt,
            shift=shift,
            num_images=num_images_per_prompt,
            rng=rng,
        )
        if output_type == "latent":
            *_, last = self.denoise(request, latents)
            return PipelineOutput(np.array(last.latents.transpose(0, 3, 1, 2)), request.seed)
        images = [event.pixels for event in self.stream(request, latents) if isinstance(event, Generated)]
        if output_type == "np":
            return PipelineOutput(np.stack(images).astype(np.float32) / 255, request.seed)
        return PipelineOutput([to_pil(pixels) for pixels in images], request.seed)

    # ---- from a request to images

    def stream(
        self, request: GenerateRequest, inputs: Any = None, *, latents: Any = None
    ) -> Iterator[Step | Generated]:
        """Run a request, yielding each denoising Step, then each image. Leaving the loop stops the work.

        inputs are the arrays that the request uses (see `Inputs`), or just latents (B, 16, height / 8, width / 8),
        which replace the seed's initial noise. If float16 overflows, the Steps start again from the first.
        """
        for event in self.events(request, Inputs.of(inputs, latents)):
            if not isinstance(event, Phase):
                yield event

    def denoise(self, request: GenerateRequest, inputs: Any = None, *, latents: Any = None) -> Iterator[Step]:
        """The Steps of a request, from its noise (or the given latents) to the final latents (B, h, w, 16)."""
        for event in self.events(request, Inputs.of(inputs, latents), decode=False):
            if isinstance(event, Step):
                yield event

    def events(
        self, request: GenerateRequest, inputs: Any = None, decode: bool = True, *, latents: Any = None
    ) -> Iterator[Phase | Step | Generated]:
        """`stream`, plus the Phases before and after the steps, for a progress bar."""
        request, inputs = self.complete(request), Inputs.of(inputs, latents)
        yield from self.turns.take(self._attempts(request, inputs, decode))

    def _attempts(
        self, request: GenerateRequest, inputs: Inputs, decode: bool
    ) -> Generator[Phase | Step | Generated, None, None]:
        """The events in the pipeline's dtype and, should float16 overflow, again in bfloat16."""
        try:
            with self.networks.guarded():
                yield from self._events(request, inputs, decode)
            return
        except _Overflowed:
            pass
        wide = wide_dtype()
        warnings.warn(
            f"float16 overflowed with this model; restarting the image from its first step in {wide}",
            Overflow,
            stacklevel=2,
        )
        self.networks = Networks(self.checkpoint, getattr(mx, wide), self.budget, self.networks.wired)
        mx.clear_cache()
        with self.networks.guarded():
            yield from self._events(request, inputs, decode)

    def _events(
        self, request: GenerateRequest, inputs: Inputs, decode: bool
    ) -> Generator[Phase | Step | Generated, None, None]:
        width, height, steps = request.extent
        scale, channels = self.checkpoint.vae.config.scale, self.checkpoint.vae.config.latent_channels
        h, w = height // scale, width // scale
        sigmas = self.checkpoint.scheduler.sigmas(steps, (h // PATCH) * (w // PATCH), request.shift)
        prompts = self._tokenize(request)
        plan = self._plan(request, prompts)
        noise = inputs.noise((request.num_images, channels, h, w), request.seed, request.rng).transpose(0, 2, 3, 1)
        inputs.check_named(request.latents)
        if inputs.digest != request.latents:
            request = replace(request, latents=inputs.digest)
        mx.eval(noise)  # the next event may be requested from another thread
        with self.networks.running(plan) as networks:
            try:
                embeddings = yield from networks.encode(prompts, sigmas)
                for step in networks.denoise(embeddings, noise, sigmas, request.guidance_scale):
                    yield step
            except NumericsError as error:
                if networks.dtype == mx.float16:
                    raise _Overflowed(str(error)) from error
                raise
            for i in range(request.num_images if decode else 0):
                latents = step.latents[i : i + 1]
                mx.eval(latents)  # as above
                pixels = yield from networks.decode(latents)
                yield Generated(i, to_uint8(pixels[0]), request, plan, str(networks.dtype).rpartition(".")[2])

    # ---- the parts of a request on their own

    def complete(self, request: GenerateRequest) -> GenerateRequest:
        """The request, with the model's own size and steps where it has None."""
        own = {"width": self.sample_size, "height": self.sample_size, "steps": self.variant.steps}
        missing: dict[str, Any] = {name: value for name, value in own.items() if getattr(request, name) is None}
        return replace(request, **missing) if missing else request

    def plan(self, request: GenerateRequest) -> Plan:
        """What will be in memory when, for this request within the pipeline's memory budget."""
        request = self.complete(request)
        return self._plan(request, self._tokenize(request))

    def _tokenize(self, request: GenerateRequest) -> list[tuple[int, ...]]:
        """The ids of the prompts that a request uses."""
        prompts = [request.prompt] + ([request.negative_prompt] if request.guidance_scale > 0 else [])
        return [self.tokenize(prompt) for prompt in prompts]

    def _plan(self, request: GenerateRequest, prompts: list[tuple[int, ...]]) -> Plan:
        width, height, steps = request.extent
        work = Workload(width, height, request.num_images, max(map(len, prompts)), steps, len(prompts))
        return self.networks.plan(work, self.keep)

    def tokenize(self, prompt: str) -> tuple[int, ...]:
        """The prompt's ids, template included: at most 512; warns if that truncates the prompt."""
        return self.networks.tokenize(prompt)

    def encode(self, prompt: str) -> mx.array:
        """The prompt's embeddings (L, cap_feat_dim): one row per token, template included, at most 512.

        In float16, the first call finds the model's scale, as the first image would: this also reads the transformer,
        and raises MemoryBudgetError if no image could be generated.
        """
        ids = self.tokenize(prompt)
        with self._beside_requests("text_encoder"):
            self.networks.find_scale(ids, self.keep)
            return result(self.networks.encode_prompt(ids))

    def decode(self, latents: mx.array) -> np.ndarray:
        """Final latents (h, w, 16) to pixels (8h, 8w, 3) uint8."""
        with self._beside_requests("vae"):
            return to_uint8(result(self.networks.decode(latents[None]))[0])

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (H, W, 3) in [-1, 1] to clean latents (H / 8, W / 8, 16) float32, using little memory."""
        with self.turns.computing(), self.networks.guarded():
            return np.array(self.networks.encode_image(mx.array(pixels)[None])[0])

    @contextmanager
    def _beside_requests(self, network: str) -> Iterator[None]:
        """Use a network outside of a request, or between its events; keep=False unloads it again."""
        with self.turns.computing(), self.networks.guarded():
            try:
                yield
            finally:
                if self.keep is False:
                    self.networks.release(network)

    # ---- the pipeline's parts

    @property
    def variant(self) -> Variant:
        """The model of the family that this one is used as."""
        return self.checkpoint.variant

    @property
    def defaults(self) -> dict:
        """Defaults for a request: the side of a square image in pixels, steps and guidance_scale."""
        variant = self.variant
        return {"side": self.sample_size, "steps": variant.steps, "guidance_scale": variant.guidance_scale}

    @property
    def sample_size(self) -> int:
        """The side of the square image that the model generates by default, in pixels."""
        return self.checkpoint.vae.config.sample_size

    @property
    def dtype(self) -> mx.Dtype:
        """The compute dtype."""
        return self.networks.dtype

    @property
    def budget(self) -> int:
        """The memory budget in bytes."""
        return self.networks.budget

    @budget.setter
    def budget(self, nbytes: int) -> None:
        self.networks.budget = nbytes

    @property
    def planner(self) -> Planner:
        return self.networks.planner

    @property
    def tokenizer(self):
        return self.networks.tokenizer

    @property
    def text_encoder(self) -> TextEncoder:
        return self.networks.text_encoder

    @property
    def transformer(self) -> Transformer:
        return self.networks.transformer

    @property
    def vae(self) -> VAE:
        return self.networks.vae


class _Overflowed(NumericsError):
    """A request overflowed float16."""
