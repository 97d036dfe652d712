"""Meeting a budget of time or memory: a plan's prediction is corrected by measuring the networks that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.layouts.base import Rounding
from modhifi.structure.gauge import Gauge
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan

# How far, relative to it, a measured amount may be from the one asked for, and how often the prediction is corrected.
TOLERANCE = 0.05
CORRECTIONS = 3


class Meter(Protocol):
    """Measures a model and smaller versions of it on the run's own device."""

    def gauge(self, loaded: LoadedModel, structure: Structure, rounding: Rounding) -> Gauge:
        """The model's time or memory as a function of the groups' widths."""
        ...

    def ratio(self, loaded: LoadedModel, structure: Structure, plan: Plan) -> tuple[float, float]:
        """What the network that a plan leaves takes over what the model takes, and the spread of that ratio."""
        ...

    def by_operator(self, loaded: LoadedModel, structure: Structure, plan: Plan) -> Mapping[str, tuple[float, float]]:
        """What every operator takes in the model and in what a plan leaves of it; empty where that is not known."""
        ...


@dataclass(frozen=True)
class Attempt:
    """One plan that was measured: the predicted and the measured share of the dense model's amount, and its spread."""

    predicted: float
    measured: float
    spread: float


@dataclass(frozen=True)
class Metered:
    """What a budget of time or memory came to: the share asked for, the attempts, and the one taken last.

    ``measure`` is ``latency`` or ``memory``, ``dense`` the predicted seconds or bytes of the model. ``operators`` has
    the predicted ones of every operator, dense and pruned, empty for a memory, ``rest`` those that no width changes,
    and ``by_operator`` the measured ones, where the meter tells them.
    """

    measure: str
    keep: float
    dense: float
    attempts: tuple[Attempt, ...]
    taken: Attempt
    operators: Mapping[str, tuple[float, float]]
    rest: float
    by_operator: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether what was measured is within the tolerance of what was asked for."""
        return abs(self.taken.measured / self.keep - 1) <= TOLERANCE


def meet(
    plan_at: Callable[[float], Plan],
    predicted: Callable[[Plan], float],
    measured: Callable[[Plan], tuple[float, float]],
    keep: float,
) -> tuple[Plan, Attempt, tuple[Attempt, ...]]:
    """The plan whose measured amount is nearest to the share ``keep``, its attempt, and all attempts in their order.

    ``plan_at`` makes a plan of a predicted share of the dense amount. After each one it is asked again for a share
    that is larger or smaller by as much as the measured time missed, at most three times, and until the plan stays the
    same. Raises what ``plan_at`` raises where even the first share cannot be predicted.
    """
    asked = keep
    tried: list[tuple[float, Plan, Attempt]] = []
    while True:
        try:
            plan = plan_at(asked)
        except ModhifiError:
            if not tried:
                raise
            break
        if tried and plan.kept == tried[-1][1].kept:
            break
        attempt = Attempt(predicted(plan), *measured(plan))
        tried.append((abs(attempt.measured / keep - 1), plan, attempt))
        if tried[-1][0] <= TOLERANCE or len(tried) > CORRECTIONS:
            break
        asked = attempt.predicted * keep / attempt.measured
        if not 0 < asked < 1:
            break
    _, best, taken = min(tried, key=lambda entry: entry[0])
    return best, taken, tuple(attempt for *_, attempt in tried)
