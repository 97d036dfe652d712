"""How much each group gives to meet a budget. Pure: curves, sizes and a budget in, widths out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from modhifi.errors import ModhifiError, OutOfReach
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.layouts import LAYOUTS
from modhifi.pruning.layouts.base import EXACT, Problem, Rounding, least_width
from modhifi.structure.groups import Group, Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import Sizes


def allocate(
    groups: tuple[Group, ...],
    curves: Mapping[str, Curve],
    sizes: Sizes,
    budget: Budget,
    *,
    layout: str = "global",
    floor: float = 0.1,
    rounding: Rounding = EXACT,
    weights: Mapping[str, float] | None = None,
) -> Plan:
    """Choose every group's width by a layout, so that the budget is met.

    ``floor`` is the least share of a group that stays, ``weights`` by group multiply the curves' costs (1 over the
    readers' output energy without them). A KV cache shrinks by whole KV groups: heads alone give, and the step nearest
    to the budget is taken, as it is of a time or a memory, which fall by stairs, and where whole blocks or
    sublayers alone go. Where ``rounding`` may be less, it is halved until the budget is met. Raises
    :class:`ModhifiError` for an unknown layout, and where floors and rounding leave the budget out of
    reach by over 2 %.
    """
    while True:
        try:
            return _allocated(groups, curves, sizes, budget, layout, floor, rounding, weights)
        except ModhifiError:
            finer = rounding.half()
            if finer is None:
                raise
            rounding = finer


def _allocated(
    groups: tuple[Group, ...],
    curves: Mapping[str, Curve],
    sizes: Sizes,
    budget: Budget,
    layout: str,
    floor: float,
    rounding: Rounding,
    weights: Mapping[str, float] | None,
) -> Plan:
    """The plan at one rounding; raises what :func:`allocate` raises."""
    if budget.measure == "cache":
        groups = tuple(g for g in groups if g.name in sizes.cached)
        if not groups:
            raise ModhifiError(
                "no attention head that has keys and values of its own in the KV cache may go here, so that stays "
                "(latent attention keeps one latent for all heads); `modhifi check` says what may go"
            )
    lowest = {g.name: max(least_width(g, floor, rounding), g.n - len(curves[g.name].order)) for g in groups}
    problem = Problem(groups, curves, sizes, budget, lowest, rounding, weights)
    keep, measure = budget.keep, budget.label
    reach = problem.size(lowest) / problem.dense
    if reach > keep * 1.02:
        advice = "more groups (--only, --exclude)" if rounding.to == 1 else "widths rounded less (--round-to 1)"
        raise OutOfReach(
            f"no allocation keeps only {keep:.3g}x of the {measure}: with every prunable group ({len(groups)}) at its "
            f"least width {reach:.3g}x remains; try {budget.option(reach)}, a lower --floor, or {advice}"
        )
    widths = LAYOUTS[layout].widths(problem)
    reached = problem.size(widths) / problem.dense
    by_steps = budget.measure in ("cache", "latency", "memory") or all(g.parts for g in groups)
    if abs(reached / keep - 1) > 0.02 and not by_steps:
        raise OutOfReach(
            f"the nearest to {keep:.3g}x of the {measure} that the allowed widths of {len(groups)} groups give is "
            f"{reached:.3g}x; try {budget.option(reached)}"
            + (", or widths rounded less (--round-to 1)" if rounding.to > 1 else "")
        )
    return plan_for(groups, curves, widths)


def plan_for(groups: tuple[Group, ...], curves: Mapping[str, Curve], widths: Mapping[str, int]) -> Plan:
    """The plan that removes each group's cheapest components down to a width.

    Groups inside blocks and sublayers that go stay as they are.
    """
    kept, cost = {}, {}
    parts = [
        group.parts[component]
        for group in groups
        if group.parts
        for component in curves[group.name].order[: group.n - widths[group.name]].tolist()
    ]
    left = {group.name for group in Structure(groups).without(parts).groups}
    for group in groups:
        if group.name not in left:
            continue
        removed = group.n - widths[group.name]
        if removed:
            order = curves[group.name].order.numpy()
            kept[group.name] = tuple(np.setdiff1d(np.arange(group.n), order[:removed]).tolist())
            cost[group.name] = curves[group.name].costs[removed]
    return Plan(kept, cost)
