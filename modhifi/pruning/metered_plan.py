"""A plan that meets a budget of time or memory: made, measured, and made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.metered import Meter, Metered, meet
from modhifi.pruning.planned import Planned
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import make_plan
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan


def metered_plan(
    loaded: LoadedModel,
    structure: Structure,
    curves: Mapping[str, Curve],
    budget: Budget,
    settings: PruneSettings,
    planned: Planned,
    meter: Meter,
) -> tuple[Metered, Budget, Planned]:
    """What measuring came to, the budget that the plan taken last was made for, and that plan.

    ``planned`` is the plan that the prediction alone gives.
    """
    gauge = budget.gauge
    assert gauge is not None

    def plan_at(keep: float) -> Plan:
        if keep == budget.keep:
            return planned.plan
        return make_plan(loaded.model, structure, curves, replace(budget, keep=keep), settings, planned.weights)

    def predicted(plan: Plan) -> float:
        return gauge.of(plan).amount(widths_of(plan)) / gauge.amount({})

    plan, taken, attempts = meet(plan_at, predicted, lambda plan: meter.ratio(loaded, structure, plan), budget.keep)
    before, after = gauge.by_operator({}), gauge.of(plan).by_operator(widths_of(plan))
    operators = {name: (amount, after[name]) for name, amount in before.items()}
    measured = meter.by_operator(loaded, structure, plan)
    metered = Metered(budget.measure, budget.keep, gauge.amount({}), attempts, taken, operators, gauge.rest, measured)
    return metered, replace(budget, keep=taken.predicted), replace(planned, plan=plan)


def widths_of(plan: Plan) -> dict[str, int]:
    """The number of components that a plan keeps of each group."""
    return {name: len(kept) for name, kept in plan.kept.items()}
