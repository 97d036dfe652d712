"""Removal curves: in what order the components of every group go, and what that costs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from modhifi.calibration.memory import fitting
from modhifi.calibration.moments import Moments
from modhifi.errors import IndefiniteError, ModhifiError
from modhifi.progress import Progress, silent
from modhifi.pruning.elimination import SINGULAR, Curve, Job, eliminate_together, removable
from modhifi.pruning.readers import readers_of
from modhifi.pruning.selectors import SELECTORS
from modhifi.pruning.selectors.naive import hifi_union
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.groups import Group, Structure
from modhifi.structure.operators import columns_of
from modhifi.structure.places import operator_at
from modhifi.structure.plan import Plan

# Groups of equal shape are solved together as far as their readers' matrices take at most this many bytes.
TOGETHER = 2**28


def removal_curves(
    model: nn.Module,
    structure: Structure,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    progress: Progress = silent,
    trial: float | None = None,
    widths: Mapping[str, int] | None = None,
) -> dict[str, Curve]:
    """For each prunable group of widths the order of removal and its cost, with a trial at that share of components.

    Curves end at the floor, or where ``widths`` by group are reached.

    Raises :class:`IndefiniteError`, naming all groups that cannot be solved.
    """
    selector, wanted = SELECTORS[settings.selector], [group for group in structure.prunable if not group.parts]
    curves: dict[str, Curve | None] = {}
    progress("scoring", 0, len(wanted))
    for groups in alike(model, wanted, moments):
        jobs: dict[str, Job] = {}
        for group in groups:
            readers = readers_of(model, structure, group, moments, settings.behind_norms)
            least = max(group.step, int(settings.floor * group.n), 0 if widths is None else widths[group.name])
            size = None if trial is None else trial_size(group, trial)
            try:
                order = selector.order(readers, settings.seed)
            except SINGULAR:
                curves[group.name] = None
            else:
                jobs[group.name] = Job(readers, least, order, group.partition, size)
        if jobs:
            curves |= dict(zip(jobs, eliminate_together(list(jobs.values()), settings.ridge), strict=True))
        progress("scoring", len(curves), len(wanted))
    if unsolved := [g.name for g in wanted if curves[g.name] is None]:
        raise IndefiniteError(unsolved)
    return {g.name: curve for g in wanted if (curve := curves[g.name]) is not None}


def alike(model: nn.Module, groups: Iterable[Group], moments: Mapping[str, Moments]) -> list[list[Group]]:
    """The groups, those together that have readers of the same shapes and lose as many of as many components.

    The moments that are solved with together take at most ``TOGETHER`` bytes.
    """
    shapes: dict[tuple[object, ...], list[Group]] = defaultdict(list)
    for group in groups:
        pieces = [(piece, operator_at(model, piece.module), moments[piece.module].held) for piece in group.readers]
        shape = tuple((columns_of(m), m.get_parameter("weight").shape, p.index.shape, h.shape) for p, m, h in pieces)
        labels = () if group.partition is None else tuple(group.partition.tolist())
        shapes[group.n, labels, shape].append(group)
    together = []
    for same in shapes.values():
        sizes = [sum(moments[piece.module].held.nbytes for piece in group.readers) for group in same]
        together += [[same[number] for number in numbers] for numbers in fitting(sizes, TOGETHER)]
    return together


def ordered_curves(model: nn.Module, structure: Structure, settings: PruneSettings) -> dict[str, Curve]:
    """For each prunable group the order of removal by a selector that needs no moments; what it costs is not known."""
    curves = {}
    for group in structure.prunable:
        if group.parts:
            raise ModhifiError(f"what '{group.name}' costs has to be measured; leave --compensate as it is")
        order = SELECTORS[settings.selector].order(readers_of(model, structure, group, None), settings.seed)
        assert order is not None
        order = removable(order, group.partition, max(group.step, int(settings.floor * group.n)))
        curves[group.name] = Curve(order, torch.full((len(order) + 1,), math.nan, dtype=torch.float64), math.nan)
    return curves


def trial_size(group: Group, share: float) -> int:
    """How many components a trial removes: a share of them, at least one of every part."""
    return max(group.step, int(share * group.n) // group.step * group.step)


def hifi_plan(model: nn.Module, structure: Structure, moments: Mapping[str, Moments], settings: PruneSettings) -> Plan:
    """Keep in every group the union of its output channels' smallest NAIVE HiFi sets of fidelity ``eta``.

    Groups that lose whole parts at a time (heads, grouped convolutions) stay as they are, and so do blocks.
    """
    assert settings.eta is not None
    kept = {}
    for group in structure.prunable:
        if group.partition is not None or group.parts:
            continue
        member = hifi_union(readers_of(model, structure, group, moments), settings.eta)
        if not bool(member.all()):
            kept[group.name] = tuple(torch.nonzero(member).flatten().tolist())
    return Plan(kept)
