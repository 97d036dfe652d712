"""The ``global`` layout: over all groups, what costs least per unit saved goes next."""

from __future__ import annotations

import heapq
import math

from modhifi.pruning.layouts.base import LAYOUTS, Layout, Problem
from modhifi.structure.groups import Group

# How far a step looks ahead: in 64ths of a group, and in stairs, by which times fall.
AHEAD, STAIRS = (1, 2, 4, 8), 32


def greedy(problem: Problem) -> dict[str, int]:
    """Widths by group: one step after the other is taken where the weighted cost per unit saved is least.

    A step looks ahead, as a block of components may cost no more than one; the last one is cut to the budget.
    """
    widths, target = problem.full, problem.target
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
    return _settle(problem, widths)


def _next_widths(problem: Problem, group: Group, here: int) -> list[int]:
    """The widths that a group's next cut may lead to, none below its least one."""
    step, lowest = problem.step(group), problem.lowest[group.name]
    if problem.budget.times is not None:
        # a head is many channels wide, and a block many layers
        stair = step if group.kind not in ("channels", "neurons") else math.lcm(step, problem.budget.times.at_once)
        edges = [*range((here - 1) // stair * stair, 0, -stair)[:STAIRS], stair // 2, lowest]
        return [width for width in edges if lowest <= width and (width % step == 0 or width == lowest)]
    least = max(1, math.ceil(group.n / (64 * step))) * step
    next_width = here - (here % step or step)
    ahead = [next_width - max(0, steps * least - step) for steps in AHEAD]
    return [max(width, lowest) for width in ahead]


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
