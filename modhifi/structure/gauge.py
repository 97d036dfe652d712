"""What tells a model's size in one measure for any widths of its groups: its time, or the memory that a pass takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from modhifi.structure.plan import Plan


class Gauge(Protocol):
    """A size that is measured, as a function of the groups' widths; groups that are not named are dense."""

    @property
    def at_once(self) -> int:
        """The size falls by stairs of this many channels, 1 where it does not."""
        ...

    @property
    def rest(self) -> float:
        """What belongs to no operator."""
        ...

    def amount(self, widths: Mapping[str, int]) -> float:
        """The size, in seconds or bytes."""
        ...

    def by_operator(self, widths: Mapping[str, int]) -> dict[str, float]:
        """The size of every operator where it is a sum over them, else empty."""
        ...

    def touching(self) -> Mapping[str, Gauge]:
        """For each group what changes with its width: what a greedy step needs to look at."""
        ...

    def ordered(self, removed: Mapping[str, Sequence[int]]) -> Gauge:
        """With blocks and sublayers that go in this order; see `structure.sizes.Depth.ordered`."""
        ...

    def of(self, plan: Plan) -> Gauge:
        """With the blocks and sublayers that a plan removes as the first to go."""
        ...
