"""A pipeline on several machines: that of rank 0 sends each request, with its inputs, to the others, which follow.

With as many requests as machines, each machine runs one of them, and rank 0 receives the images. How machines share a
single request is in `distributed.py` and the networks.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import numpy as np

from .clock import Clock, Cost
from .distributed import Group
from .errors import RequestError
from .failures import explained
from .inputs import Inputs
from .machine import comparable_rate, mlx_version
from .models.transformer import TransformerConfig
from .networks import Networks, Phase
from .porting import dtype_name
from .request import GenerateRequest
from .sampling import Change, Step
from .version import __version__
from .weights.checkpoint import Checkpoint, fingerprint

if TYPE_CHECKING:
    from .turns import Turns

E = TypeVar("E")
Work = tuple[GenerateRequest, Inputs]


class GroupMethods:
    """A pipeline's methods for several machines."""

    networks: Networks
    turns: Turns

    if TYPE_CHECKING:

        @property
        def group(self) -> Group | None: ...

        def _completed(self, work: Work) -> Work: ...

        def _attempts(
            self, request: GenerateRequest, inputs: Inputs, decode: bool
        ) -> Generator[Any, Change | None, None]: ...

    def follow(self) -> None:
        """On every rank but the first of a group: compute this machine's share of rank 0's images, until it ends.

        Raises GroupError if another machine is lost, and any error that this machine alone has.
        """
        group = self.group
        if group is None or group.leads:
            raise RequestError("follow() is for the other ranks of a group; rank 0 generates images")
        with explained():
            while given := group.receive():
                self.follow_one(given)

    def follow_one(self, given: Mapping[str, np.ndarray]) -> None:
        """`follow` for one image, or one for each machine, that the group has received."""
        assert self.group is not None
        decode, works = bool(given["decode"]), from_arrays(given)
        with self.networks.guarded(), self.group.following():
            if len(works) > 1:
                self._follow_apart(self._completed(works[self.group.rank]))
                return
            for _ in self.turns.take(self._attempts(*self._completed(works[0]), decode)):
                pass

    def _follow_apart(self, work: Work) -> None:
        """Generate a whole image, while the other machines generate theirs, and send it to rank 0."""
        assert self.group is not None
        clock, units, costs = Clock(), [], []
        with self.networks.alone():
            for event in self.turns.take(self.group.abreast(self._attempts(*work, decode=True))):
                if isinstance(event, (Phase, Step)):
                    clock(event)
                else:
                    units.append(event.unit)
                    costs.append(asdict(clock.cost(event.plan)))
        self.group.send_in_turn({"units": np.stack(units), "costs": np.array(json.dumps(costs))})

    def _apart(self, work: Work) -> Generator[Any, Change | None, list[list[tuple[np.ndarray, Cost]]]]:
        """The events of a request, while the others run one each; returns the images of each, with their costs."""
        assert self.group is not None
        with self.networks.alone():
            yield from self.group.abreast(self._attempts(*work, decode=True))
        received = self.group.send_in_turn({})
        costs = [[Cost(**cost) for cost in json.loads(str(arrays["costs"]))] for arrays in received]
        return [list(zip(arrays["units"], own, strict=True)) for arrays, own in zip(received, costs, strict=True)]

    def _led(
        self, works: Sequence[Work], events: Generator[E, Change | None, None], decode: bool = True
    ) -> Generator[E, Change | None, None]:
        """The events of a request that the other machines follow, or of one for each machine."""
        assert self.group is not None
        if not self.group.leads:
            raise RequestError("only rank 0 of a group generates images; call follow() on the others")
        with explained(), self.group.leading({"decode": np.array(decode), **to_arrays(works)}):
            yield from events

    def close(self) -> None:
        """On rank 0 of a group: end `follow` on the others. Elsewhere, nothing."""
        if self.group is not None and self.group.leads:
            with explained():
                self.group.end()


def to_arrays(works: Sequence[Work]) -> dict[str, np.ndarray]:
    """Requests with their inputs as named arrays, for `from_arrays` on another machine."""
    arrays: dict[str, np.ndarray] = {}
    for i, (request, inputs) in enumerate(works):
        own = {"request": np.array(json.dumps(request.to_dict())), **inputs.to_arrays()}
        arrays |= {f"{i}/{name}": array for name, array in own.items()}
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> list[Work]:
    """The requests in named arrays; whatever else the arrays hold is left out."""
    each: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        i, slash, own = name.partition("/")
        if slash:
            each.setdefault(i, {})[own] = array
    requests = [GenerateRequest.from_dict(json.loads(str(own.pop("request")))) for own in each.values()]
    return [(request, Inputs.from_arrays(own)) for request, own in zip(requests, each.values(), strict=True)]


def join(group: Group, checkpoint: Checkpoint, dtype: mx.Dtype) -> None:
    """Check that the machines of a group have the same model, versions, dtype and given speeds, and have them share
    rows by speed. RequestError for float16, GroupError if something differs.
    """
    if dtype == mx.float16:
        raise RequestError("a group of machines cannot compute in float16; choose bfloat16")
    shown = {"version of mlx-zimage": __version__, "version of MLX": mlx_version(), "dtype": dtype_name(dtype)}
    speeds = {"list of speeds": group.speeds if group.settled else None}
    group.check_same(shown, model=fingerprint(checkpoint), **speeds)
    share_rows(group, checkpoint.transformer.config, dtype)


def share_rows(group: Group, config: TransformerConfig, dtype: mx.Dtype) -> None:
    """Have the machines of a group share rows by how fast each multiplies matrices of this transformer's widths."""
    group.share_by(lambda: comparable_rate(dtype, config.dim, config.ffn_dim))
