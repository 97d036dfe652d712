"""A plan with what led to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modhifi.pruning.settings import PruneSettings
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan


@dataclass(frozen=True)
class Way:
    """How a plan is made: over which groups, in which layout and with which floor."""

    structure: Structure
    settings: PruneSettings


@dataclass(frozen=True)
class Planned:
    """A plan, the weights of the groups' costs behind it (see `allocate`), and what else was tried.

    ``tried`` is the divergence in nats of whole plans. ``ways`` has, where several were tried, the one in which the
    plan was made, and others that may turn out better once a budget of time or memory is measured.
    """

    plan: Plan
    weights: Mapping[str, float] | None = None
    tried: Mapping[str, float] = field(default_factory=dict)
    ways: tuple[Way, ...] = ()

    def predicted(self, plan: Plan) -> float | None:
        """The weighted costs of a plan, all groups together: in nats where the weights were measured.

        None without weights.
        """
        return None if self.weights is None else sum(self.weights[g] * cost for g, cost in plan.removal_cost.items())
