"""In which order blocks and sublayers go, and what the removal of those that are gone costs together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from modhifi.calibration.moments import Moments
from modhifi.calibration.prefix_cache import PrefixCache
from modhifi.calibration.timeline import Timeline
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.budget import Budget
from modhifi.pruning.depth import branches_restored, moments_of_plans, remove_branches, written_without
from modhifi.pruning.elimination import Curve
from modhifi.pruning.output_change import output_change, probe_of
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.depth import removed_parts
from modhifi.structure.groups import Group, Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of

# How many of the sublayers that cost least alone are tried next to those that are gone.
CANDIDATES = 2
# The order goes on until a predicted time or memory is by this share below the target: where measuring shows that the
# prediction is too low, more than it says has to go.
BEYOND = 0.1


@torch.no_grad()
def depth_curves(
    loaded: LoadedModel,
    structure: Structure,
    samples: Samples,
    budget: Budget,
    settings: PruneSettings,
    measured: bool,
    progress: Progress = silent,
) -> dict[str, Curve]:
    """For each group of blocks or sublayers the order in which they go, and what that costs.

    One goes after the other: each time the one of some candidates with which the removal of all together costs least,
    made up for by the writers that stay. Candidates are the neighbours of what is gone and the best of those tried
    alone; and once more the neighbours by themselves, as one long run is made up for better than many short ones. What
    costs less in the end is taken. The cost is the divergence of the output on a few samples, in nats, or, where that
    is not ``measured``, the share of what the branches added that nothing makes up for. A curve ends at the floor, or
    where the group meets the budget by itself, or, of a time or a memory, by a prediction that is lower by ``BEYOND``.
    """
    trials = Trials(loaded, structure, samples, probe_of(structure, samples) if measured else None, settings, progress)
    sizes = sizes_of(loaded.model, structure)
    target = budget.keep * budget.size(sizes, {}) * (1.0 if budget.gauge is None else 1 - BEYOND)

    def enough(group: Group, gone: tuple[int, ...]) -> bool:
        order = {group.name: gone}
        left = budget.ordered(order).size(sizes.ordered(order), {group.name: group.n - len(gone)})
        return left <= target or len(gone) >= group.n - int(settings.floor * group.n)

    curves = {}
    for group in structure.prunable:
        if group.parts:
            gone, costs = trials.one_by_one(group, partial(enough, group))
            curves[group.name] = Curve(torch.tensor(gone), torch.tensor(costs, dtype=torch.float64), 1.0)
    return curves


class Trials:
    """Tries out the removal of blocks and sublayers, on ``probe`` or, without it, on the moments alone.

    Moments that were measured once serve later trials; the model is afterwards as it was.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        structure: Structure,
        samples: Samples,
        probe: Tensor | None,
        settings: PruneSettings,
        progress: Progress,
    ) -> None:
        self.loaded, self.structure, self.samples, self.probe = loaded, structure, samples, probe
        self.settings, self.progress = settings, progress
        self.moments: dict[tuple[str, str], Moments] = {}
        self.timeline = Timeline(loaded.model, lambda: loaded.logits(loaded.example))
        self.dense = None if probe is None else loaded.logits(probe)

    def one_by_one(
        self, group: Group, enough: Callable[[tuple[int, ...]], bool]
    ) -> tuple[tuple[int, ...], list[float]]:
        """The components in the order in which they go, until there are ``enough``, and what all so far cost."""
        alone = self.costs(group, [(number,) for number in range(group.n)])
        best = sorted(alone, key=lambda gone: alone[gone])
        gone, costs = best[0], [0.0, alone[best[0]]]
        while not enough(gone):
            beside = sorted({number + step for number in gone for step in (-1, 1)} & set(range(group.n)) - set(gone))
            others = [number for (number,) in best if number not in gone][:CANDIDATES]
            candidates = beside if group.kind == "blocks" else others
            together = self.costs(group, [(*gone, number) for number in candidates])
            gone = min(together, key=lambda numbers: together[numbers])
            costs.append(max(costs[-1], together[gone]))
        return gone, costs

    def costs(self, group: Group, removals: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """What the removal of some components of a group together does, for each of several such sets."""
        plans = {gone: Plan({group.name: tuple(n for n in range(group.n) if n not in gone)}) for gone in removals}
        self.moments |= moments_of_plans(
            self.loaded, self.structure, plans.values(), self.samples, self.settings, self.progress, self.moments
        )
        model, costs = self.loaded.model, {}
        written = {gone: written_without(self.structure, removed_parts(self.structure, p)) for gone, p in plans.items()}
        cache = PrefixCache(model, self.loaded.logits, self.timeline)
        # In order of execution, as the cache only moves on.
        ordered = sorted(plans, key=lambda gone: self.timeline.begin(written[gone]))
        for number, gone in enumerate(ordered):
            self.progress("probing depth", number, len(ordered))
            if self.probe is not None:
                cache.advance(written[gone])
                cache.fill(0, self.probe)
            with branches_restored(model, self.structure, plans[gone]):
                errors = remove_branches(model, self.structure, plans[gone], self.moments, self.settings)
                if self.probe is not None and self.dense is not None:
                    costs[gone] = output_change(self.dense, cache.run(0, self.probe), self.loaded.gives_values)
                else:
                    costs[gone] = sum(error.relative for error in errors) if errors else float(len(gone))
        self.progress("probing depth", len(ordered), len(ordered))
        return costs
