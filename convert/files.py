"""Single files in formats other than our own: safetensors and GGUF.

Tensors are unpacked (fp8 with its scales, mflux's quantized matrices), renamed to the diffusers names, split where they
are fused, and checked against the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..models import NETWORKS
from ..quantization import Quantization
from ..untrusted import open_regular
from ..weights.component import Entry, read_header, read_metadata
from ..weights.listing import visible
from ..weights.names import Place, arrange, places, some
from . import comfyui, gguf
from .rows import FLOATING, Packing, SourceComponent, Tensor, packed_rows, stored_rows

PICKLE = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
MFLUX_GROUP = 64  # the only one mflux supports
MFLUX_PARTS = ("scales", "biases")


def open_file(file: Path, configs: Mapping[str, dict]) -> tuple[dict[str, SourceComponent], list[Path]]:
    """The networks in a single file, and all its parts; configs are passed in, as the file has none."""
    _refuse_pickle(file)
    if _start(file).startswith(gguf.MAGIC):
        stored = gguf.read_tensors(file)
        files = sorted({tensor.file for tensor in stored.values()})
        tensors = {name: _gguf_tensor(tensor) for name, tensor in stored.items()}
    else:
        files = [file]
        tensors = stored_weights(read_header(file), [read_metadata(file)], str(file))
    return assemble(tensors, configs, str(file)), files


def refuse_pickles(folder: Path) -> None:
    """Raise if any network in a model folder, or the whole model, has only pickles for weights.

    Pickles next to safetensors are allowed, and never opened.
    """
    for place in (folder, *(folder / name for name in NETWORKS)):
        files = [path for path in visible(place) if path.is_file()]
        if not any(path.suffix == ".safetensors" and not _start(path).startswith(PICKLE) for path in files):
            for file in files:
                _refuse_pickle(file)


def _refuse_pickle(file: Path) -> None:
    if _start(file).startswith(PICKLE):
        raise CheckpointError(
            f"{file} is a Python pickle, which can run code when opened, so it was not opened; download the model as "
            f"safetensors, or save its tensors with safetensors.torch.save_file in an environment you trust"
        )


def _start(file: Path) -> bytes:
    """The first bytes, or none if the file cannot be read, which its reader will report."""
    try:
        with open_regular(file) as stream:
            return stream.read(8)
    except OSError:
        return b""


def _gguf_tensor(stored: gguf.GGUFTensor) -> Tensor:
    def read(start: int, stop: int) -> mx.array:
        return mx.array(gguf.read_floats(stored, start, stop))

    return Tensor(stored.name, stored.shape, stored.nbytes, read)


def stored_weights(entries: dict[str, Entry], metadata: Sequence[Mapping[str, str]], label: str) -> dict[str, Tensor]:
    """The weights among stored tensors, unpacked and with their scales applied; metadata is that of each file."""
    settings = comfyui.declared(entries, metadata, label)
    tensors = {}
    for name, entry in entries.items():
        layer, _, part = name.rpartition(".")
        if part in (*comfyui.PARTS, *comfyui.IGNORED) or (part in MFLUX_PARTS and f"{layer}.scales" in entries):
            continue
        if places(name) == []:
            continue
        beside = {x: entries[f"{layer}.{x}"] for x in ("weight", *comfyui.PARTS) if f"{layer}.{x}" in entries}
        if part == "weight" and (layer in settings or len(beside) > 1):
            tensors[name] = comfyui.dequantized(comfyui.Layer(layer, settings.get(layer, {}), beside, label))
        elif part == "weight" and f"{layer}.scales" in entries:
            tensors[name] = _mflux_tensor(entries, layer, label)
        elif entry.dtype not in FLOATING:
            raise CheckpointError(
                f"{label}: {name} has dtype {entry.dtype}, expected {', '.join(FLOATING)}; download another version"
            )
        else:
            tensors[name] = Tensor(name, entry.shape, entry.nbytes, stored_rows(entry))
    return tensors


def _mflux_tensor(entries: dict[str, Entry], layer: str, label: str) -> Tensor:
    weight, scales = entries[f"{layer}.weight"], entries[f"{layer}.scales"]
    biases = entries.get(f"{layer}.biases")
    width = scales.shape[-1] * MFLUX_GROUP
    bits = weight.shape[-1] * 32 // width if width else 0
    if biases is None or weight.dtype != "U32" or len(weight.shape) != 2:
        raise CheckpointError(
            f"{label}: {layer} is not in mflux's quantized format; convert the original model instead"
        )
    q = Quantization(bits, MFLUX_GROUP)
    shape = (weight.shape[0], width)
    parts = {"weight": weight, "scales": scales, "biases": biases}
    expected = q.packed(f"{layer}.weight", shape)
    if any(entry.shape != expected[f"{layer}.{part}"] for part, entry in parts.items()):
        raise CheckpointError(
            f"{label}: {layer} is not quantized in groups of {MFLUX_GROUP}; convert the original model instead"
        )
    return Tensor(weight.name, shape, sum(entry.nbytes for entry in parts.values()), packed_rows(parts, q))


def assemble(stored: Mapping[str, Tensor], configs: Mapping[str, dict], label: str) -> dict[str, SourceComponent]:
    """Sort stored tensors into networks, with diffusers names and layout; raise if any is unknown or missing."""
    found = {
        network: {name: _cut(stored[own], place, label) for name, (own, place) in held.items()}
        for network, held in arrange(stored, label).items()
    }
    return {name: _check(name, configs[name], found[name], label) for name in NETWORKS if name in found}


def _cut(tensor: Tensor, place: Place, label: str) -> Tensor:
    rows, rest = divmod(tensor.shape[0] if tensor.shape else 0, place.parts)
    if rest:
        raise CheckpointError(
            f"{label}: {tensor.name} of shape {tensor.shape} cannot be split into {place.parts} equal parts"
        )
    first = place.part * rows

    if place.parts == 1:
        return replace(tensor, name=place.name)
    return replace(_rows(tensor, first, rows), name=place.name, nbytes=tensor.nbytes // place.parts)


def _rows(tensor: Tensor, first: int, count: int) -> Tensor:
    """Some rows of a tensor."""

    def read(start: int, stop: int) -> mx.array:
        return tensor.read(first + start, first + stop)

    own = tensor.packing
    packing = own and Packing(own.quantization, lambda start, stop: own.read(first + start, first + stop))
    return replace(tensor, shape=(count, *tensor.shape[1:]), read=read, packing=packing, padded=1)


def _check(name: str, config: dict, found: dict[str, Tensor], label: str) -> SourceComponent:
    architecture = NETWORKS[name].from_dict(config)
    expected = architecture.shapes() | {x: shape for x, shape in architecture.spare().items() if x in found}

    missing = [key for key in expected if key not in found and not architecture.unused(key)]
    extra = [key for key in found if key not in expected]
    shaped = {key: reshaped(found[key], shape) for key, shape in expected.items() if key in found}
    misshapen = [
        f"{key} has shape {found[key].shape}, expected {expected[key]}" for key, tensor in shaped.items() if not tensor
    ]
    total = f" of {len(expected)}"
    for fault, keys, among in (
        ("missing weights", missing, total),
        ("unexpected weights", extra, ""),
        ("weights with the wrong shape", misshapen, total),
    ):
        if keys:
            raise CheckpointError(f"{label}: {fault} in the {name} ({len(keys)}{among}): {some(keys)}")
    tensors = [tensor for tensor in shaped.values() if tensor]
    return SourceComponent(name, config, tensors)


def _dense(tensor: Tensor, shape: tuple[int, ...], read: Callable[[int, int], mx.array]) -> Tensor:
    return Tensor(tensor.name, shape, tensor.nbytes, read)


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor in the given shape, if only axes of length 1 or the padding differ; otherwise None."""
    if tensor.shape == shape:
        return tensor
    if tensor.padded > 1 and tensor.shape == tuple(n + -n % tensor.padded for n in shape):
        return _dense(tensor, shape, lambda start, stop: tensor.read(start, stop)[:, : shape[1]])
    if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
        return None
    if tensor.shape[0] == shape[0]:
        return _dense(tensor, shape, lambda start, stop: tensor.read(start, stop).reshape(-1, *shape[1:]))
    return _dense(tensor, shape, lambda start, stop: tensor.read(0, tensor.shape[0]).reshape(shape)[start:stop])
