"""Training on several machines: each computes the gradients of its own images, and all take the same step.

Their sum is that of one machine which computes them all, apart from the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from ..distributed import Group
from ..errors import RequestError
from .factors import Factors
from .optimizer import AdamW

E = TypeVar("E")
T = TypeVar("T")


@dataclass(frozen=True)
class Machines:
    """The machines that train together; by default only this one. The first one leads, and writes what is kept."""

    group: Group | None = None

    @property
    def leads(self) -> bool:
        return self.group is None or self.group.leads

    def joined(self) -> AbstractContextManager[None]:
        """See `Group.joined`."""
        return nullcontext() if self.group is None else self.group.joined()

    def each(self, events: Iterable[E], patient: bool = True) -> Iterator[E]:
        """See `Group.each`."""
        return iter(events) if self.group is None else self.group.each(events, patient)

    def between(self) -> None:
        """See `Group.between`."""
        if self.group is not None:
            self.group.between()

    def expect(self, seconds: float) -> None:
        """See `Group.expect`."""
        if self.group is not None:
            self.group.expect(seconds)

    def agreed(self, choose: Callable[[Sequence[T]], T], own: T) -> T:
        """What `choose` picks from the values of all machines."""
        if self.group is None:
            return own
        self.group.signal()
        return choose(self.group.exchange(own))

    def check_same(self, shown: Mapping[str, str], **others: Any) -> None:
        """See `Group.check_same`."""
        if self.group is not None:
            self.group.signal()
            self.group.check_same(shown, **others)

    def check_accumulate(self, accumulate: int) -> None:
        if self.group is not None and accumulate < self.group.size:
            raise RequestError(
                f"accumulate must be at least {self.group.size}, one image for each machine, got {accumulate}"
            )

    def own(self, accumulate: int) -> range:
        """The indices of this machine's images in a step: the machines take turns."""
        return range(accumulate) if self.group is None else range(self.group.rank, accumulate, self.group.size)

    def from_first(self, factors: Factors, optimizer: AdamW) -> tuple[Factors, AdamW]:
        """The state from which the first machine continues, on all of them."""
        if self.group is None:
            return factors, optimizer
        step = self.agreed(lambda steps: steps[0], optimizer.step)
        factors, first, second = self.group.all_from_first([factors, optimizer.first, optimizer.second])
        return factors, AdamW(first, second, step)

    def summed(self, gradients: Factors, loss: float) -> tuple[Factors, float]:
        """The sums of all machines' gradients, which are replaced block by block, and of their losses.

        GroupError if a machine was lost meanwhile: MLX's ring may return anything for its gradients.
        """
        if self.group is None:
            return gradients, loss
        for block, own in gradients.items():
            gradients[block] = self.group.summed(own)
        return gradients, sum(self.group.exchange(loss, patient=False))  # which needs every machine
