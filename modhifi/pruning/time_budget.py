"""A plan that meets a budget of time: made, timed, and made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.planned import Planned
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import make_plan
from modhifi.pruning.timed import NetworkTimer, Timed, meet
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan


def timed_plan(
    loaded: LoadedModel,
    structure: Structure,
    curves: Mapping[str, Curve],
    budget: Budget,
    settings: PruneSettings,
    planned: Planned,
    timer: NetworkTimer,
) -> tuple[Timed, Budget, Planned]:
    """What timing came to, the budget that the plan taken last was made for, and that plan.

    ``planned`` is the plan that the prediction alone gives.
    """
    times = budget.times
    assert times is not None

    def plan_at(keep: float) -> Plan:
        if keep == budget.keep:
            return planned.plan
        return make_plan(loaded.model, structure, curves, replace(budget, keep=keep), settings, planned.weights)

    def predicted(plan: Plan) -> float:
        return times.of(plan).seconds(widths_of(plan)) / times.seconds({})

    plan, taken, attempts = meet(plan_at, predicted, lambda plan: timer.ratio(loaded, structure, plan), budget.keep)
    before, after = times.by_operator({}), times.of(plan).by_operator(widths_of(plan))
    operators = {name: (seconds, after[name]) for name, seconds in before.items()}
    timed = Timed(budget.keep, times.seconds({}), attempts, taken, operators, times.fixed)
    return timed, replace(budget, keep=taken.predicted), replace(planned, plan=plan)


def widths_of(plan: Plan) -> dict[str, int]:
    """The number of components that a plan keeps of each group."""
    return {name: len(kept) for name, kept in plan.kept.items()}
