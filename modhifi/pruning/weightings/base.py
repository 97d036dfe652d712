"""What a weighting is: how the costs of different groups are made comparable, and the plan that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.planned import Planned
from modhifi.pruning.settings import PruneSettings
from modhifi.registry import Registry
from modhifi.structure.groups import Structure


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
