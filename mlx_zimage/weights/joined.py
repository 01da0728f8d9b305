"""Weights of several networks as those of one, so that their blocks can take turns: a transformer's and its
ControlNets'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx

from ..models.runner import NetworkConfig, Reading, Tree, Weights, Where
from ..quantization import Quantization


class Joined:
    """A network's weights, under their own names, and those of others, each under its prefix and a dot."""

    def __init__(self, own: Weights, others: Mapping[str, Weights]):
        self.own = own
        self.others = others

    @property
    def config(self) -> NetworkConfig:
        return self.own.config

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            **self.own.shapes,
            **{f"{prefix}.{name}": x for prefix, one in self.others.items() for name, x in one.shapes.items()},
        }

    @property
    def quantizations(self) -> dict[str, Quantization]:
        return {
            **self.own.quantizations,
            **{f"{prefix}.{name}": q for prefix, one in self.others.items() for name, q in one.quantizations.items()},
        }

    def read(self, prefix: str, dtype: mx.Dtype, without: str = "", stream: Where = None) -> Reading:
        weights, name = self._of(prefix)
        return weights.read(name, dtype, without, stream)

    def read_all(self, prefixes: Sequence[str], dtype: mx.Dtype, without: str = "") -> Iterator[Tree]:
        start = 0
        while start < len(prefixes):  # one network after another, in the order given
            weights, _ = self._of(prefixes[start])
            end = next((i for i in range(start, len(prefixes)) if self._of(prefixes[i])[0] is not weights), None)
            names = [self._of(prefix)[1] for prefix in prefixes[start:end]]
            yield from weights.read_all(names, dtype, without)
            start += len(names)

    def rows(self, name: str, ids: Sequence[int], dtype: mx.Dtype) -> mx.array:
        weights, own = self._of(name)
        return weights.rows(own, ids, dtype)

    def _of(self, name: str) -> tuple[Weights, str]:
        """The weights that a name is among, and its name there."""
        for prefix, weights in self.others.items():
            if name.startswith(f"{prefix}."):
                return weights, name[len(prefix) + 1 :]
        return self.own, name
