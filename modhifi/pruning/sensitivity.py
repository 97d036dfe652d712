"""What a cut does to the whole model's output, tried out on a few samples: of single groups, and of whole plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from modhifi.calibration.moments import Moments
from modhifi.calibration.prefix_cache import PrefixCache
from modhifi.calibration.timeline import Timeline
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import trial_size
from modhifi.pruning.depth import SpanMoments, branches_restored, moments_of_plans, remove_branches, restored
from modhifi.pruning.editing import compensated, store, write_compensated
from modhifi.pruning.elimination import Curve, Trial
from modhifi.pruning.output_change import output_change, probe_of
from modhifi.pruning.planned import Planned, Way
from modhifi.pruning.sequential import written_modules
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import make_plan
from modhifi.structure.groups import Group, Structure
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import removed_positions

# the share of a group's components whose loss shows its effect on the output
TRIAL = 0.3
# The way to plan that removes no blocks.
WIDTHS_ALONE = "widths alone"


def probed_plan(
    loaded: LoadedModel,
    structure: Structure,
    curves: Mapping[str, Curve],
    moments: Mapping[str, Moments],
    samples: Samples,
    budget: Budget,
    settings: PruneSettings,
    progress: Progress = silent,
) -> Planned:
    """Widths by every group's measured effect on the output, and the divergence of each plan that was tried as a whole.

    Effects of single groups do not add up where much goes. So other ways (:func:`ways_to_plan`) are tried as well, and
    the best on the probing samples is taken. Raises what `allocate` raises.
    """
    probe = probe_of(structure, samples)
    weights = amplification(loaded, structure, curves, moments, settings, probe, progress=progress)
    weights |= {group.name: 1.0 for group in structure.prunable if group.parts}  # whose costs are measured themselves
    plan = make_plan(loaded.model, structure, curves, budget, settings, weights)
    ways = ways_to_plan(loaded, structure, settings, plan)
    if len(ways) == 1:
        return Planned(plan, weights)
    plans = plans_between(loaded, ways, curves, budget, weights)
    best, tried = least_change(loaded, structure, plans, moments, samples, settings, progress)
    others = [way for name, way in ways.items() if name == WIDTHS_ALONE and best != WIDTHS_ALONE]
    return Planned(plans[best], weights, tried, (ways[best], *others))


def ways_to_plan(loaded: LoadedModel, structure: Structure, settings: PruneSettings, allocated: Plan) -> dict[str, Way]:
    """The ways worth trying beside the one in which a plan was ``allocated``, which comes first.

    For language models, whose blocks are alike: equal widths, and a floor in between. Where blocks or sublayers may go
    beside widths: widths alone.
    """
    ways = {f"allocated, floor {settings.floor:.2g}": Way(structure, settings)}
    if loaded.kind in ("text", "encoder"):
        shares = [len(allocated.kept.get(g.name, range(g.n))) / g.n for g in structure.prunable]
        middle = (settings.floor + sum(shares) / len(shares)) / 2
        ways[f"allocated, floor {middle:.2g}"] = Way(structure, replace(settings, floor=middle))
        ways["uniform"] = Way(structure, replace(settings, layout="uniform"))
    widths = [g.name for g in structure.prunable if not g.parts]
    if 0 < len(widths) < len(structure.prunable):
        ways[WIDTHS_ALONE] = Way(structure.select(widths), settings)
    return ways


def plans_between(
    loaded: LoadedModel,
    ways: Mapping[str, Way],
    curves: Mapping[str, Curve],
    budget: Budget,
    weights: Mapping[str, float],
) -> dict[str, Plan]:
    """The plan of every way, as far as the budget lets them be; raises what `allocate` raises for the first one."""
    plans: dict[str, Plan] = {}
    for name, way in ways.items():
        try:
            plans[name] = make_plan(loaded.model, way.structure, curves, budget, way.settings, weights)
        except ModhifiError:  # widths that are alike, or under such a floor, cannot meet every budget
            if not plans:
                raise
    return plans


def least_change(
    loaded: LoadedModel,
    structure: Structure,
    plans: Mapping[str, Plan],
    moments: Mapping[str, Moments],
    samples: Samples,
    settings: PruneSettings,
    progress: Progress = silent,
) -> tuple[str, dict[str, float]]:
    """The plan that changes the output least on a few samples, and every plan's divergence in nats."""
    added = moments_of_plans(loaded, structure, plans.values(), samples, settings, progress)
    return best_plan(loaded, structure, plans, moments, settings, probe_of(structure, samples), added)


@torch.no_grad()
def best_plan(
    loaded: LoadedModel,
    structure: Structure,
    plans: Mapping[str, Plan],
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    probe: Tensor,
    added: SpanMoments = MappingProxyType({}),
) -> tuple[str, dict[str, float]]:
    """Of some plans the one whose compensated model diverges least on ``probe``, and every plan's divergence in nats.

    ``added`` are the moments of the spans that the plans remove. One forward pass a plan and one more; the model is as
    it was afterwards.
    """
    dense, divergence = loaded.logits(probe), {}
    for name, plan in plans.items():
        with _edited(loaded.model, structure, plan, moments, settings, added):
            divergence[name] = output_change(dense, loaded.logits(probe), loaded.gives_values)
    return min(divergence, key=lambda name: divergence[name]), divergence


def amplification(
    loaded: LoadedModel,
    structure: Structure,
    curves: Mapping[str, Curve],
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    probe: Tensor,
    share: float = TRIAL,
    progress: Progress = silent,
) -> dict[str, float]:
    """Squared output change per unit of squared local error when one group alone loses ``share`` of its components.

    ``probe`` is one batch of model-ready inputs; the output change is that of :func:`output_change` to the dense
    model. One forward pass of the probe per group, from the group's first reader on.
    """
    model, groups = loaded.model, [group for group in structure.prunable if not group.parts]
    timeline = Timeline(model, lambda: loaded.logits(loaded.example))
    cache = PrefixCache(model, loaded.logits, timeline)
    written = {g.name: written_modules(structure, [piece.module for piece in g.readers]) for g in groups}
    # In order of execution, as the cache only moves on.
    ordered = sorted(groups, key=lambda group: timeline.begin(written[group.name]))
    with torch.no_grad():
        dense = loaded.logits(probe)
        weights = {}
        for number, group in enumerate(ordered):
            progress("probing", number, len(ordered))
            cache.advance(written[group.name])
            cache.fill(0, probe)
            curve = curves[group.name]
            trial = curve.trial or _trial(model, structure, group, curve, moments, settings, share)
            with _restored(model, structure, [group]):
                for piece, weight in zip(group.readers, trial.weights, strict=True):
                    store(model, structure, piece.module, weight.double(), moments[piece.module], settings)
                changed = cache.run(0, probe)
            change = output_change(dense, changed, loaded.gives_values)
            weights[group.name] = change / max(float(curve.cost[trial.removed]), 1e-300)
    progress("probing", len(ordered), len(ordered))
    return weights


def _trial(
    model: nn.Module,
    structure: Structure,
    group: Group,
    curve: Curve,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    share: float,
) -> Trial:
    """A trial of one group from its curve's order, for compensations that elimination does not do on its way."""
    removed = min(len(curve.order), trial_size(group, share))
    kept = torch.ones(group.n, dtype=torch.bool)
    kept[curve.order[:removed]] = False
    positions = removed_positions(structure, Plan({group.name: tuple(torch.nonzero(kept).flatten().tolist())}))
    return Trial(
        removed,
        tuple(
            compensated(
                model, structure, piece.module, positions[piece.module, "reader"], moments[piece.module], settings
            )
            for piece in group.readers
        ),
    )


@contextmanager
def _edited(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    added: SpanMoments,
) -> Iterator[None]:
    """Inside, the model computes what the plan leaves of it, compensated, in its own shapes."""
    groups = [g for g in structure.prunable if g.name in plan.kept]
    with _restored(model, structure, groups), branches_restored(model, structure, plan):
        for (name, role), positions in removed_positions(structure, plan).items():
            if role == "reader":
                write_compensated(model, structure, name, positions, moments[name], settings)
        remove_branches(model, structure, plan, added, settings)
        yield


@contextmanager
def _restored(model: nn.Module, structure: Structure, groups: Iterable[Group]) -> Iterator[None]:
    """Afterwards, the groups' readers, and the BatchNorms that take their mean, are as they were before."""
    readers = [piece.module for group in groups for piece in group.readers]
    with restored(model, written_modules(structure, readers)):
        yield
