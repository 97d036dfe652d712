"""The ``global`` layout: over all groups, what costs least per unit saved goes next."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

import numpy as np

from modhifi.pruning.layouts.base import LAYOUTS, Layout, Problem
from modhifi.structure.footprint import Footprint
from modhifi.structure.groups import Group

# How far a step looks ahead: in 64ths of a group, and in stairs, by which times fall.
AHEAD, STAIRS = (1, 2, 4, 8), 32
# A point of the way on which results shrink, from which weights may go on, lies this share of them behind the last one.
POINTS = 12


def greedy(problem: Problem) -> dict[str, int]:
    """Widths by group: what costs least per unit saved goes first."""
    gauge = problem.budget.gauge
    return _for_memory(problem, gauge) if isinstance(gauge, Footprint) else _settle(problem, _descend(problem))


def _descend(problem: Problem, start: Mapping[str, int] | None = None) -> dict[str, int]:
    """Widths by group: one step after the other is taken where the weighted cost per unit saved is least.

    A step looks ahead, as a block of components may cost no more than one; the last one is cut to the budget.
    ``start`` are the widths to begin at, the dense ones if none are given.
    """
    widths, target = dict(start or problem.full), problem.target
    total = problem.size(widths)
    touching = problem.budget.touching(problem.sizes)
    by_name = {g.name: g for g in problem.groups}

    def proposal(name: str) -> tuple[float, int] | None:
        """Price per unit saved and next width of a group's best next cut, looking ahead for a convex price."""
        group, here = by_name[name], widths[name]
        size = touching.get(name, problem.size)
        before = size(widths)
        best: tuple[float, int] | None = None
        for width in _next_widths(problem, group, here):
            saved = before - size({**widths, name: width})
            if width >= here or saved <= 0:
                continue
            rate = problem.price(group, here, width) / saved
            if best is None or rate < best[0] * (1 - 1e-9):
                best = (rate, width)
        return best

    heap = [(first[0], name) for name in widths if (first := proposal(name)) is not None]
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
    return widths


def _next_widths(problem: Problem, group: Group, here: int) -> list[int]:
    """The widths that a group's next cut may lead to, none below its least one."""
    step, lowest = problem.step(group), problem.lowest[group.name]
    gauge = problem.budget.gauge
    if gauge is not None and gauge.at_once > 1:
        # a head is many channels wide, and a block many layers
        stair = step if group.kind not in ("channels", "neurons") else math.lcm(step, gauge.at_once)
        edges = [*range((here - 1) // stair * stair, 0, -stair)[:STAIRS], stair // 2, lowest]
        return [width for width in edges if lowest <= width and (width % step == 0 or width == lowest)]
    least = max(1, math.ceil(group.n / (64 * step))) * step
    next_width = here - (here % step or step)
    ahead = [next_width - max(0, steps * least - step) for steps in AHEAD]
    return [max(width, lowest) for width in ahead]


def _for_memory(problem: Problem, footprint: Footprint) -> dict[str, int]:
    """The cheapest widths that meet a budget of memory.

    Results shrink where they are most, and only if all that is as full shrinks: a descent by single steps would never
    begin. So the fullest instant is brought down step by step, and from several points of that way, the first of which
    is the dense model, the descent goes on, by the bytes of weights that it saves.
    """
    points, held = [problem.full], float(footprint.held({}).max())
    widths = problem.full
    while (lower := _fullest_lowered(problem, footprint, widths)) is not None and problem.size(widths) > problem.target:
        widths, now = lower, float(footprint.held(lower).max())
        if held - now >= held / POINTS or problem.size(widths) <= problem.target:
            points, held = [*points, widths], now
    ways = [_descend(problem, point) for point in points]
    met = [way for way in ways if problem.size(way) <= 1.02 * problem.target]
    if not met:
        return min(ways, key=problem.size)
    return min(met, key=lambda way: sum(problem.price(g, g.n, way[g.name]) for g in problem.groups))


def _fullest_lowered(problem: Problem, footprint: Footprint, widths: Mapping[str, int]) -> dict[str, int] | None:
    """The widths after the cheapest cut, by the bytes that it saves there, at the fullest instant; None without one."""
    held = footprint.held(widths)
    instant, most = footprint.seen(np.array([held.argmax()])), float(held.max())
    best: tuple[float, str, int] | None = None
    for group in problem.groups:
        here = widths[group.name]
        for width in _next_widths(problem, group, here):
            saved = most - float(instant.held({**widths, group.name: width})[0])
            if width >= here or saved <= 0:
                continue
            rate = problem.price(group, here, width) / saved
            if best is None or rate < best[0]:
                best = (rate, group.name, width)
    return None if best is None else {**widths, best[1]: best[2]}


def _settle(problem: Problem, widths: dict[str, int]) -> dict[str, int]:
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


LAYOUTS.register(Layout("global", "over all groups, what costs least per unit saved goes next", "ours", greedy, True))
