"""The converter: from a checkpoint to a folder of MLX weights, one tensor at a time.

Every tensor keeps its diffusers name and layout. It is read a few rows at a time, cast to the target dtype, quantized
if the recipe says so, and written; so a conversion needs 80 MB on top of Python, whatever the size of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from ..dtypes import FLOATS, ITEM_BYTES, SPELLED
from ..errors import RequestError
from ..sizes import size
from ..weights.controlnets import is_controlnet
from ..weights.library import smaller_parts
from ..weights.manifest import CONVERSION
from .choose import QuantizationSettings, Recipe, quantizations
from .disk import render_json
from .fuse import Loras, fuse
from .layout import TARGETS, Layout, describe_conversion, describe_job, lay_out_comfyui, lay_out_folder
from .sources import Source, open_controlnet_source, open_source
from .writer import OutputFolder, check_absent, check_outside

__all__ = ["Progress", "convert", "convert_steps"]


@dataclass(frozen=True)
class Progress:
    """A tensor has been converted: done_bytes of the source's total_bytes are done."""

    component: str
    name: str
    done_bytes: int
    total_bytes: int


def convert(source: str | Path, dest: str | Path, **options) -> Path:
    """Convert the model at source to the folder dest and return its path. Options as for `convert_steps`."""
    for _ in convert_steps(source, dest, **options):
        pass
    return Path(dest).expanduser()


def convert_steps(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: str = "bfloat16",
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    text_encoder_bits: int | None = None,
    transformer_bits: int | None = None,
    transformer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
    variant: str | None = None,
    format: str = "mlx",
    recipe: str | Recipe = "uniform",
    target_size: int | str | None = None,
    search: bool = False,
    calibrate: bool = False,
    memory: str | int | None = None,
    loras: Loras = (),
    partial: bool = False,
) -> Iterator[Progress]:
    """Convert the model at source to the folder dest, which must not exist, yielding Progress after each tensor.

    source is a Hugging Face id, "z-image-turbo" (the official model as a smaller download), "pocket", a folder from
    diffusers, mflux, mlx-vlm or this package, or a safetensors or GGUF file. transformer, text_encoder, vae and
    tokenizer replace or add parts; base provides what is still missing: see sources.open_source. variant, such as
    "fp16", selects among the source's files; by default those without a variant are read.

    dtype ("bfloat16", "float32", "float16") is the dtype of every tensor that is not quantized. The matrices of the
    attention and feed-forward layers are quantized if bits or a mode other than "affine" is given: 2, 3, 4, 5, 6 or 8
    bits in groups of 32, 64 (the default) or 128 for "affine"; "mxfp4", "mxfp8" and "nvfp4" allow one choice each.
    text_encoder_bits and transformer_bits override bits for that network; 0 or 16 leaves it dense.

    recipe "mixed" gives the more sensitive of the transformer's quantized matrices more bits than the rest; a function
    of component, name and shape returns each tensor's quantization.Quantization, or None to leave it dense. target_size
    ("3.2GB", or bytes) chooses the best bits for each layer within that size, which excludes tokenizer and configs.

    search fits the scales of "affine" by least squares, which is slower but more accurate. calibrate does this too, and
    first generates a few images with the source, a model folder or id, to record the inputs of each matrix of the
    transformer; the matrices are then quantized to preserve the products with those inputs. For the real model this
    takes many times as long, and needs a few gigabytes beyond the budget `memory` (see ZImagePipeline.from_pretrained).

    A source may be a ControlNet, too: the folder then contains only it, quantized as a transformer would be.

    loras, pairs of a LoRA (a file, a PEFT folder, a Hugging Face id or id:file) and its strength, are added to the
    weights before they are rounded or quantized. Each of their keys must match a layer, unless partial is True.

    format "mlx" is a folder for this package. "diffusers" is a diffusers folder and "comfyui" a single safetensors file
    with all three networks; neither takes MLX's quantization. "comfyui-fp8" and "comfyui-int8" write the large matrices
    as ComfyUI quantizes them: int8 rotated (ConvRot), with a scale per row.

    The folder appears under its name only when complete. Leaving the loop stops the work and removes what was written,
    and so does any failure; after a kill or a crash, the same call resumes from the finished shards. SHA256SUMS in the
    folder lists the checksum of every other file. Options and sources are checked by the call itself, before the loop.
    """
    if dtype not in FLOATS:
        raise RequestError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    if format not in TARGETS:
        raise RequestError(f"format must be one of {', '.join(TARGETS)}, got {format!r}")
    settings = quantizations(bits, group_size, mode, text_encoder_bits, transformer_bits, recipe, target_size)
    if (search or calibrate) and not settings.is_affine:
        name = "calibrate" if calibrate else "search"
        raise RequestError(f"{name} needs mode affine, with bits or a target size")
    if format != "mlx" and settings.quantizes:
        raise RequestError(f"format {format} cannot hold MLX's quantized weights; leave out the quantization options")
    dest = Path(dest).expanduser()
    check_absent(dest)  # before anything is downloaded
    if is_controlnet(source):
        whole = (transformer, text_encoder, vae, tokenizer, base, variant)
        if format != "mlx" or calibrate or loras or any(option is not None for option in whole):
            raise RequestError(
                f"{source} is a ControlNet, which can only be converted on its own and to MLX; use only dtype and the "
                f"options for quantization"
            )
        return _convert_controlnet(source, dest, dtype, settings, search)
    source, transformer = smaller_parts(source, transformer)
    replaced = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
    opened = open_source(source, **replaced, base=base, variant=variant)
    others = [Path(other).expanduser() for other in (*replaced.values(), base) if other is not None]
    for folder in filter(Path.is_dir, (opened.at, *others)):
        check_outside(dest, folder)
    if calibrate and (loras or base is not None):
        raise RequestError(
            "calibrate cannot be combined with LoRAs or base; convert with those first, without quantizing, and then "
            "calibrate the result"
        )
    if loras:
        opened = fuse(opened, loras, partial)
    factor_of = None
    if calibrate:
        from .calibrate import Calibration  # imported only if needed: it loads everything that generates images

        parts = {name: other for name, other in replaced.items() if name != "tokenizer"}
        factor_of = Calibration(source, memory, variant, parts).factor
    extra = {"search": search or calibrate} | ({"calibrated": True} if calibrate else {})
    conversion = describe_conversion(opened, dtype, settings.to_dict() | extra)
    if format.startswith("comfyui"):
        layout = lay_out_comfyui(opened, dtype, dest.name, conversion, format.partition("-")[2] or None)
    else:
        small = opened.files | {CONVERSION: render_json(conversion)}
        choice = settings.choice(opened, dtype) if format == "mlx" else lambda component, tensor: None
        layout = lay_out_folder(opened, dtype, choice, format, small, search or calibrate, factor_of)
    _warn_of_waste(opened, layout, settings, dtype)
    return _write(opened, layout, dest, dtype)


def _convert_controlnet(
    source: str | Path, dest: Path, dtype: str, settings: QuantizationSettings, search: bool
) -> Iterator[Progress]:
    """Convert a ControlNet to a folder that contains only it, quantized like a transformer."""
    opened = open_controlnet_source(source)
    if opened.at.is_dir():
        check_outside(dest, opened.at)
    own = settings.networks.get("transformer")
    kept = ("controlnet",) if "transformer" in settings.kept else ()
    settings = replace(settings, networks={"controlnet": own}, kept=kept)
    conversion = describe_conversion(opened, dtype, settings.to_dict() | {"search": search})
    small = {CONVERSION: render_json(conversion)}
    layout = lay_out_folder(opened, dtype, settings.choice(opened, dtype), "mlx", small, search)
    _warn_of_waste(opened, layout, settings, dtype)
    return _write(opened, layout, dest, dtype)


class Wasteful(UserWarning):
    """An option of a conversion changes nothing, or makes the result larger without better images."""


def _warn_of_waste(source: Source, layout: Layout, settings: QuantizationSettings, dtype: str) -> None:
    if not settings.quantizes:
        return
    weights = sum(prod(tensor.shape) for component in source.components.values() for tensor in component.tensors)
    dense = weights * ITEM_BYTES[SPELLED[dtype]]
    if settings.target is not None and settings.target >= dense:
        warnings.warn(
            f"the target size changes nothing: without quantization the model takes {size(dense)}",
            Wasteful,
            stacklevel=3,
        )
    elif layout.nbytes > 1.02 * source.nbytes:  # as much as headers and small files may take
        warnings.warn(
            f"{source.origin} takes {size(source.nbytes)} and the result would take {size(layout.nbytes)}, but "
            f"precision that the source lost in its own quantization cannot be recovered; choose fewer bits, or "
            f"convert the original",
            Wasteful,
            stacklevel=3,
        )


def _write(source: Source, layout: Layout, dest: Path, dtype: str) -> Iterator[Progress]:
    done, total = 0, source.nbytes
    with OutputFolder(dest, describe_job(source, layout), layout.nbytes, layout.single) as folder:
        for shard in layout.shards:
            for task in folder.write_shard(shard, dtype):
                done += sum(tensor.nbytes for tensor in task.tensors)
                yield Progress(task.component, task.tensors[0].name, done, total)
        for name, content in layout.files.items():
            folder.write(name, content)
