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


def least_width(group: Group, floor: float, round_to: int) -> int:
    """The fewest components a group may keep: the floor's share, rounded up to what :func:`step_of` allows."""
    step = step_of(group, round_to)
    return min(group.n, max(step, math.ceil(floor * group.n / step) * step))


def step_of(group: Group, round_to: int) -> int:
    """Kept widths are multiples of this: the user's rounding and one component for every part of the partition."""
    return math.lcm(round_to, group.step)


@dataclass(frozen=True)
class Problem:
    """What an allocation has to solve.

    ``curves`` and, where groups are weighted, ``weights`` go by group, as does ``lowest``, the least widths;
    ``round_to`` is the user's rounding of widths.
    """

    groups: tuple[Group, ...]
    curves: Mapping[str, Curve]
    sizes: Sizes
    budget: Budget
    lowest: Mapping[str, int]
    round_to: int
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
        return step_of(group, self.round_to)

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
