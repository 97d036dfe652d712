"""The ``uniform`` layout: every group keeps the same share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from modhifi.pruning.layouts.base import LAYOUTS, Layout, Problem


def uniform(problem: Problem) -> dict[str, int]:
    """Widths by group: the same share of every group, by bisection.

    Heads keep at least that share, as their steps are large. Where the nearest share misses the budget by over 2 %,
    neurons make up for heads and blocks, and then some channel groups give one step more than others.
    """

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
        coarse = [g.name for g in problem.groups if g.kind not in ("channels", "neurons")]
        settled = [pair for start in (fewer, widths) for pair in around({name: start[name] for name in coarse})]
        best = min((best, *settled), key=miss)
    for group in problem.groups if miss(best) > 0.02 else ():
        if group.kind == "channels":  # a transformer's blocks must stay alike: its stock configuration has one width
            widths = {**widths, group.name: fewer[group.name]}
            best = min(best, widths, key=miss)
    return best


LAYOUTS.register(Layout("uniform", "every group keeps the same share", "", uniform, False))
