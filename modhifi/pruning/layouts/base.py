"""What a layout solves, and what it is. Pure: curves, sizes and a budget in, widths out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.registry import Registry
from modhifi.structure.groups import Group
from modhifi.structure.sizes import Sizes


@dataclass(frozen=True)
class Rounding:
    """Kept widths are multiples of ``to``; where ``less`` is set, of less in groups narrower than twice of it.

    A head is many channels wide already: heads are not rounded, and neither are blocks.
    """

    to: int = 1
    less: bool = False

    def step(self, group: Group) -> int:
        """The widths of a group are multiples of this: the rounding and one component for every part of it."""
        to = self.to if group.kind in ("channels", "neurons", "ranks") else 1
        while self.less and 2 * to > group.n and to > 1:
            to //= 2
        return math.lcm(to, group.step)

    def half(self) -> Rounding | None:
        """The next finer one, where there is one and it may be taken."""
        return Rounding(self.to // 2, True) if self.less and self.to > 1 else None


EXACT = Rounding()


def least_width(group: Group, floor: float, rounding: Rounding) -> int:
    """The fewest components a group may keep: the floor's share, rounded up to what :meth:`Rounding.step` allows."""
    if group.parts:  # of a list of blocks the first one always stays
        return int(floor * group.n)
    step = rounding.step(group)
    return min(group.n, max(step, math.ceil(floor * group.n / step) * step))


@dataclass(frozen=True)
class Problem:
    """What an allocation has to solve.

    ``curves`` and, where groups are weighted, ``weights`` go by group, as does ``lowest``, the least widths;
    ``rounding`` says what widths are multiples of.
    """

    groups: tuple[Group, ...]
    curves: Mapping[str, Curve]
    sizes: Sizes
    budget: Budget
    lowest: Mapping[str, int]
    rounding: Rounding
    weights: Mapping[str, float] | None

    def size(self, widths: Mapping[str, int]) -> float:
        """The model's size at these widths, in the budget's measure."""
        return self.budget.size(self.sizes, widths)

    @property
    def full(self) -> dict[str, int]:
        return {g.name: g.n for g in self.groups}

    @property
    def dense(self) -> float:
        return self.size(self.full)

    @property
    def target(self) -> float:
        return self.budget.keep * self.dense

    def step(self, group: Group) -> int:
        """Widths of this group are multiples of it."""
        return self.rounding.step(group)

    def price(self, group: Group, here: int, width: int) -> float:
        """Weighted cost of going from one width to a smaller one.

        The weight is the group's measured amplification, or 1 over its readers' output energy where none is given.
        """
        curve = self.curves[group.name]
        weight = 1.0 / max(curve.energy, 1e-300) if self.weights is None else self.weights[group.name]
        return (curve.costs[group.n - width] - curve.costs[group.n - here]) * weight


@dataclass(frozen=True)
class Layout:
    """A named rule that chooses every group's width; ``reads_costs`` says whether the curves decide, or sizes alone."""

    name: str
    summary: str
    source: str
    widths: Callable[[Problem], dict[str, int]]
    reads_costs: bool


LAYOUTS: Registry[Layout] = Registry("layout")
