"""What a weighting is: how the costs of different groups are made comparable, and the plan that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.settings import PruneSettings
from modhifi.registry import Registry
from modhifi.structure.groups import Structure
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


class Planner(Protocol):
    """The plan that meets a budget in a layout that reads costs.

    Raises what :func:`modhifi.pruning.allocation.allocate` raises.
    """

    def __call__(
        self,
        loaded: LoadedModel,
        structure: Structure,
        curves: Mapping[str, Curve],
        moments: Mapping[str, Moments],
        samples: Samples,
        budget: Budget,
        settings: PruneSettings,
        progress: Progress,
    ) -> Planned: ...


@dataclass(frozen=True)
class Weighting:
    """A named rule for the weight of each group's error.

    ``trial`` is the share of a group's components whose loss the plan tries out, so that curves can bring the weights
    for it; None where it tries none.
    """

    name: str
    summary: str
    source: str
    plan: Planner
    trial: float | None = None


WEIGHTINGS: Registry[Weighting] = Registry("weighting")
