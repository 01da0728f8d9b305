"""A source with LoRAs fused into its weights: differences are added in float32, before anything is rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..models import NETWORKS
from ..request import LoraUse
from ..weights.deltas import Delta
from ..weights.lora import ADAPTED, find_lora, name_of_lora, read_lora
from .rows import SourceComponent, Tensor
from .sources import Source

Loras = Sequence[tuple[str | Path, float]]  # each a file, a PEFT folder, a Hugging Face id or id:file, and its strength


def fuse(source: Source, loras: Loras, partial_match: bool = False) -> Source:
    """The source with LoRAs fused into its weights at these strengths; see `weights.lora.read_lora`."""
    configs = {
        name: NETWORKS[name].from_dict(component.config)
        for name, component in source.components.items()
        if name in ADAPTED
    }
    found = [(find_lora(path), strength) for path, strength in loras]
    read = [(read_lora(path, configs, partial_match), strength) for path, strength in found]
    components = {}
    for name, component in source.components.items():
        deltas = [(lora.deltas.get(name, {}), strength) for lora, strength in read]
        components[name] = _with_differences(component, deltas)
    uses = [LoraUse(name_of_lora(path), float(strength)) for path, strength in found]
    recorded = [replace(use, sha256=lora.sha256) for use, (lora, _) in zip(uses, read, strict=True)]
    return replace(source, components=components, loras=tuple(recorded))


def _with_differences(
    component: SourceComponent, deltas: Sequence[tuple[Mapping[str, Delta], float]]
) -> SourceComponent:
    def fused(tensor: Tensor) -> Tensor:
        own = [(named[tensor.name], strength) for named, strength in deltas if tensor.name in named and strength]
        return replace(tensor, read=_Rows(tensor, own).read, packing=None) if own else tensor

    return replace(component, tensors=[fused(tensor) for tensor in component.tensors])


class _Rows:
    """Reads rows of one tensor with its differences, which are computed once for the whole tensor."""

    def __init__(self, tensor: Tensor, deltas: Sequence[tuple[Delta, float]]):
        self._tensor = tensor
        self._deltas = deltas
        self._whole: mx.array | None = None

    def read(self, start: int, stop: int) -> mx.array:
        height = self._tensor.shape[0]
        if self._whole is None:
            own = self._tensor.read(0, height).astype(mx.float32)
            self._whole = own + sum(strength * delta.difference(own) for delta, strength in self._deltas)
            mx.eval(self._whole)
        rows = self._whole[start:stop]
        if stop == height:
            self._whole = None
        return rows
