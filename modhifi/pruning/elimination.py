"""Block Optimal Brain Surgeon: in which order a group's components go, and what that costs. Pure.

Every selector's order becomes a :class:`Curve`; costs are squared local errors after least squares over all kept
columns, so curves of different selectors and groups can be compared and allocated together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modhifi.errors import IndefiniteError, ModhifiError
from modhifi.pruning.brain_surgeon import Elimination
from modhifi.pruning.readers import Reader


@dataclass(frozen=True)
class Trial:
    """What the readers become without the first ``removed`` components of a curve.

    ``weights`` has for each reader its least-squares weights, float32 ``(G, o, d)``, zero in the removed columns.
    """

    removed: int
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class Curve:
    """In which order r of a group's n components go, and what has been lost at every stage.

    ``order`` int64 ``(r,)``: components in order of removal; ``cost`` float64 ``(r + 1,)``: squared local error of
    the group's readers, added up, after removing the first j; ``energy``: output energy of those readers; ``fidelity``
    float64 ``(n,)``: the components' best singleton fidelity; ``trial`` where one was asked for.
    """

    order: Tensor
    cost: Tensor
    energy: float
    fidelity: Tensor | None = None
    trial: Trial | None = None

    @cached_property
    def costs(self) -> list[float]:
        """``cost`` as plain numbers, for whoever looks at many of them one by one."""
        values: list[float] = self.cost.tolist()
        return values


@dataclass(frozen=True)
class Job:
    """One group to eliminate in: its readers and the arguments of :func:`eliminate` that are its own."""

    readers: list[Reader]
    keep_at_least: int
    order: Tensor | None = None
    partition: Tensor | None = None
    trial: int | None = None


def eliminate(
    readers: list[Reader],
    *,
    keep_at_least: int,
    order: Tensor | None = None,
    partition: Tensor | None = None,
    ridge: float = 1e-4,
    steps: int = 24,
    trial: int | None = None,
) -> Curve:
    """Backward elimination down to ``keep_at_least`` components; greedy (``obs``), or along a given order.

    About ``n / steps`` components go at a time, equally many per label of ``partition`` int64 ``(n,)``. The curve has a
    :class:`Trial` at the first stop with ``trial`` components removed, or at the last. Raises
    :class:`IndefiniteError` where a Gram cannot be inverted, and ModhifiError for an ``order`` that is no permutation
    of the n components.
    """
    (curve,) = eliminate_together([Job(readers, keep_at_least, order, partition, trial)], ridge, steps)
    if curve is None:
        raise IndefiniteError
    return curve


# What stands for a Gram without a factorisation.
SINGULAR = (IndefiniteError, torch.linalg.LinAlgError)


def eliminate_together(jobs: Sequence[Job], ridge: float = 1e-4, steps: int = 24) -> list[Curve | None]:
    """:func:`eliminate` in groups of equal shape, in lock-step: as many operations as one of them takes.

    All jobs have the same n, ``keep_at_least``, ``partition`` and ``trial``, and readers of the same shapes. Grouped
    convolutions, whose parts may lose unequally many, go one after the other. None stands where a Gram cannot be
    inverted.
    """
    if len(jobs) > 1 and any(len(reader.weight) > 1 for reader in jobs[0].readers):
        return [curve for job in jobs for curve in eliminate_together([job], ridge, steps)]
    curves: list[Curve | None] = [None] * len(jobs)
    try:
        curves = _eliminate(jobs, ridge, steps, torch.float32)
    except SINGULAR:
        pass
    for number, job in enumerate(jobs):
        if curves[number] is None:  # in single precision, or beside another
            with suppress(*SINGULAR):
                (curves[number],) = _eliminate([job], ridge, steps, torch.float64)
    return curves


def _eliminate(jobs: Sequence[Job], ridge: float, steps: int, wide: torch.dtype) -> list[Curve | None]:
    """What :func:`eliminate_together` returns, None also for what is only indefinite in the precision ``wide``.

    Raises :class:`IndefiniteError` where one Gram has no inverse.
    """
    first = jobs[0]
    n, device = len(first.readers[0].owner), first.readers[0].weight.device
    ranks = None if first.order is None else torch.stack([_rank(o, n) for j in jobs if (o := j.order) is not None])
    ranks = None if ranks is None else ranks.to(device)
    labels = torch.zeros(n, dtype=torch.int64)
    if first.partition is not None:
        labels = torch.unique(first.partition, return_inverse=True)[1]
    members = torch.nn.utils.rnn.pad_sequence(list(_members(labels)), batch_first=True, padding_value=n).to(device)
    count = len(members)
    least, removed, trial = max(first.keep_at_least, count), 0, None
    state = Elimination([job.readers for job in jobs], ridge, wide, labels, n - least)
    removals: list[Tensor] = []
    prices: list[Tensor] = []
    while n - removed - count >= least:
        alone = state.costs()
        ranking = alone if ranks is None else ranks.masked_fill(state.gone, math.inf)
        each = min(max(1, n // (steps * count)), (n - removed - least) // count)
        chosen = _cheapest(ranking, members, each)
        prices.append(alone.gather(1, chosen))
        state.remove(chosen)
        removals.append(chosen)
        removed += each * count
        if first.trial is not None and (trial is None or trial[0] < first.trial):
            if removed >= first.trial or n - removed - count < least:
                trial = removed, state.weights()
    costs, finite = _running_costs(prices, state.lost().cpu().numpy())
    solved = finite & state.solved().cpu().numpy()
    orders = torch.cat(removals, 1).cpu() if removals else torch.empty(len(jobs), 0, dtype=torch.int64)
    fidelity, energies = state.fidelity.cpu(), state.energy.tolist()
    return [
        Curve(
            orders[number],
            torch.from_numpy(costs[number]),
            energies[number],
            fidelity[number],
            None if trial is None else Trial(trial[0], trial[1][number]),
        )
        if solved[number]
        else None
        for number in range(len(jobs))
    ]


def _cheapest(ranking: Tensor, members: Tensor, each: int) -> Tensor:
    """Of ``ranking`` ``(jobs, n)`` the ``each`` least of every part's ``members`` ``(parts, c)``, one of each in turn.

    So every multiple of the number of parts is a valid place to stop. Parts of unequal size have n behind.
    """
    if len(members) == 1:
        return ranking.argsort(dim=1, stable=True)[:, :each]
    ranking = torch.nn.functional.pad(ranking, (0, 1), value=math.inf)
    cheapest = ranking[:, members].argsort(dim=2, stable=True)[:, :, :each]
    return members.expand(len(ranking), -1, -1).gather(2, cheapest).transpose(1, 2).flatten(1)


def _members(labels: Tensor) -> tuple[Tensor, ...]:
    """The components of each label, in order."""
    parts: tuple[Tensor, ...] = labels.argsort(stable=True).split(torch.bincount(labels).tolist())
    return parts


def _running_costs(prices: list[Tensor], lost: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What has been lost at every stage, ``(jobs, r + 1)``, and for which jobs all of that is finite, ``(jobs,)``.

    What a step adds to ``lost`` ``(jobs, steps + 1)`` is shared out in proportion to what its components cost alone,
    ``prices`` ``(jobs, c)``.
    """
    costs = [np.zeros((len(lost), 1))]
    if prices:
        joined = torch.cat(prices, 1).clamp_min(0).cpu().numpy()
        each = np.split(joined, np.cumsum([p.shape[1] for p in prices])[:-1], 1)
        for alone, before, after in zip(each, lost.T[:-1, :, None], lost.T[1:, :, None], strict=True):
            shares = alone.cumsum(1) / alone.sum(1, keepdims=True).clip(1e-300)
            costs.append(before + np.where(after > before, (after - before) * shares, 0))
    whole = np.concatenate(costs, 1)
    return whole, np.asarray(np.isfinite(whole).all(1))


def removable(order: Tensor, partition: Tensor | None, keep_at_least: int) -> Tensor:
    """Of an order of all n components those that may go, as :func:`eliminate` removes them: one of each part in turn.

    Raises ModhifiError for an ``order`` that is no permutation of the n components.
    """
    rank = _rank(order, len(order))
    parts = torch.zeros(len(order), dtype=torch.int64) if partition is None else partition
    members = [torch.nonzero(parts == label).flatten() for label in parts.unique()]
    each = (len(order) - max(keep_at_least, len(members))) // len(members)
    return torch.stack([m[rank[m].argsort(stable=True)[:each]] for m in members], 1).reshape(-1)


def _rank(order: Tensor, n: int) -> Tensor:
    """The place of every component in an order, float64 ``(n,)``. Raises ModhifiError for one that is none."""
    if not torch.equal(order.sort().values, torch.arange(n)):
        raise ModhifiError(f"a selector must give all {n} components of the group once each, from first to last to go")
    rank = torch.empty(n, dtype=torch.float64)
    rank[order] = torch.arange(n, dtype=torch.float64)
    return rank
