"""A plan that meets a budget of time or memory: made, measured, and made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.metered import TOLERANCE, Attempt, Meter, Metered, meet
from modhifi.pruning.planned import Planned, Way
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
    choose: Callable[[Mapping[str, Plan]], tuple[str, object]] | None = None,
) -> tuple[Metered, Budget, Planned]:
    """What measuring came to, the budget that the plan taken last was made for, and that plan.

    ``planned`` is the plan that the prediction alone gives. Where it can be made in several ways, each of them meets
    the budget, and ``choose`` takes one by name.
    """
    gauge = budget.gauge
    assert gauge is not None

    def plan_at(way: Way, keep: float) -> Plan:
        return make_plan(loaded.model, way.structure, curves, replace(budget, keep=keep), way.settings, planned.weights)

    def predicted(plan: Plan) -> float:
        return gauge.of(plan).amount(widths_of(plan)) / gauge.amount({})

    def measured(plan: Plan) -> tuple[float, float]:
        return meter.ratio(loaded, structure, plan)

    met: dict[str, tuple[Way, Plan, Attempt, tuple[Attempt, ...]]] = {}
    for way in planned.ways[: None if choose else 1] or (Way(structure, settings),):
        try:
            met[str(len(met))] = (way, *meet(partial(plan_at, way), predicted, measured, budget.keep))
        except ModhifiError:  # widths alone cannot meet every budget
            if not met:
                raise
    name = "0"
    if choose and len(met) > 1:
        missed = {name: abs(taken.measured / budget.keep - 1) for name, (_, _, taken, _) in met.items()}
        near = [name for name in met if missed[name] <= max(TOLERANCE, min(missed.values()))]
        name, _ = choose({name: met[name][1] for name in near})
    way, plan, taken, attempts = met[name]
    before, after = gauge.by_operator({}), gauge.of(plan).by_operator(widths_of(plan))
    operators = {name: (amount, after[name]) for name, amount in before.items()}
    times = meter.by_operator(loaded, structure, plan)
    metered = Metered(budget.measure, budget.keep, gauge.amount({}), attempts, taken, operators, gauge.rest, times)
    return metered, replace(budget, keep=taken.predicted), replace(planned, plan=plan, ways=(way,))


def widths_of(plan: Plan) -> dict[str, int]:
    """The number of components that a plan keeps of each group."""
    return {name: len(kept) for name, kept in plan.kept.items()}
