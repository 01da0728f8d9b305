"""Random weights for an architecture: time and memory do not depend on values, so measuring needs no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..models.layers import pack
from ..models.runner import NetworkConfig, Reading, Tree, Where
from ..quantization import Quantization
from ..scheduler import SchedulerConfig
from ..tokenizer import Tokenizer
from ..variants import TURBO
from .checkpoint import Checkpoint
from .component import Component, with_packing
from .hub import POCKET
from .library import planned_network


class RandomWeights(Component):
    """An untrained network: arrays of the right names and shapes, generated when read."""

    def read(self, prefix: str, dtype: mx.Dtype, without: str = "", stream: Where = None) -> Reading:
        return partial(self._tree, prefix, dtype, without)

    def _tree(self, prefix: str, dtype: mx.Dtype, without: str) -> Tree:
        shapes = self.config.shapes()
        if prefix in shapes:
            return self._weight(prefix, shapes[prefix], dtype)
        start = len(prefix) + 1
        arrays: dict[str, mx.array] = {}
        packed = {}
        for name, shape in shapes.items():
            if not name.startswith(f"{prefix}.") or (without and name.startswith(without, start)):
                continue
            weight, layer = self._weight(name, shape, dtype), name.removesuffix(".weight")
            if q := self.quantizations.get(layer):
                made = pack(name, weight, q)
                packed[layer[start:]] = q
            else:
                made = {name: weight}
            mx.eval(made)  # so that no more than one is unpacked at a time, and none generated again at every use
            arrays |= made
        return tree_unflatten(with_packing({name[start:]: array for name, array in arrays.items()}, packed))

    def read_all(self, prefixes: Sequence[str], dtype: mx.Dtype, without: str = "") -> Iterator[Tree]:
        return (self._tree(prefix, dtype, without) for prefix in prefixes)

    def rows(self, name: str, ids: Sequence[int], dtype: mx.Dtype) -> mx.array:
        return mx.random.normal((len(ids), self.config.shapes()[name][1])).astype(dtype)

    def _weight(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        if len(shape) == 1:
            return mx.ones(shape, dtype)
        return self.config.sanitize(name, (mx.random.normal(shape) * prod(shape[1:]) ** -0.5).astype(dtype))


class RandomModel(Checkpoint):
    """An untrained model. Its prompts are given as ids."""

    def open_tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_file)


def random_model(configs: Mapping[str, NetworkConfig], quantization: Quantization | None) -> RandomModel:
    """A model of this architecture as `convert` would write it, with random weights."""
    networks = {
        name: planned_network(name, vars(config), quantization, RandomWeights) for name, config in configs.items()
    }
    return RandomModel(POCKET, networks, SchedulerConfig(), TURBO, POCKET / "tokenizer" / "tokenizer.json")
