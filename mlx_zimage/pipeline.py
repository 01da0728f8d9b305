"""ZImagePipeline: from a prompt to images, step by step."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import numpy as np

from . import porting
from .clock import Cost
from .controls import ControlNetMethods
from .distributed import Group, preparing
from .errors import MemoryBudgetError, NumericsError, RequestError, warn
from .failures import explained
from .groups import GroupMethods, Work, join
from .images.codec import is_flat, rounded, to_pil, to_signed, to_uint8, to_unit
from .images.masks import canvas_size, feathered, paste, to_latents
from .images.source import cover, fit_size, over_white
from .images.upscale import back_projected, resized
from .inputs import NONE, Inputs
from .loras import LoraMethods
from .machine import (
    avoid_cuda_graphs,
    check_budget,
    default_dtype,
    machine_budget,
    wide_dtype,
)
from .memory import Plan, Planner, Workload
from .models.controlnet import Controlled
from .models.layers import result
from .models.text_encoder import TextEncoder
from .models.transformer import PATCH, Transformer
from .models.vae import VAE
from .networks import Networks, Phase
from .request import (
    FEATHERS,
    MASKED_STRENGTH,
    MAX_SIZE,
    REFINING,
    RESAMPLE,
    STRENGTH,
    TOKENS,
    GenerateRequest,
    Outpaint,
    check_prompt,
    check_tokens,
)
from .sampling import Change, Guidance, Kept, Step, answered, relayed
from .scheduler import add_noise
from .sizes import parse_memory
from .turns import Turns
from .variants import Variant
from .weights.checkpoint import Checkpoint, open_checkpoint
from .weights.controlnets import ControlNetFile
from .weights.library import already_converted, smaller_parts
from .weights.lora import Lora
from .weights.overlay import Extra

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
__all__ = ["FlatImage", "Generated", "Overflow", "Phase", "PipelineOutput", "ZImagePipeline"]


class FlatImage(UserWarning):
    """An image shows nothing: a single colour, or nothing but black, white and pure colours."""


class Overflow(UserWarning):
    """An image overflowed float16 and is generated in a wider dtype instead."""


@dataclass(frozen=True)
class Generated:
    """One image: unit (H, W, 3) float32 in [0, 1], and the request that reproduces it; index counts from 0.

    plan says how it was run and how much memory was predicted; dtype is the compute dtype. cost is what it took, if
    another machine of a group generated it.
    """

    index: int
    unit: np.ndarray
    request: GenerateRequest
    plan: Plan
    dtype: str
    cost: Cost | None = None

    @cached_property
    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return rounded(self.unit)


@dataclass(frozen=True)
class PipelineOutput:
    """images: a list of PIL images, or an array: (B, H, W, 3) in [0, 1] for "np", (B, 16, h, w) for "latent".

    seed is the seed that was used; with generators, the first one's initial seed. out[0] is images, as in diffusers.
    """

    images: list | np.ndarray
    seed: int

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else (self.images,)[key]


class ZImagePipeline(LoraMethods, ControlNetMethods, GroupMethods, porting.DiffusersMethods):
    """Z-Image's tokenizer, text encoder, transformer and VAE, opened from one folder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        budget: int | None = None,
        keep: bool | None = None,
        wired: bool = False,
        group: Group | None = None,
    ):
        if keep not in (None, True, False):
            raise RequestError(f"keep must be True, False or None, got {keep!r}")
        self.checkpoint = checkpoint
        self.keep = keep
        self.turns = Turns()
        self._bar_options: dict[str, Any] = {}
        self._interrupt = False  # this and the next two belong to the last call
        self._guidance_scale: float | None = None
        self._num_timesteps = 0
        self._loras: dict[str, Lora] = {}
        self.controlnet: ControlNetFile | None = None
        self._strengths: dict[str, float] = {}
        budget = machine_budget() if budget is None else check_budget(budget)
        self.networks = Networks(checkpoint, dtype, budget, wired, group)
        if group is not None:
            join(group, checkpoint, dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: str | mx.Dtype | None = None,
        memory: str | int | None = None,
        keep: bool | None = None,
        variant: str | None = None,
        wired: bool = False,
        *,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        group: mx.distributed.Group | Group | None = None,
        torch_dtype: Any = None,
        **options: object,
    ) -> ZImagePipeline:
        """Open a model: a folder or file (from diffusers, mflux, mlx-vlm, ComfyUI or `convert`), an id, or "pocket".

        Reads and checks configs and headers; tensor data is read when first used. dtype is the compute dtype,
        "bfloat16", "float16" or "float32", or mx.bfloat16 and so on; `default_dtype` has the default. If float16
        overflows in spite of `mlx_zimage.headroom`, the pipeline warns and continues in bfloat16 (float32 in virtual
        machines). torch_dtype is diffusers' name for dtype; other options of diffusers are ignored with a warning, or
        raise an error that says what to do instead.

        memory is the memory budget, such as "6GB"; by default the one the machine recommends. Weights that do not fit
        are streamed from disk: slower, but the same image. A request that cannot fit is refused before any weights are
        read. keep=True keeps all networks in memory for the next request, keep=False unloads each one after use; by
        default they are kept if all fit at once.

        "z-image-turbo" and "turbo" are what the first run of `mlx-zimage generate` converted; without it, the official
        model with its transformer in bfloat16, a download of 21 GB instead of 33. As in diffusers, downloads start
        without asking.

        transformer, text_encoder and vae each name another place to take that network from: a model, the network's own
        folder or file, or an id; ID:PATH is a file or folder in a repository. Networks and a tokenizer that the model
        lacks come from Tongyi-MAI/Z-Image-Turbo, with a warning.

        variant, "turbo", "base" or "de-turbo", overrides which model of the family the folder is recognized as; any
        other value, such as "fp16", selects which of a network's files are read, as in diffusers.

        wired=True locks the resident weights in physical memory on macOS while the steps run. Leave it off unless other
        programs push the model out: kernel panics have been reported with wired memory.

        group, from mx.distributed.init(), shares the work of each image among the processes that `mlx.launch` started:
        rank 0 generates, the others call `follow`. With NCCL, call this before MLX's first operation on the GPU.

        Prompt embeddings are cached on disk, so that a prompt used before needs no text encoder; see
        `mlx-zimage models --help`.
        """
        porting.check_options(options)
        if dtype is not None and torch_dtype is not None:
            raise RequestError("dtype and torch_dtype were both given; give one")
        given = torch_dtype if dtype is None else dtype
        avoid_cuda_graphs()
        ranks = Group.of(group)
        with explained():  # a Mac may have no GPU for this session
            name = default_dtype() if given is None else porting.dtype_name(given)
            if ranks is not None and given is None and name == "float16":
                name = "bfloat16"  # finding float16's scale is not shared
            budget = None if memory is None else parse_memory(memory)
            with preparing(ranks):
                source, transformer = smaller_parts(already_converted(source), transformer, check=False)
                parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
                checkpoint = open_checkpoint(source, variant, parts)
            return cls(checkpoint, getattr(mx, name), budget, keep, wired, ranks)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        cfg_normalization: bool | float = False,
        cfg_truncation: float | None = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Sequence[Any] | None = None,
        negative_prompt_embeds: Sequence[Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = TOKENS,
        seed: int | None = None,
        shift: float | None = None,
        rng: str = "torch",
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        sample_posterior: bool = False,
        mask_feather: int | None = None,
        mask_grow: int = 0,
        mask_soft: bool = False,
        mask_resample: int | None = None,
        outpaint: Outpaint | dict[str, int] | str | None = None,
        upscale: float | None = None,
        tile: int | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] | None = None,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
    ) -> PipelineOutput | tuple:
        """Generate images; the arguments up to max_sequence_length are those of diffusers' ZImagePipeline 0.42.

        height and width are in pixels, multiples of 16; num_inference_steps is the number of denoising steps;
        guidance_scale 0 is off; all of these default to the model's own, where diffusers has 1024, 50 and 5. sigmas
        replace the evenly spaced ones before the shift. See `GenerateRequest` for cfg_normalization, cfg_truncation and
        max_sequence_length.

        generator is a torch.Generator on the CPU, or a list of one per image; it advances as in diffusers. seed gives
        the noise of a new generator; without either, a random seed is used and returned. rng="mlx" uses MLX's
        random numbers for the noise. latents (B, 16, height / 8, width / 8) replace the initial noise. prompt_embeds
        and negative_prompt_embeds are lists of arrays (L, cap_feat_dim), as from `encode_prompt`. Arrays may come from
        NumPy, MLX or torch.

        image starts from an image instead of noise, as diffusers' ZImageImg2ImgPipeline does: a path, a PIL image or an
        array, or a list of one per prompt. strength, by default 0.6, is the fraction of the steps to run: 1 ignores the
        image. If no size is given, it is taken from the image: see `fit_size`. Its latents are the mean that the VAE
        gives; with sample_posterior they are sampled, which gives diffusers' own result.

        mask_image (inpainting, as in diffusers' ZImageInpaintPipeline) is white where the image is regenerated, at
        strength 1 by default; the pixels outside it are unchanged. It may be a list, too. See `GenerateRequest` for
        mask_feather, mask_grow, mask_soft and mask_resample; diffusers does what mask_resample=0 does.
        outpaint={"left": 256} extends the image instead, by multiples of 16.

        upscale=2 enlarges the image, or the one generated first, and refines it, with strength 0.2 unless another is
        given, in tiles of at most `tile` pixels per side: by default the model's own size; 0 is the whole image at
        once. Reduced to the image's size, the result is the image again: see `mlx_zimage.images.upscale`.

        control_image is what a ControlNet follows (see `load_controlnet`): an image that is ready to use, or a pair of
        a preparation ("canny", "gray", "scribble", "tile", "lines", "pose" or "depth") and a photo, or a list of
        several, whose effects add up. It gives the size, unless width and height are given.
        controlnet_conditioning_scale (by default the ControlNet's own), control_guidance_start and control_guidance_end
        (the part of the steps in which it acts) may be lists, too. When inpainting, a ControlNet that reads a mask is
        shown what is kept; control_image="inpaint" shows it nothing else.

        output_type is "pil", "np" (floats in [0, 1]) or "latent". callback_on_step_end(pipe, index, timestep,
        {"latents": mx.array}) may return other latents, and works for one prompt at a time. The images of several
        prompts are generated one after another, or on several machines at once. shift is the timestep shift: higher
        spends more steps at high noise. Invalid arguments raise RequestError before any work starts.
        """
        porting.check_call(output_type, joint_attention_kwargs, generator, seed, latents, image)
        settings: dict[str, Any] = {
            "height": height,
            "width": width,
            "seed": porting.seed_of(generator) if seed is None else seed,
            "steps": None if sigmas is not None else num_inference_steps,  # as many as sigmas
            "sigmas": sigmas,
            "guidance_scale": guidance_scale,
            "cfg_normalization": 1.0 if cfg_normalization is True else cfg_normalization or 0.0,
            "cfg_truncation": 1.0 if cfg_truncation is None else cfg_truncation,
            "shift": shift,
            "num_images": num_images_per_prompt,
            "rng": rng,
            "max_sequence_length": max_sequence_length,
            "loras": porting.scaled_loras(self._strengths, joint_attention_kwargs),
            "strength": strength,
            "sample_posterior": sample_posterior,
            "mask_feather": mask_feather,
            "mask_grow": mask_grow,
            "mask_soft": mask_soft,
            "mask_resample": mask_resample,
            "outpaint": outpaint,
            "upscale": upscale,
            "tile": tile,
        }
        rows = porting.each_prompt(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, image, mask_image)
        uses, shown = porting.controls_of(
            control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end
        )
        if uses:
            settings["controls"] = uses
            rows = ((texts, replace(inputs, control_images=shown)) for texts, inputs in rows)
        with porting.named_as_in_calls():
            runs = [(self.complete(GenerateRequest(**texts, **settings), inputs), inputs) for texts, inputs in rows]
        for request, inputs in runs:
            self.plan(request, inputs)  # refuses what does not fit, before any work
        porting.check_sizes([request for request, _ in runs])
        first, arrays = runs[0]
        guides = first.guidance_scale or 0.0, first.negative_prompt, first.cfg_normalization, first.cfg_truncation
        for note in self.variant.notes(*guides):
            warn(note)
        noised, refined = first.parts[0], first.parts[-1]  # the same, unless an image is generated and then enlarged
        count, *size = self._latents_shape(noised)
        sampled = (len(image) if isinstance(image, (list, tuple)) else 1) if sample_posterior else 0
        shapes = (len(runs) * count, *size), (sampled, *self._latents_shape(refined)[1:])
        noise, samples = porting.noise_of(latents, generator, first, *shapes)
        self._interrupt, self._guidance_scale = False, first.guidance_scale
        self._num_timesteps = self.count_steps(first)
        answer: Callable[[Step], Change] = lambda step: Change(stop=self._interrupt)  # noqa: E731
        if callback_on_step_end is not None:
            if len(runs) > 1:
                raise RequestError(f"callback_on_step_end takes one prompt at a time, got {len(runs)}; loop over them")
            starts = np.concatenate([self._schedule(part)[part.first_step : -1] for part in first.parts])
            names = callback_on_step_end_tensor_inputs
            answer = porting.answer_by(self, callback_on_step_end, names, starts, arrays)
        images: list[np.ndarray] = []
        for i, (request, inputs) in enumerate(runs):
            if noise is not None:
                inputs = replace(inputs, latents=noise[i * count :][:count])
            if samples is not None:
                inputs = replace(inputs, posterior_noise=samples[i % sampled][None])
            runs[i] = request, inputs
        with self._progress_bar(len(runs) * self._num_timesteps) as bar:
            done = 0
            for several in [[one] for one in runs] if output_type == "latent" else self.in_rounds(runs):
                decoded = output_type != "latent"
                events = self.at_once(several) if decoded else self.events(*several[0], decode=False)
                for event in answered(events, answer):
                    if isinstance(event, Step):
                        last = event
                        bar.update(done * self._num_timesteps + len(several) * (event.index + 1) - bar.n)
                    elif isinstance(event, Generated):
                        images.append(event.pixels if output_type == "pil" else event.unit)
                if output_type == "latent":
                    images.extend(np.array(last.latents.transpose(0, 3, 1, 2)))
                done += len(several)
        result = [to_pil(image) for image in images] if output_type == "pil" else np.stack(images)
        return PipelineOutput(result, first.seed) if return_dict else (result,)

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
    ) -> Generator[Phase | Step | Generated, Change | None, None]:
        """`stream`, plus the Phases before and after the steps, for a progress bar.

        Sending a Change in answer to a Step replaces its latents or ends the steps.
        """
        work = self._completed((request, Inputs.of(inputs, latents)))
        events = self._attempts(*work, decode)
        yield from self.turns.take(events if self.group is None else self._led([work], events, decode))

    def at_once(self, works: Sequence[Work]) -> Generator[Phase | Step | Generated, Change | None, None]:
        """`events` of one of the lists that `in_rounds` makes: the images of all its requests, in their order.

        The Phases and Steps of several requests are those of the first, which this machine runs.
        """
        if len(works) == 1:
            yield from self.events(*works[0])
            return
        works = [self._completed(work) for work in works]
        plans = [self.plan(*work) for work in works]  # refuses what does not fit
        yield from self.turns.take(self._led(works, self._with_others(works, plans)))

    def in_rounds(self, items: Iterable[T]) -> Iterator[list[T]]:
        """Items, such as requests, in lists that run at once. If the machines of a group are about equally fast, a list
        has an item for each machine, as long as that many are left; otherwise it has one, which all machines share."""
        items, group = iter(items), self.group
        size = group.size if group is not None and group.is_even else 1
        while several := list(islice(items, size)):
            yield from [several] if len(several) == size else ([item] for item in several)

    def _with_others(
        self, works: Sequence[Work], plans: Sequence[Plan]
    ) -> Generator[Phase | Step | Generated, Change | None, None]:
        """The events of the first request, while each other machine runs another one, and then their images."""
        others = yield from self._apart(works[0])
        dtype = str(self.dtype).rpartition(".")[2]
        for (request, _), plan, images in zip(works[1:], plans[1:], others, strict=True):
            for i, (unit, cost) in enumerate(images):
                warn_if_flat(unit, request.seed, i)
                yield Generated(i, unit, request, plan, dtype, cost)

    def _completed(self, work: Work) -> Work:
        request, inputs = work
        return self.complete(request, inputs), inputs

    def _attempts(
        self, request: GenerateRequest, inputs: Inputs, decode: bool
    ) -> Generator[Phase | Step | Generated, Change | None, None]:
        """The events in the pipeline's dtype and, should float16 overflow, again in bfloat16."""
        try:
            with self.networks.guarded():
                yield from self._events(request, inputs, decode)
            return
        except _Overflowed:
            pass
        wide = wide_dtype()
        warn(f"float16 overflowed with this model; restarting the image from its first step in {wide}", Overflow)
        self.networks = Networks(self.checkpoint, getattr(mx, wide), self.budget, self.networks.wired, self.group)
        mx.clear_cache()
        with self.networks.guarded():
            for lora in self._loras.values():
                self.networks.attach(lora)
            if self.controlnet is not None:
                self.networks.set_controlnet(self.controlnet.component)
            yield from self._events(request, inputs, decode)

    def _events(
        self, request: GenerateRequest, inputs: Inputs, decode: bool
    ) -> Generator[Phase | Step | Generated, Change | None, None]:
        """The events of a request; with upscale, of generating its image, unless it is given, and of refining it.

        If the steps are stopped before it is refined, it is only enlarged.
        """
        if request.refinement is None:
            yield from self._part(request, inputs, decode)
            return
        inputs.check_named(request.arrays)
        *first, refinement = request.parts
        before, steps = 0, self.count_steps(request)
        images: list[Generated] = []

        def counted(event: Phase | Step | Generated) -> Phase | Step | Generated:
            return replace(event, index=before + event.index, steps=steps) if isinstance(event, Step) else event

        def kept(event: Phase | Step | Generated) -> Phase | Step | Generated | None:
            if isinstance(event, Generated):
                images.append(event)
                return None
            return counted(event)

        def named(event: Phase | Step | Generated) -> Phase | Step | Generated:
            if isinstance(event, Generated):
                return replace(event, unit=back_projected(event.unit, original), request=request)
            return counted(event)

        size, latents = refinement.extent[:2], inputs.latents
        for part in first:
            stopped = yield from relayed(self._part(part, inputs, True), kept)
            if stopped:
                if decode:
                    unit = resized(images[0].pixels, *size).astype(np.float32) / 255
                    yield replace(images[0], unit=unit, request=request)
                return
            before, latents = self.count_steps(part), None  # they were its noise
        if inputs.source is None:
            original = images[0].pixels
        else:
            original = np.asarray(cover(over_white(inputs.source), *request.extent[:2]))
        enlarged = replace(inputs, image=resized(original, *size), latents=latents)
        yield from relayed(self._part(replace(refinement, **enlarged.digests), enlarged, decode), named)

    def _part(
        self, request: GenerateRequest, inputs: Inputs, decode: bool
    ) -> Generator[Phase | Step | Generated, Change | None, None]:
        schedule, prompts = self._schedule(request), self._prompts(request, inputs)
        first = request.first_step
        inputs.check_named(request.arrays)
        plan = self.networks.plan(self._work(request, prompts), self.keep)
        self.networks.set_loras(request.lora_strengths)
        shape = self._latents_shape(request)
        noise, sample = inputs.noise(shape, request.seed, request.rng, request.sample_posterior)
        pixels, mask = self._pixels(request, inputs)
        # before any weight is read: a photo may show no one
        shown = self._shown(request, inputs) if request.controls else []
        guidance = Guidance(request.guidance_scale or 0.0, request.cfg_normalization, request.cfg_truncation)
        noise, sample = noise.transpose(0, 2, 3, 1), None if sample is None else sample.transpose(0, 2, 3, 1)
        mx.eval(noise, sample)  # the next event may be requested from another thread
        with self.networks.running(plan) as networks:
            try:
                embeddings = yield from networks.encode(prompts, schedule)
                start, kept = noise, None
                if pixels is not None:
                    image = yield from networks.encode_image(to_signed(pixels)[None], sample)
                    start = add_noise(image, noise, float(schedule[first]))
                    if mask is not None:
                        masked = mx.array(to_latents(mask))[None, :, :, None]
                        kept = Kept(image, noise, masked, request.mask_resample or 0, request.seed)
                    mx.eval(start)  # as above
                controls: list[Controlled] = []
                tile = request.tile or 0
                if request.controls:
                    controls = yield from self._controls(request, shown, pixels, mask, request.extent[2] - first)
                latents = yield from networks.denoise(
                    embeddings, start, schedule, guidance, kept, tile, controls, first
                )
            except NumericsError as error:
                if networks.dtype == mx.float16:
                    raise _Overflowed(str(error)) from error
                raise
            for i in range(request.num_images if decode else 0):
                one = latents[i : i + 1]
                mx.eval(one)  # as above
                decoded = yield from networks.decode(one)
                unit = to_unit(decoded[0])
                if pixels is not None and mask is not None:
                    unit = paste(pixels.astype(np.float32) / 255, unit, feathered(mask, request.mask_feather or 0))
                if self.group is None or self.group.leads:
                    warn_if_flat(unit, request.seed, i)
                yield Generated(i, unit, request, plan, str(networks.dtype).rpartition(".")[2])

    # ---- the parts of a request on their own

    def complete(self, request: GenerateRequest, inputs: Inputs = NONE) -> GenerateRequest:
        """The request, with the model's size, steps and guidance, and the pipeline's LoRAs, where it has None.

        With inputs, it also gets their digests, and the size and strength that an image gives it: see `completed`.
        """
        if not isinstance(request, GenerateRequest):
            raise RequestError(
                f"expected a GenerateRequest but got {type(request).__name__}; to pass a prompt, call the pipeline "
                f"itself"
            )
        loaded = {name: lora.sha256 for name, lora in self._loras.items()}
        if request.controls:
            request = self._steps_for_controls(request)
        request = completed(request, inputs, self.sample_size, self.variant).with_loras(loaded, self._strengths)
        return self._with_controlnet(request, inputs) if request.controls else replace(request, controlnet=None)

    def count_steps(self, request: GenerateRequest) -> int:
        """The number of Steps that a request yields."""
        return sum(part.extent[2] - part.first_step for part in self.complete(request).parts)

    def sigmas(self, request: GenerateRequest) -> np.ndarray:
        """The schedule of a request: (steps + 1,) float32, falling to 0. From an image, it is the last steps only.

        With upscale and without an image, it is that of the image that is generated first.
        """
        part = self.complete(request).parts[0]
        return self._schedule(part)[part.first_step :]

    def _schedule(self, request: GenerateRequest) -> np.ndarray:
        """The sigmas of all steps of a complete request, including those that image to image does not run.

        What depends on them is computed for the whole schedule, so that the next request with the same steps finds it
        computed.
        """
        width, height, steps = request.extent
        token = self.checkpoint.vae.config.scale * PATCH
        tokens = (width // token) * (height // token)
        return self.checkpoint.scheduler.sigmas(steps, tokens, request.shift, request.sigmas)

    def plan(self, request: GenerateRequest, inputs: Inputs = NONE, loras: Mapping[str, Extra] | None = None) -> Plan:
        """The memory plan for this request within the pipeline's budget.

        loras has what LoRAs other than its own would add, as `lora_extras` gives it.
        """
        request = self.complete(request, inputs)
        self._pixels(request, inputs)  # refuses a mask that does not fit
        prompts = self._prompts(request, inputs)
        plans = [self.networks.plan(self._work(part, prompts, loras), self.keep) for part in request.parts]
        return max(plans, key=lambda plan: plan.room)

    def most_tokens(self, request: GenerateRequest) -> int:
        """The number of tokens up to which any prompt in place of the request's fits the budget."""
        request = self.complete(request)

        def too_many(tokens: int) -> bool:
            try:
                for part in request.parts:
                    self.networks.plan(self._work(part, [range(tokens)]), self.keep)
            except MemoryBudgetError:
                return True
            return False

        most = request.max_sequence_length
        return bisect_left(range(1, most + 1), True, key=too_many) if too_many(most) else most

    def _pixels(self, request: GenerateRequest, inputs: Inputs) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The image that a request starts from, and the mask of what it regenerates; None if there is none."""
        place = *request.extent[:2], request.outpaint
        return inputs.pixels(*place), inputs.regenerated(*place, request.mask_grow, request.mask_soft)

    def _latents_shape(self, request: GenerateRequest) -> tuple[int, int, int, int]:
        """(B, C, h, w)"""
        (width, height, _), vae = request.extent, self.checkpoint.vae.config
        return request.num_images, vae.latent_channels, height // vae.scale, width // vae.scale

    def _prompts(self, request: GenerateRequest, inputs: Inputs) -> list[tuple[int, ...] | mx.array]:
        """The prompts that a request uses: their ids, or the embeddings that replace them."""
        texts = [request.prompt, request.negative_prompt][: 1 + request.guided]
        given = inputs.prompts(self.checkpoint.transformer.config.cap_feat_dim)[: len(texts)]
        return [
            self.tokenize(text, request.max_sequence_length) if embeddings is None else embeddings
            for text, embeddings in zip(texts, given, strict=True)
        ]

    def _work(
        self, part: GenerateRequest, prompts: Sequence[Sized], loras: Mapping[str, Extra] | None = None
    ) -> Workload:
        extras = self.networks.lora_extras(part.lora_strengths) if loras is None else loras
        return workload(part, max(map(len, prompts)), extras)

    def tokenize(self, prompt: str, max_sequence_length: int = TOKENS) -> tuple[int, ...]:
        """The prompt's ids, template included: at most max_sequence_length; warns if that truncates the prompt."""
        check_prompt(prompt, "prompt")
        check_tokens(max_sequence_length)
        return self.networks.tokenize(prompt, max_sequence_length)

    def encode(self, prompt: str, max_sequence_length: int = TOKENS) -> mx.array:
        """The prompt's embeddings (L, cap_feat_dim): one row per token, template included.

        In float16, the first call finds the model's scale, as the first image would: this also reads the transformer,
        and raises MemoryBudgetError if no image could be generated.
        """
        ids = self.tokenize(prompt, max_sequence_length)
        strengths = {self._loras[name].sha256: strength for name, strength in self._strengths.items()}
        with self._beside_requests("text_encoder"), self.networks.with_loras(strengths):
            self.networks.find_scale(ids, self.keep)
            return result(self.networks.encode_prompt(ids))

    def decode(self, latents: mx.array) -> np.ndarray:
        """Final latents (h, w, 16) to pixels (8h, 8w, 3) uint8."""
        latents = porting.sides_checked(latents, "latents", self.checkpoint.vae.config.latent_channels)
        with self._beside_requests("vae"):
            return to_uint8(result(self.networks.decode(latents[None], planned=False))[0])

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (H, W, 3) in [-1, 1] to clean latents (H / 8, W / 8, 16) float32, using little memory."""
        given = porting.sides_checked(pixels, "pixels", 3, self.checkpoint.vae.config.scale)
        with self.turns.computing(), self.networks.guarded():
            return np.array(result(self.networks.encode_image(given[None], planned=False))[0])

    @contextmanager
    def _beside_requests(self, network: str) -> Iterator[None]:
        """Use a network outside a request, or between its events; with keep=False it is unloaded again."""
        with self.turns.computing(), self.networks.guarded():
            try:
                yield
            finally:
                if self.keep is False:
                    self.networks.release(network)

    # ---- the pipeline's parts

    @property
    def variant(self) -> Variant:
        """The model of the family whose defaults this one uses."""
        return self.checkpoint.variant

    @property
    def sample_size(self) -> int:
        """The side of the square image that the model generates by default, in pixels."""
        return self.checkpoint.vae.config.sample_size

    @property
    def group(self) -> Group | None:
        """The machines that share the work, if there are several."""
        return self.networks.group

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

    # ---- as in diffusers, like the methods in porting.py

    def to(self, *args: object, **kwargs: object) -> ZImagePipeline:
        """Returns the pipeline, since MLX chooses the device. RequestError for a dtype other than the pipeline's."""
        porting.check_to(self.dtype, [*args, *kwargs.values()])
        return self

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: object = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        max_sequence_length: int = TOKENS,
    ) -> tuple[list[mx.array], list[mx.array]]:
        """prompt_embeds and negative_prompt_embeds for a call: an array (L, cap_feat_dim) per prompt."""
        rows = [texts for texts, _ in porting.each_prompt(prompt, negative_prompt, None, None)]
        names = ["prompt", "negative_prompt"][: 1 + do_classifier_free_guidance]
        wanted, *unwanted = ([self.encode(row[name], max_sequence_length) for row in rows] for name in names)
        return wanted, unwanted[0] if unwanted else []

    def set_progress_bar_config(self, **options: Any) -> None:
        """tqdm's options for the progress bar of calls in a terminal or notebook; disable=True turns it off."""
        self._bar_options = options

    def _progress_bar(self, total: int) -> tqdm:
        from tqdm.auto import tqdm  # imported here because only calls need it

        seen = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
        return tqdm(**{"total": total, "disable": not seen, **self._bar_options})

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the current or last call."""
        return self._num_timesteps


# ---- what a request needs of any model


def warn_if_flat(unit: np.ndarray, seed: int, index: int) -> None:
    if is_flat(unit):
        warn(
            f"image {index + 1} of seed {seed} is a single colour, or nothing but black, white and pure colours; "
            f"unless you asked for that, check the model with `mlx-zimage verify`",
            FlatImage,
        )


def completed(request: GenerateRequest, inputs: Inputs, side: int, variant: Variant) -> GenerateRequest:
    """The request with the digests of its inputs, and the defaults of a model whose images are side x side pixels.

    An image gives it a size and a strength: see `fit_size`. Its LoRAs stay as they are.
    """
    if inputs is not NONE:
        inputs.check_named(request.arrays)
        request = replace(request, **inputs.digests)
    own = {"width": side, "height": side, "steps": variant.steps, "guidance_scale": variant.guidance_scale}
    if inputs.source is not None:
        area = side**2 if request.upscale is None else MAX_SIZE**2
        given = inputs.source.size, area, request.width, request.height
        sides = fit_size(*given) if request.outpaint is None else canvas_size(request.outpaint, *given)
        own |= dict(zip(("width", "height"), sides, strict=True))
    elif request.control_images and inputs.controls:
        first = inputs.controls.get(request.control_images[0])
        if first is not None:
            sides = fit_size(first.size, side**2, request.width, request.height)
            own |= dict(zip(("width", "height"), sides, strict=True))
    if request.upscale is not None:
        own |= {"strength": REFINING, "tile": side}
    elif request.image is not None:
        own["strength"] = MASKED_STRENGTH if request.inpaints else STRENGTH
    if request.inpaints:
        shorter = min(request.width or own["width"], request.height or own["height"])
        own |= {"mask_feather": shorter // FEATHERS, "mask_resample": RESAMPLE}
    missing: dict[str, Any] = {name: value for name, value in own.items() if getattr(request, name) is None}
    request.check_image()
    request = replace(request, **missing)
    _ = request.parts  # refuses an impossible upscaled size
    return request


def workload(part: GenerateRequest, tokens: int, loras: Mapping[str, Extra] | None = None) -> Workload:
    """The size of a part of a complete request, with prompts of at most `tokens`."""
    width, height, steps = part.extent
    prompts, controls = 1 + part.guided, len(part.controls)
    encodes, tile = part.image is not None or controls > 0, part.tile or 0
    return Workload(width, height, part.num_images, tokens, steps, prompts, loras or {}, encodes, tile, controls)


class _Overflowed(NumericsError):
    """A request overflowed float16."""
