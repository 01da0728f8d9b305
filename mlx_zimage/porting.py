"""The arguments and methods of diffusers' ZImagePipeline, translated for scripts written for it.

Each one gives diffusers' result or raises an error that says what to do here. Those that only choose where or how
diffusers computes do nothing, and warn.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from .dtypes import FLOATS
from .errors import RequestError
from .images.source import digest, read_image
from .inputs import Inputs, check_latents
from .needless import Absent, Elsewhere, Needless
from .noise import check_generator, generator_randn, noises
from .request import ControlUse, GenerateRequest, LoraUse
from .sampling import Change, Step
from .untrusted import brief

BY_MEMORY = "ZImagePipeline.from_pretrained(..., memory='6GB') keeps to a budget"
BY_MLX = "MLX uses the GPU if there is one, and otherwise the CPU"
FUSED = "MLX's attention is fused"
IGNORED_OPTIONS = {  # of from_pretrained
    "low_cpu_mem_usage": "weights are only read when first used",
    "use_safetensors": "only safetensors are read",
    "device_map": BY_MLX,
}
OTHER_OPTIONS = {  # of from_pretrained, and what to use instead
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    "token": "set the environment variable HF_TOKEN, or run `hf auth login`",
    "revision": "name it in the id, as in 'Tongyi-MAI/Z-Image-Turbo@main'",
    "subfolder": "name it in the id or path, as in 'ID:FOLDER'",
    "scheduler": "pass shift= or sigmas= when you call the pipeline to choose the schedule",
    "tokenizer": "save it into a model's folder, and open that",
    "quantization_config": "convert the model once, as in `mlx-zimage convert ID FOLDER --q-bits 4`, and open FOLDER",
}


ARGUMENTS = {"num_images": "num_images_per_prompt", "steps": "num_inference_steps"}  # by the field of a request


# ---- the methods


class DiffusersMethods:
    """Methods of diffusers' pipelines."""

    enable_model_cpu_offload = Needless(BY_MEMORY)
    enable_sequential_cpu_offload = Needless(BY_MEMORY)
    enable_group_offload = Needless(BY_MEMORY)
    maybe_free_model_hooks = Needless("from_pretrained(..., keep=False) unloads each network after use")
    enable_attention_slicing = Needless(FUSED)
    disable_attention_slicing = Needless(FUSED)
    enable_xformers_memory_efficient_attention = Needless(FUSED)
    disable_xformers_memory_efficient_attention = Needless(FUSED)
    enable_vae_slicing = Needless("images are decoded one by one")
    disable_vae_slicing = Needless("images are decoded one by one")
    enable_vae_tiling = Needless(f"images are decoded in strips if memory is short; {BY_MEMORY}")
    disable_vae_tiling = Needless(f"images are decoded whole if memory allows it; {BY_MEMORY}")
    save_pretrained = Elsewhere("from mlx_zimage.convert import convert; convert(source, folder) writes a model")
    scheduler = Absent("pass shift= or sigmas= when you call the pipeline to choose the schedule")
    device = Absent(f"{BY_MLX}; a torch.Generator must be on the CPU")
    from_single_file = Elsewhere("from_pretrained opens files, too")


def check_options(options: Mapping[str, object]) -> None:
    """Warn about options of diffusers' from_pretrained that do nothing here, and refuse all others."""
    for name in options:
        if name in IGNORED_OPTIONS:
            warnings.warn(f"{name} does nothing here: {IGNORED_OPTIONS[name]}", stacklevel=3)
        elif name in OTHER_OPTIONS:
            raise RequestError(f"from_pretrained has no option {name}; {OTHER_OPTIONS[name]}")
        else:
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}")


def dtype_name(dtype: Any) -> str:
    """ "bfloat16", mx.bfloat16 or torch.bfloat16 as "bfloat16"; RequestError for other dtypes."""
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("mlx.core.").removeprefix("torch.")
    if name not in FLOATS:
        raise RequestError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    return name


def check_to(dtype: mx.Dtype, values: Sequence[object]) -> None:
    """Check the arguments of diffusers' `to` for a pipeline of that dtype."""
    for value in values:
        if str(value).startswith(("torch.", "mlx.core.")):
            if dtype_name(value) != dtype_name(dtype):
                name = dtype_name(value)
                raise RequestError(f"the dtype cannot change after opening; use from_pretrained(..., dtype={name!r})")
        elif value is not None and not isinstance(value, bool):
            warnings.warn(f"to({str(value)!r}) does nothing here: {BY_MLX}", stacklevel=3)


# ---- the arguments of a call


def check_call(
    output_type: str, joint_attention_kwargs: Any, generator: Any, seed: int | None, latents: Any, image: Any
) -> None:
    """Refuse arguments that cannot work, alone or together."""
    if joint_attention_kwargs and not (
        isinstance(joint_attention_kwargs, dict) and {*joint_attention_kwargs} == {"scale"}
    ):
        raise RequestError(
            f"joint_attention_kwargs can only contain scale, which multiplies the strengths of LoRAs, got "
            f"{joint_attention_kwargs!r}"
        )
    if generator is not None and seed is not None:
        raise RequestError("seed and generator were both given; give one")
    if latents is not None and image is not None:
        raise RequestError(
            "latents and image were both given, in which case diffusers ignores the image; give one, or use "
            "pipe.stream(request, Inputs(latents=noise, image=image)) to start from the image with that noise"
        )
    if output_type == "pt":
        raise RequestError(
            "output_type 'pt' would need torch; use output_type='np' and torch.from_numpy(images).permute(0, 3, 1, 2)"
        )
    if output_type not in ("pil", "np", "latent"):
        raise RequestError(f"output_type must be 'pil', 'np' or 'latent', got {output_type!r}")


@contextmanager
def named_as_in_calls() -> Iterator[None]:
    """Have errors about a value of a request begin with the name of the call's argument that it came from."""
    try:
        yield
    except RequestError as error:
        name, _, rest = str(error).partition(" ")
        if name not in ARGUMENTS:
            raise
        raise RequestError(f"{ARGUMENTS[name]} {rest}") from None


def sides_checked(values: Any, name: str, channels: int, multiple: int = 1) -> mx.array:
    """An array (H, W, channels) whose sides are multiples of a number; RequestError for anything else."""
    try:
        array = mx.array(values)
    except (TypeError, ValueError):
        raise RequestError(f"{name} must be an array of numbers, got {brief(values)}") from None
    if array.ndim != 3 or array.shape[2] != channels or any(not n or n % multiple for n in array.shape[:2]):
        sides = f", with sides that are multiples of {multiple}" if multiple > 1 else ""
        raise RequestError(f"{name} have shape {array.shape}, expected (height, width, {channels}){sides}")
    return array


def each_prompt(
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: Any,
    negative_prompt_embeds: Any,
    image: Any = None,
    mask_image: Any = None,
) -> Iterator[tuple[dict[str, Any], Inputs]]:
    """For each prompt of a call, the fields of its request, and its image, mask and embeddings, if any."""
    if prompt is None and prompt_embeds is None:
        raise RequestError("there is no prompt; give prompt or prompt_embeds")
    columns = {
        "prompt": _listed(prompt, "prompt"),
        "prompt_embeds": _listed(prompt_embeds, "prompt_embeds"),
        "negative_prompt": _listed(negative_prompt, "negative_prompt"),
        "negative_prompt_embeds": _listed(negative_prompt_embeds, "negative_prompt_embeds"),
    }
    count = len(columns["prompt"] or columns["prompt_embeds"] or [])
    if isinstance(negative_prompt, str):
        columns["negative_prompt"] = [negative_prompt] * count
    for name, one in (("image", image), ("mask_image", mask_image)):
        columns[name] = list(one) if isinstance(one, (list, tuple)) else [one] * count
    for name, column in columns.items():
        if column is not None and len(column) != count:
            raise RequestError(f"{name} must have one entry per prompt, {count} in all, got {len(column)}")
    for i in range(count):
        row = {name: column[i] for name, column in columns.items() if column is not None}
        texts = {name: row.pop(name, "") for name in ("prompt", "negative_prompt")}
        inputs = Inputs(**row)
        yield {**texts, **inputs.digests}, inputs


def controls_of(images: Any, scales: Any, starts: Any, ends: Any) -> tuple[tuple[ControlUse, ...], tuple[Any, ...]]:
    """The controls of a call, and their images, from one or a list of each."""
    given = images if isinstance(images, list) else [] if images is None else [images]
    values = {
        "controlnet_conditioning_scale": (scales, None),
        "control_guidance_start": (starts, 0.0),
        "control_guidance_end": (ends, 1.0),
    }
    if not given:
        for name, (value, default) in values.items():
            if value != default:
                raise RequestError(f"{name} is for a control_image, but there is none; give one")
        return (), ()
    columns = []
    for name, (value, _) in values.items():
        columns.append(list(value) if isinstance(value, (list, tuple)) else [value] * len(given))
        if len(columns[-1]) != len(given):
            raise RequestError(f"{name} must have one entry per control image, {len(given)} in all, got {len(value)}")
    uses, shown = [], []
    for one, scale, start, end in zip(given, *columns, strict=True):
        if isinstance(one, str) and one == "inpaint":
            uses.append(ControlUse(None, None, scale, start, end))
            continue
        prepare, image = one if isinstance(one, tuple) and len(one) == 2 else (None, one)
        read = read_image(image)
        uses.append(ControlUse(digest(read), prepare, scale, start, end))
        shown.append(read)
    return tuple(uses), tuple(shown)


def _listed(value: Any, name: str) -> list | None:
    """A list, array or text as a list; None stays None."""
    if value is None or isinstance(value, str):
        return None if value is None else [value]
    if isinstance(value, (bytes, Mapping)):
        raise RequestError(f"{name} must be a string or a list, got {type(value).__name__}")
    if getattr(value, "ndim", None) == 2:
        raise RequestError(f"{name} must be a list with one array per prompt, got a single array; put it in a list")
    try:
        listed = list(value)
    except TypeError:
        raise RequestError(f"{name} must be a string or a list, got {type(value).__name__}") from None
    if not listed:
        raise RequestError(f"{name} is an empty list; give one entry per prompt, or leave it out")
    return listed


def seed_of(generator: Any) -> int:
    """The initial seed of a generator, or of the first in a list; a random seed if there is none."""
    if generator is None:
        return secrets.randbits(32)
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    for one in generators:
        check_generator(one)
    if not generators:
        raise RequestError("generator is an empty list; give one per image, or seed=N")
    return generators[0].initial_seed()


def check_sizes(requests: Sequence[GenerateRequest]) -> None:
    """Refuse a call whose images give its prompts different sizes, since their noise is generated together."""
    sizes = {f"{width}x{height}" for width, height, _ in (request.extent for request in requests)}
    if len(sizes) > 1:
        raise RequestError(
            f"the images of one call must all be of the same size, got {' and '.join(sorted(sizes))}; set "
            f"width and height, or call once for each"
        )


def noise_of(
    latents: Any, generator: Any, request: GenerateRequest, shape: tuple[int, ...], sampled: tuple[int, ...]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The noise of a call whose first request this is, and the noise to sample its images with (none if `sampled` is
    (0, ...)).

    Both have the shapes given, (B, C, h, w). As in diffusers, the latter is generated first. None if that request's
    seed gives all of it.
    """
    if latents is not None:
        return check_latents(latents, shape), None
    count = sampled[0]
    if generator is not None:
        some = generator[:count] if isinstance(generator, (list, tuple)) else generator
        samples = generate_noise(some, sampled) if count else None
        return generate_noise(generator, shape), samples
    if shape[0] == request.num_images:
        return None, None
    *first, noise = noises(request.seed, [sampled, shape] if count else [shape], request.rng)
    return np.array(noise), np.array(first[0]) if first else None


def scaled_loras(strengths: Mapping[str, float], joint_attention_kwargs: dict | None) -> tuple[LoraUse, ...] | None:
    """A pipeline's LoRAs at their strengths times diffusers' scale; without a scale, the result is None, which means
    the pipeline's own strengths."""
    if not joint_attention_kwargs:
        return None
    scale = LoraUse("scale", joint_attention_kwargs["scale"]).strength
    return tuple(LoraUse(name, strength * scale) for name, strength in strengths.items())


def generate_noise(generator: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The noise (B, C, h, w) from a torch generator, or from a list of one per image; they advance as in torch."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    if len(generators) == 1:
        return generator_randn(generators[0], shape)
    if len(generators) != shape[0]:
        raise RequestError(
            f"generator must be a single generator, or a list with one per image ({shape[0]} in all), "
            f"got {len(generators)}"
        )
    return np.concatenate([generator_randn(one, (1, *shape[1:])) for one in generators])


def answer_by(
    pipe: Any, callback: Callable[..., Any], names: Sequence[str], sigmas: np.ndarray, inputs: Inputs
) -> Callable[[Step], Change]:
    """callback_on_step_end as a function that answers Steps; names are its tensor inputs.

    sigmas has, for each step, the one that it starts at. The latents are an mx.array (B, 16, h, w), replaced by those
    that the callback returns. As in diffusers, it may set pipe._interrupt to skip the remaining steps.
    """
    embeddings = {"prompt_embeds": inputs.prompt_embeds, "negative_prompt_embeds": inputs.negative_prompt_embeds}
    given = {name: [value] for name, value in embeddings.items() if value is not None}
    if not callable(callback):
        raise RequestError(f"callback_on_step_end must be a function, got {callback!r}")
    unknown = [name for name in names if name != "latents" and name not in given]
    if unknown:
        raise RequestError(
            f"callback_on_step_end_tensor_inputs may only name 'latents' and embeddings passed to the call, got "
            f"{unknown[0]!r}; pipe.encode_prompt makes embeddings"
        )

    def answer(step: Step) -> Change:
        known: dict[str, Any] = {"latents": step.latents.transpose(0, 3, 1, 2), **given}
        shape, scale = known["latents"].shape, pipe._guidance_scale
        timestep = np.float32(sigmas[step.index]) * np.float32(1000)
        changed = callback(pipe, step.index, timestep, {name: known[name] for name in names}) or {}
        if not isinstance(changed, Mapping):
            raise RequestError(
                f"callback_on_step_end must return a dict such as {{'latents': latents}}, or None, got {brief(changed)}"
            )
        others = [name for name in embeddings if name in changed and changed[name] is not given.get(name)]
        if others or pipe._guidance_scale != scale:
            raise RequestError(
                "callback_on_step_end may only change latents; cfg_truncation ends guidance at a given time, and "
                "examples/custom_schedule.py shows how to write your own loop"
            )
        latents = mx.array(check_latents(changed.get("latents", known["latents"]), shape)).transpose(0, 2, 3, 1)
        return Change(latents, stop=pipe._interrupt)

    return answer
