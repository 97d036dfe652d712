"""A plan with what led to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modhifi.structure.plan import Plan


@dataclass(frozen=True)
class Planned:
    """A plan, the weights of the groups' costs behind it (see `allocate`), and what else was tried.

    ``tried`` is the divergence in nats of whole plans.
    """

    plan: Plan
    weights: Mapping[str, float] | None = None
    tried: Mapping[str, float] = field(default_factory=dict)

    def predicted(self, plan: Plan) -> float | None:
        """The weighted costs of a plan, all groups together: in nats where the weights were measured.

        None without weights.
        """
        return None if self.weights is None else sum(self.weights[g] * cost for g, cost in plan.removal_cost.items())
