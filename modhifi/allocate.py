"""How much each group gives to meet a budget. Pure: curves, sizes and a budget in, widths out."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .errors import ModhifiError
from .groups import Group
from .plan import Plan
from .selection import Curve
from .sizes import Sizes


@dataclass(frozen=True)
class Budget:
    """``measure`` is ``components``, ``parameters`` or ``macs``; ``keep`` the share of the dense model's to keep."""

    measure: str
    keep: float

    @classmethod
    def parse(cls, ratio: float | None = None, params: str | None = None, flops: str | None = None) -> Budget:
        """From the options of the command line; exactly one must be given.

        ``ratio`` is the share of components removed, in (0, 1); ``params`` and ``flops`` are shares kept, ``"0.5x"``.
        """
        given = [("ratio", ratio), ("params", params), ("flops", flops)]
        chosen = [(name, value) for name, value in given if value is not None]
        if len(chosen) != 1:
            raise ModhifiError("give exactly one of --ratio, --params and --flops, for example --flops 0.5x")
        name, value = chosen[0]
        if name == "ratio":
            share = float(value)  # type: ignore[arg-type]
            if not 0 < share < 1:
                raise ModhifiError(f"--ratio is the share of components removed, between 0 and 1 (exclusive), not {value}")
            return cls("components", 1 - share)
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x?\s*", str(value))
        if not match or not 0 < float(match.group(1)) < 1:
            raise ModhifiError(f"--{name} is the share of the model kept, between 0x and 1x (exclusive), such as 0.5x, not {value!r}")
        return cls("parameters" if name == "params" else "macs", float(match.group(1)))

    def size(self, sizes: Sizes, widths: Mapping[str, int]) -> float:
        measures: dict[str, Callable[[Mapping[str, int]], float]] = {
            "components": sizes.components, "parameters": sizes.parameters, "macs": sizes.macs,
        }
        return measures[self.measure](widths)


def least_width(group: Group, floor: float, round_to: int) -> int:
    """The fewest components a group may keep: the floor's share, rounded up to what :func:`step_of` allows."""
    step = step_of(group, round_to)
    return min(group.n, max(step, math.ceil(floor * group.n / step) * step))


def step_of(group: Group, round_to: int) -> int:
    """Kept widths are multiples of this: the user's rounding and one component for every part of the partition."""
    return math.lcm(round_to, group.step) if round_to > 1 else group.step


def allocate(
    groups: tuple[Group, ...],
    curves: Mapping[str, Curve],
    sizes: Sizes,
    budget: Budget,
    *,
    layout: str = "global",
    floor: float = 0.1,
    round_to: int = 1,
    weights: Mapping[str, float] | None = None,
) -> Plan:
    """Choose every group's width so that the budget is met.

    ``global``: remove, one step after the other, what costs least per unit saved, the cost being the curve's squared
    local error times the group's weight (its measured amplification; 1 over the readers' output energy without one).
    ``uniform``: every group keeps the same share. Raises :class:`ModhifiError` where floors and rounding leave the
    budget out of reach.
    """
    dense = {g.name: g.n for g in groups}
    target = budget.keep * budget.size(sizes, dense)
    lowest = {g.name: least_width(g, floor, round_to) for g in groups}
    lowest = {g.name: max(lowest[g.name], g.n - len(curves[g.name].order)) for g in groups}
    reach = budget.size(sizes, lowest) / budget.size(sizes, dense)
    if reach > budget.keep * 1.02:
        raise ModhifiError(
            f"no allocation keeps only {budget.keep:.3g}x of the {_NAMES[budget.measure]}: with every prunable group at its "
            f"least width {reach:.3g}x remains; ask for more, lower the floor, or prune more groups"
        )
    choose = {"global": _greedy, "uniform": _uniform}
    if layout not in choose:
        raise ModhifiError(f"unknown layout '{layout}'; choose global or uniform")
    widths = choose[layout](groups, curves, sizes, budget, target, lowest, round_to, weights)
    if layout == "global":
        widths = _settle(groups, sizes, budget, target, lowest, round_to, widths)
    reached = budget.size(sizes, widths) / budget.size(sizes, dense)
    if abs(reached / budget.keep - 1) > 0.02:
        raise ModhifiError(
            f"the nearest to {budget.keep:.3g}x of the {_NAMES[budget.measure]} that the allowed widths give is {reached:.3g}x; "
            f"ask for that, or round less"
        )
    return plan_for(groups, curves, widths)


_NAMES = {"components": "components", "parameters": "parameters", "macs": "FLOPs"}


def plan_for(groups: tuple[Group, ...], curves: Mapping[str, Curve], widths: Mapping[str, int]) -> Plan:
    """The plan that removes each group's cheapest components down to a width."""
    kept, cost = {}, {}
    for group in groups:
        removed = group.n - widths[group.name]
        if removed:
            stay = torch.ones(group.n, dtype=torch.bool)
            stay[curves[group.name].order[:removed]] = False
            kept[group.name] = tuple(torch.nonzero(stay).flatten().tolist())
            cost[group.name] = float(curves[group.name].cost[removed])
    return Plan(kept, cost)


def _greedy(groups, curves, sizes, budget, target, lowest, round_to, weights) -> dict[str, int]:  # type: ignore[no-untyped-def]
    widths = {g.name: g.n for g in groups}
    total = budget.size(sizes, widths)
    touching = sizes.touching() if budget.measure != "components" else {}
    by_name = {g.name: g for g in groups}

    def proposal(name: str) -> tuple[float, int, float] | None:
        """Price, next width and saving of a group's best next cut, looking ahead for a convex price."""
        group, curve = by_name[name], curves[name]
        step = step_of(group, round_to)
        here = widths[name]
        weight = weights[name] if weights is not None else 1.0 / max(curve.energy, 1e-300)
        least = max(1, math.ceil(group.n / (64 * step))) * step
        first = here - (here % step or step)
        best: tuple[float, int, float] | None = None
        for ahead in (1, 2, 4, 8):
            width = first - (ahead * least - step) if ahead * least > step else first
            width -= width % step
            if width < lowest[name]:
                width = lowest[name]
            if width >= here:
                continue
            local = touching.get(name, sizes)
            saved = budget.size(local, widths) - budget.size(local, {**widths, name: width})
            if saved <= 0:
                continue
            cost = float(curve.cost[group.n - width] - curve.cost[group.n - here]) * weight
            if best is None or cost / saved < best[0] * (1 - 1e-9):
                best = (cost / saved, width, saved)
        return best

    heap = [(p[0], name, p[1]) for name in widths if (p := proposal(name)) is not None]
    heapq.heapify(heap)
    while total > target and heap:
        _, name, width = heapq.heappop(heap)
        fresh = proposal(name)
        if fresh is None:
            continue
        if heap and fresh[0] > heap[0][0] * (1 + 1e-9):
            heapq.heappush(heap, (fresh[0], name, fresh[1]))
            continue
        old = widths[name]
        widths[name] = fresh[1]
        now = budget.size(sizes, widths)
        if now < target:
            widths[name] = _closest(by_name[name], old, fresh[1], round_to, lambda w, n=name: abs(budget.size(sizes, {**widths, n: w}) - target))  # type: ignore[misc]
            break
        total = now
        following = proposal(name)
        if following is not None:
            heapq.heappush(heap, (following[0], name, following[1]))
    return widths


def _settle(groups, sizes, budget, target, lowest, round_to, widths) -> dict[str, int]:  # type: ignore[no-untyped-def]
    """Move single groups by single steps while that brings the size nearer to a target missed by over 0.5 %."""
    miss = abs(budget.size(sizes, widths) - target)
    for _ in range(8):
        if miss <= 0.005 * target:
            break
        best = (miss, "", 0)
        for group in groups:
            step = step_of(group, round_to)
            for width in (widths[group.name] // step * step + step, -(-widths[group.name] // step) * step - step):
                width = min(width, group.n)
                if width >= lowest[group.name]:
                    gap = abs(budget.size(sizes, {**widths, group.name: width}) - target)
                    best = min(best, (gap, group.name, width))
        if best[0] >= miss:
            break
        miss = best[0]
        widths = {**widths, best[1]: best[2]}
    return widths


def _closest(group: Group, high: int, low: int, round_to: int, miss: Callable[[int], float]) -> int:
    step = step_of(group, round_to)
    return min([high, *range(low, high, step)], key=miss)


def _uniform(groups, curves, sizes, budget, target, lowest, round_to, weights) -> dict[str, int]:  # type: ignore[no-untyped-def]
    def at(share: float) -> dict[str, int]:
        widths = {}
        for group in groups:
            step = step_of(group, round_to)
            width = round(share * group.n / step) * step
            widths[group.name] = min(group.n, max(lowest[group.name], width))
        return widths

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.size(sizes, at(middle)) < target else (low, middle)
    return min((at(low), at(high)), key=lambda w: abs(budget.size(sizes, w) - target))
