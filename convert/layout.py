"""What a conversion will write: every array of every file, known before any tensor is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from ..dtypes import SPELLED
from ..machine import mlx_version
from ..quantization import Quantization
from ..version import __version__
from ..weights.manifest import CONVERSION_KEY
from ..weights.names import COMFYUI_PREFIXES, comfyui_name
from ..weights.quantize import tensor_quantization
from .choose import Choice
from .comfyui import WRITTEN, Quantized
from .disk import render_json
from .rows import Tensor
from .shards import PAGE, Shard, Slot, Task, header
from .small import clean_record, without_paths
from .sources import Source

SHARD_BYTES = 512 * 10**6
TARGETS = ("mlx", "diffusers", "comfyui", *(f"comfyui-{form}" for form in WRITTEN))  # values of the option format
ANY = Quantization(8, 32)  # to ask which matrices are quantized at all
STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}

FactorOf = Callable[[str], np.ndarray]  # by weight name, see Task.factor


@dataclass(frozen=True)
class Layout:
    """Everything a conversion writes: shards, and the contents of small files. single means one file, no folder."""

    shards: list[Shard]
    files: dict[str, bytes] = field(default_factory=dict)
    single: bool = False

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def lay_out_folder(
    source: Source,
    dtype: str,
    choose: Choice,
    form: str,
    small: dict[str, bytes],
    search: bool = False,
    factor_of: FactorOf | None = None,
) -> Layout:
    """A folder in one of two formats (form is "mlx" or "diffusers"), with its small files copied; see Task for search.

    factor_of gives the factor for each quantized weight of the transformer.
    """
    shards, files = [], dict(small)
    for component in source.components.values():
        factors = factor_of if component.name == "transformer" else None
        tasks = [
            _task(component.name, tensor, dtype, choose(component.name, tensor), search, factors)
            for tensor in component.tensors
        ]
        stem = "model" if form == "mlx" else STEMS[component.name]
        own = _shards(tasks, f"{component.name}/{stem}", form)
        shards += own
        if form == "mlx" or len(own) > 1:
            files[f"{component.name}/{stem}.safetensors.index.json"] = render_json(_index(own, component.parameters))
        files[f"{component.name}/config.json"] = render_json(_written_config(component.config, dtype, tasks))
    return Layout(shards, files)


def lay_out_comfyui(source: Source, dtype: str, name: str, conversion: dict, form: str | None = None) -> Layout:
    """A single file with all three networks, with ComfyUI's names; large matrices in fp8 or int8 if form says so.

    Its metadata contains the conversion, since there is no folder for a conversion.json.
    """
    tasks: list[Task] = []
    for component in source.components.values():
        stacked: dict[str, list[Tensor]] = {}
        for tensor in component.tensors:
            stacked.setdefault(comfyui_name(component.name, tensor.name), []).append(tensor)
        for own, tensors in stacked.items():
            stored = COMFYUI_PREFIXES[component.name] + own
            if form and all(tensor_quantization(component.name, t.name, t.shape, ANY) for t in tensors):
                tasks.append(Quantized.of(component.name, tensors, stored, form))
                continue
            first, *rest = (tensor.shape for tensor in tensors)
            shape = (first[0] + sum(other[0] for other in rest), *first[1:])
            if component.name == "vae" and ".mid.attn_1." in own and len(shape) == 2:
                shape = (*shape, 1, 1)  # convolutions in LDM
            slot = Slot(stored, SPELLED[dtype], shape)
            tasks.append(Task(component.name, tuple(tensors), (slot,)))
    return Layout([Shard(name, tasks, "pt", {CONVERSION_KEY: json.dumps(conversion)})], single=True)


def _task(
    component: str, tensor: Tensor, dtype: str, q: Quantization | None, search: bool, factor_of: FactorOf | None
) -> Task:
    spelled = SPELLED[dtype]
    if q is None:
        return Task(component, (tensor,), (Slot(tensor.name, spelled, tensor.shape),))
    weight, *helpers = q.packed(tensor.name, tensor.shape).items()
    helper_dtype = spelled if q.mode == "affine" else "U8"
    slots = (Slot(weight[0], "U32", weight[1]), *(Slot(name, helper_dtype, shape) for name, shape in helpers))
    factor = partial(factor_of, tensor.name) if factor_of else None
    return Task(component, (tensor,), slots, q, search, factor)


def _shards(tasks: Sequence[Task], stem: str, form: str) -> list[Shard]:
    """The tasks grouped into files of at most SHARD_BYTES, unless a single task is larger."""
    groups: list[list[Task]] = [[]]
    size = 0
    for task in tasks:
        if size and size + task.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(task)
        size += task.nbytes
    if form == "mlx":
        # Safetensors allows no gaps, so tensors that fill whole pages come first, and each begins on a page: all dense
        # matrices, and those of the feed-forwards in 4 and 8 bits. The rest is not aligned.
        groups = [sorted(group, key=lambda task: task.nbytes % PAGE > 0) for group in groups]
    if form == "diffusers" and len(groups) == 1:
        return [Shard(f"{stem}.safetensors", groups[0], "pt")]
    name = f"{stem}-{{:05}}-of-{len(groups):05}.safetensors"
    return [Shard(name.format(i), group, "mlx" if form == "mlx" else "pt") for i, group in enumerate(groups, 1)]


def _index(shards: Sequence[Shard], parameters: int) -> dict:
    """The content of an index file, as mlx-lm writes it, and as mlx-vlm does if all quantized layers are alike."""
    weight_map = {slot.name: shard.name.rpartition("/")[2] for shard in shards for slot in shard.slots}
    metadata: dict[str, int | str] = {
        "total_size": sum(shard.nbytes for shard in shards),
        "total_parameters": parameters,
    }
    packed = {task.quantization for shard in shards for task in shard.tasks if task.quantization}
    if len(packed) == 1:
        (q,) = packed
        metadata |= {"quantization_mode": q.mode, "quantization_level": str(q.bits)}
        metadata |= {"quantization_group_size": str(q.group_size)}
        # Not with convolutions: this would declare that they have MLX's layout, but they are stored as in diffusers.
        if not any(len(slot.shape) == 4 for shard in shards for slot in shard.slots):
            metadata["mlx_vlm_format"] = "z_image"
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _written_config(source_config: dict, dtype: str, tasks: Sequence[Task]) -> dict:
    """The source's config.json with the dtype that is written, and mlx-lm's quantization block under both its keys.

    The block contains what most quantized layers share, and the other layers by name.
    """
    changed = without_paths({k: value for k, value in source_config.items() if not k.startswith("quantization")})
    for key in ("dtype", "torch_dtype"):
        if key in changed:
            changed[key] = dtype
    packed = {task.tensors[0].name.removesuffix(".weight"): task.quantization for task in tasks if task.quantization}
    if packed:
        usual, _ = Counter(packed.values()).most_common(1)[0]
        block = usual.to_dict() | {layer: q.to_dict() for layer, q in packed.items() if q != usual}
        changed["quantization"] = changed["quantization_config"] = block
    return changed


def describe_conversion(source: Source, dtype: str, quantization: dict) -> dict:
    """The content of conversion.json; `before` is the source's own, if it has one."""
    conversion = {
        "converter": f"mlx-zimage {__version__}",
        "source": source.origin,
        "dtype": dtype,
        "quantization": quantization,
    }
    if source.loras:
        conversion["loras"] = [asdict(use) for use in source.loras]
    parts = {"parts": source.parts} if source.parts else {}
    return clean_record(conversion | parts | ({"before": source.conversion} if source.conversion else {}))


def describe_job(source: Source, layout: Layout) -> dict:
    """What identifies a conversion: the source's files and everything that will be written."""
    headers = hashlib.sha256()
    for shard in layout.shards:
        headers.update(header(shard))
    stats = [(str(path.resolve()), path.stat()) for path in source.weights]
    return {
        "mlx": mlx_version(),
        "source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "loras": [asdict(use) for use in source.loras],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in layout.files.items()},
        "layout": headers.hexdigest(),
    }
