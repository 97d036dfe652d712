"""How much each group gives to meet a budget. Pure: curves, sizes and a budget in, widths out."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from modhifi.errors import ModhifiError
from modhifi.pruning.elimination import Curve
from modhifi.structure.groups import Group
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import Sizes


@dataclass(frozen=True)
class Budget:
    """``measure`` is ``components``, ``parameters``, ``macs`` or ``cache``; ``keep`` the share of the dense model's."""

    measure: str
    keep: float

    @classmethod
    def parse(
        cls,
        ratio: float | None = None,
        params: str | None = None,
        flops: str | None = None,
        kv_cache: str | None = None,
    ) -> Budget:
        """From the options of the command line; exactly one must be given.

        ``ratio`` is the share of components removed, in (0, 1); the others are shares kept, ``"0.5x"``.
        """
        given = [("ratio", ratio), ("params", params), ("flops", flops), ("kv-cache", kv_cache)]
        chosen = [(name, value) for name, value in given if value is not None]
        if len(chosen) != 1:
            raise ModhifiError("give exactly one of --ratio, --params, --flops and --kv-cache, such as --flops 0.5x")
        name, value = chosen[0]
        if name == "ratio":
            share = float(value)
            if not 0 < share < 1:
                raise ModhifiError(f"--ratio is the share of components removed, above 0 and below 1, not {value}")
            return cls("components", 1 - share)
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x?\s*", str(value))
        if not match or not 0 < float(match.group(1)) < 1:
            raise ModhifiError(f"--{name} is the share of the model kept, above 0x and below 1x, not {value!r}")
        return cls({"params": "parameters", "flops": "macs", "kv-cache": "cache"}[name], float(match.group(1)))

    def fit(self, kind: str) -> None:
        """Raises ModhifiError where a model of this kind (as in `LoadedModel.kind`) has nothing of the measure."""
        if self.measure == "cache" and kind != "text":
            raise ModhifiError("only a causal language model keeps a KV cache; give --ratio, --params or --flops")

    def size(self, sizes: Sizes, widths: Mapping[str, int]) -> float:
        measures: dict[str, Callable[[Mapping[str, int]], float]] = {
            "components": sizes.components,
            "parameters": sizes.parameters,
            "macs": sizes.macs,
            "cache": sizes.cache,
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
    ``uniform``: every group keeps the same share, heads at least that share, whose steps are large; where the nearest
    share misses the budget by over 2 %, some channel groups give one step more than others. A KV cache shrinks by whole
    KV groups: heads alone give, and the step nearest to the budget is taken. Raises :class:`ModhifiError` where
    floors and rounding leave the budget out of reach.
    """
    if budget.measure == "cache":
        groups = tuple(g for g in groups if g.name in sizes.cached)
        if not groups:
            raise ModhifiError("no attention head may go here, so the KV cache stays; `modhifi check` says why")
    if layout not in _LAYOUTS:
        raise ModhifiError(f"unknown layout '{layout}'; choose global or uniform")
    lowest = {g.name: max(least_width(g, floor, round_to), g.n - len(curves[g.name].order)) for g in groups}
    problem = _Problem(groups, curves, sizes, budget, lowest, round_to, weights)
    what, keep = _NAMES[budget.measure], budget.keep
    reach = problem.size(lowest) / problem.dense
    if reach > keep * 1.02:
        advice = "lower the floor, or prune more groups" if round_to == 1 else "round less, or lower the floor"
        raise ModhifiError(
            f"no allocation keeps only {keep:.3g}x of the {what}: with every prunable group at its least width "
            f"{reach:.3g}x remains; ask for more, {advice}"
        )
    widths = _LAYOUTS[layout](problem)
    reached = problem.size(widths) / problem.dense
    if abs(reached / keep - 1) > 0.02 and budget.measure != "cache":
        raise ModhifiError(
            f"the nearest to {keep:.3g}x of the {what} that the allowed widths give is {reached:.3g}x; ask for that, "
            f"or round less"
        )
    return plan_for(groups, curves, widths)


_NAMES = {"components": "components", "parameters": "parameters", "macs": "FLOPs", "cache": "KV cache"}


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


@dataclass(frozen=True)
class _Problem:
    """What an allocation has to solve; ``lowest`` is the least width of every group."""

    groups: tuple[Group, ...]
    curves: Mapping[str, Curve]
    sizes: Sizes
    budget: Budget
    lowest: Mapping[str, int]
    round_to: int
    weights: Mapping[str, float] | None

    def size(self, widths: Mapping[str, int]) -> float:
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
        return step_of(group, self.round_to)

    def price(self, group: Group, here: int, width: int) -> float:
        """Weighted cost of going from one width to a smaller one."""
        curve = self.curves[group.name]
        weight = 1.0 / max(curve.energy, 1e-300) if self.weights is None else self.weights[group.name]
        return float(curve.cost[group.n - width] - curve.cost[group.n - here]) * weight


def _greedy(problem: _Problem) -> dict[str, int]:
    widths, target = problem.full, problem.target
    total = problem.size(widths)
    touching = problem.sizes.touching() if problem.budget.measure in ("parameters", "macs") else {}
    by_name = {g.name: g for g in problem.groups}

    def proposal(name: str) -> tuple[float, int] | None:
        """Price per unit saved and next width of a group's best next cut, looking ahead for a convex price."""
        group, here, step = by_name[name], widths[name], problem.step(by_name[name])
        local = touching.get(name, problem.sizes)
        before = problem.budget.size(local, widths)
        least = max(1, math.ceil(group.n / (64 * step))) * step
        first = here - (here % step or step)
        best: tuple[float, int] | None = None
        for ahead in (1, 2, 4, 8):
            width = first - max(0, ahead * least - step)
            width = max(width - width % step, problem.lowest[name])
            saved = before - problem.budget.size(local, {**widths, name: width})
            if width >= here or saved <= 0:
                continue
            rate = problem.price(group, here, width) / saved
            if best is None or rate < best[0] * (1 - 1e-9):
                best = (rate, width)
        return best

    heap = [(found[0], name) for name in widths if (found := proposal(name)) is not None]
    heapq.heapify(heap)
    while total > target and heap:
        _, name = heapq.heappop(heap)
        fresh = proposal(name)  # earlier cuts of neighbours have changed what this one saves
        if fresh is None:
            continue
        if heap and fresh[0] > heap[0][0] * (1 + 1e-9):
            heapq.heappush(heap, (fresh[0], name))
            continue
        after = problem.size({**widths, name: fresh[1]})
        if after < target:
            choices = [widths[name], *range(fresh[1], widths[name], problem.step(by_name[name]))]
            sizes = {width: problem.size({**widths, name: width}) for width in choices}
            widths[name] = min(choices, key=lambda width, sizes=sizes: abs(sizes[width] - target))  # type: ignore[misc]
            break
        widths[name], total = fresh[1], after
        following = proposal(name)
        if following is not None:
            heapq.heappush(heap, (following[0], name))
    return _settle(problem, widths)


def _settle(problem: _Problem, widths: dict[str, int]) -> dict[str, int]:
    """Move single groups by single steps while that brings the size nearer to a target missed by over 0.5 %."""
    target = problem.target
    miss = abs(problem.size(widths) - target)
    for _ in range(8):
        if miss <= 0.005 * target:
            break
        best = (miss, "", 0)
        for group in problem.groups:
            here, step = widths[group.name], problem.step(group)
            for width in (here // step * step + step, -(-here // step) * step - step):
                width = min(width, group.n)
                if width >= problem.lowest[group.name]:
                    gap = abs(problem.size({**widths, group.name: width}) - target)
                    best = min(best, (gap, group.name, width))
        if best[0] >= miss:
            break
        miss = best[0]
        widths = {**widths, best[1]: best[2]}
    return widths


def _uniform(problem: _Problem) -> dict[str, int]:
    def at(share: float, fixed: Mapping[str, int]) -> dict[str, int]:
        widths = {}
        for group in problem.groups:
            step = problem.step(group)
            steps = share * group.n / step
            # one head too many is made up for by a few neurons; one too few can be a third of a layer's
            width = (math.ceil(steps - 1e-9) if group.kind == "heads" else round(steps)) * step
            widths[group.name] = fixed.get(group.name, min(group.n, max(problem.lowest[group.name], width)))
        return widths

    def around(fixed: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if problem.size(at(middle, fixed)) < problem.target else (low, middle)
        return at(low, fixed), at(high, fixed)

    def miss(widths: dict[str, int]) -> float:
        return abs(problem.size(widths) / problem.target - 1)

    fewer, widths = around({})
    best = min((fewer, widths), key=miss)
    if miss(best) > 0.02:  # heads are few, and come in large steps: let the others make up for that
        heads = [g.name for g in problem.groups if g.kind == "heads"]
        settled = [pair for start in (fewer, widths) for pair in around({name: start[name] for name in heads})]
        best = min((best, *settled), key=miss)
    for group in problem.groups if miss(best) > 0.02 else ():
        if group.kind == "channels":  # a transformer's blocks must stay alike: its stock configuration has one width
            widths = {**widths, group.name: fewer[group.name]}
            best = min(best, widths, key=miss)
    return best


_LAYOUTS: dict[str, Callable[[_Problem], dict[str, int]]] = {"global": _greedy, "uniform": _uniform}
