"""What a cut does to the whole model's output, tried out on a few samples: of single groups, and of whole plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from modhifi.calibration.moments import Moments
from modhifi.calibration.replay import Replay
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.budget import Budget
from modhifi.pruning.editing import compensated, store, write_compensated
from modhifi.pruning.elimination import Curve, Trial
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import make_plan, trial_size
from modhifi.structure.groups import Group, Structure
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import removed_positions

# the share of a group's components whose loss shows its effect on the output
TRIAL = 0.3
# fewest and most samples that probe the effect of one group
PROBES = (3, 32)


def probed_plan(
    loaded: LoadedModel,
    structure: Structure,
    curves: Mapping[str, Curve],
    moments: Mapping[str, Moments],
    samples: Samples,
    budget: Budget,
    settings: PruneSettings,
    progress: Progress = silent,
) -> tuple[Plan, dict[str, float]]:
    """Widths by every group's measured effect on the output, and the divergence of each plan that was tried as a whole.

    Effects of single groups do not add up where much goes. So for language models, whose blocks are alike, plans with a
    higher floor and the one of equal widths are tried as well, and the best on the probing samples is taken.
    Raises what `allocate` raises.
    """
    # in all about half as many forward passes as the calibration itself
    probes = min(len(samples), max(PROBES[0], min(PROBES[1], len(samples) // (2 * len(structure.prunable)))))
    probe = next(samples.batches(probes))
    weights = amplification(loaded, structure, curves, moments, settings, probe, progress=progress)
    plan = make_plan(loaded.model, structure, curves, budget, settings, weights)
    if loaded.kind not in ("text", "encoder"):
        return plan, {}
    return best_plan(
        loaded,
        structure,
        plans_between(loaded, structure, curves, budget, settings, weights, plan),
        moments,
        settings,
        probe,
    )


def plans_between(
    loaded: LoadedModel,
    structure: Structure,
    curves: Mapping[str, Curve],
    budget: Budget,
    settings: PruneSettings,
    weights: Mapping[str, float],
    allocated: Plan,
) -> dict[str, Plan]:
    """The allocated plan, the one of equal widths, and one in between, as far as the budget lets them be."""
    kept = [len(allocated.kept.get(g.name, range(g.n))) / g.n for g in structure.prunable]
    middle = (settings.floor + sum(kept) / len(kept)) / 2
    others = {
        f"allocated, floor {middle:.2g}": replace(settings, floor=middle),
        "uniform": replace(settings, layout="uniform"),
    }
    plans = {f"allocated, floor {settings.floor:.2g}": allocated}
    for name, other in others.items():
        try:
            plans[name] = make_plan(loaded.model, structure, curves, budget, other, weights)
        except ModhifiError:  # widths that are alike, or under such a floor, cannot meet every budget
            continue
    return plans


@torch.no_grad()
def best_plan(
    loaded: LoadedModel,
    structure: Structure,
    plans: Mapping[str, Plan],
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    probe: Tensor,
) -> tuple[Plan, dict[str, float]]:
    """Of some plans the one whose compensated model diverges least on ``probe``, and every plan's divergence in nats.

    One forward pass a plan and one more; the model is as it was afterwards.
    """
    dense, found = loaded.logits(probe), {}
    for name, plan in plans.items():
        with _edited(loaded.model, structure, plan, moments, settings):
            found[name] = output_change(dense, loaded.logits(probe))
    return plans[min(found, key=lambda name: found[name])], found


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

    ``probe`` is one batch of model-ready inputs; the output change is the
    Kullback-Leibler divergence to the dense model. One forward pass of the probe per group, from its block on.
    """
    model, replay = loaded.model, Replay(loaded.model)
    with torch.no_grad():
        with replay.recording():
            dense = loaded.logits(probe)
        weights = {}
        for number, group in enumerate(structure.prunable):
            progress("probing", number, len(structure.prunable))
            curve = curves[group.name]
            trial = curve.trial or _trial(model, structure, group, curve, moments, settings, share)
            with _restored(model, structure, [group]):
                for piece, weight in zip(group.readers, trial.weights, strict=True):
                    store(model, structure, piece.module, weight.double(), moments[piece.module], settings)
                with replay.after_change(piece.module for piece in group.readers):
                    changed = loaded.logits(probe)
            weights[group.name] = output_change(dense, changed) / max(float(curve.cost[trial.removed]), 1e-300)
    progress("probing", len(structure.prunable), len(structure.prunable))
    return weights


def output_change(dense: Tensor, changed: Tensor) -> float:
    """Mean Kullback-Leibler divergence between two sets of logits ``(..., classes)``, in nats."""
    p, q = dense.float().log_softmax(-1), changed.float().log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


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
    stay = torch.ones(group.n, dtype=torch.bool)
    stay[curve.order[:removed]] = False
    gone = removed_positions(structure, Plan({group.name: tuple(torch.nonzero(stay).flatten().tolist())}))
    return Trial(
        removed,
        tuple(
            compensated(model, structure, piece.module, gone[piece.module, "reader"], moments[piece.module], settings)
            for piece in group.readers
        ),
    )


@contextmanager
def _edited(
    model: nn.Module, structure: Structure, plan: Plan, moments: Mapping[str, Moments], settings: PruneSettings
) -> Iterator[None]:
    """Inside, every reader of the plan's removed components has its compensated weights."""
    with _restored(model, structure, [g for g in structure.prunable if g.name in plan.kept]):
        for (name, role), positions in removed_positions(structure, plan).items():
            if role == "reader":
                write_compensated(model, structure, name, positions, moments[name], settings)
        yield


@contextmanager
def _restored(model: nn.Module, structure: Structure, groups: Iterable[Group]) -> Iterator[None]:
    """Afterwards, the groups' readers are as they were before."""
    saved = _remember(model, structure, groups)
    try:
        yield
    finally:
        for name, value in saved.items():
            _tensor(model, name).copy_(value)


def _touched(structure: Structure, groups: Iterable[Group]) -> list[str]:
    names = []
    for piece in (piece for group in groups for piece in group.readers):
        sink = structure.operators[piece.module].sink
        names += [f"{piece.module}.weight"]
        if sink is not None:
            names += [f"{piece.module}.bias" if sink == "bias" else f"{sink}.running_mean"]
    return names


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(owner), leaf).data
    return value


def _remember(model: nn.Module, structure: Structure, groups: Iterable[Group]) -> dict[str, Tensor]:
    return {name: _tensor(model, name).clone() for name in _touched(structure, groups)}
