"""Random weights for an architecture: time and memory do not depend on values, so measuring needs no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..models.layers import pack
from ..models.runner import NetworkConfig, Reading, Tree, Where
from ..quantization import Quantization
from .checkpoint import with_packing
from .quantize import tensor_quantization


class RandomWeights:
    """The `Weights` of an untrained network: arrays of the right names and shapes, generated when read."""

    def __init__(self, name: str, config: NetworkConfig, quantization: Quantization | None = None):
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = config.shapes()
        chosen = {
            weight: tensor_quantization(name, weight, shape, quantization) for weight, shape in self.shapes.items()
        }
        self.quantizations = {weight.removesuffix(".weight"): q for weight, q in chosen.items() if q}

    def read(self, prefix: str, dtype: mx.Dtype, without: str = "", stream: Where = None) -> Reading:
        return partial(self._tree, prefix, dtype, without)

    def _tree(self, prefix: str, dtype: mx.Dtype, without: str) -> Tree:
        if prefix in self.shapes:
            return self._weight(prefix, dtype)
        start = len(prefix) + 1
        arrays: dict[str, mx.array] = {}
        packed = {}
        for name in self.shapes:
            if not name.startswith(f"{prefix}.") or (without and name.startswith(without, start)):
                continue
            weight, layer = self._weight(name, dtype), name.removesuffix(".weight")
            if q := self.quantizations.get(layer):
                arrays |= pack(name, weight, q)
                packed[layer[start:]] = q
            else:
                arrays[name] = weight
        mx.eval(arrays)  # otherwise the values would be generated again at every use
        return tree_unflatten(with_packing({name[start:]: array for name, array in arrays.items()}, packed))

    def read_all(self, prefixes: Sequence[str], dtype: mx.Dtype, without: str = "") -> Iterator[Tree]:
        return (self._tree(prefix, dtype, without) for prefix in prefixes)

    def rows(self, name: str, ids: Sequence[int], dtype: mx.Dtype) -> mx.array:
        return mx.random.normal((len(ids), self.shapes[name][1])).astype(dtype)

    def _weight(self, name: str, dtype: mx.Dtype) -> mx.array:
        shape = self.shapes[name]
        if len(shape) == 1:
            return mx.ones(shape, dtype)
        return self.config.sanitize(name, (mx.random.normal(shape) * prod(shape[1:]) ** -0.5).astype(dtype))
