"""Block Optimal Brain Surgeon: in which order a group's components go, and what that costs. Pure.

Every selector's order becomes a :class:`Curve`; costs are squared local errors after least squares over all kept
columns, so curves of different selectors and groups can be compared and allocated together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modhifi.errors import IndefiniteError, ModhifiError
from modhifi.pruning.linalg import damped_inverse
from modhifi.pruning.readers import Reader, ReaderPart, best_singletons


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


# Readers of more columns lose their components in single precision, which costs half. Their inverse is still made in
# double: badly conditioned Grams have none in single.
WIDE = 512


@dataclass
class _PartState:
    """One part of one reader while components go.

    ``inverse`` is H ``(d, d)`` of the full reader and never changes: H of what is left is ``inverse − UᵀU``, where the
    first ``rank`` rows of ``factor`` are U. Columns of U and of ``weight`` stand for the ``positions`` ``(l,)`` of the
    reader; ``present`` bool ``(l,)`` says which of them are left. ``components`` ``(n,)`` are the numbers of those left
    in their group, ``columns`` ``(n, m)`` where theirs are among the positions, ``blocks`` ``(n, m, m)`` their own
    blocks of the current H.
    """

    inverse: Tensor
    weight: Tensor
    scale: Tensor
    components: Tensor
    columns: Tensor
    blocks: Tensor
    factor: Tensor
    positions: Tensor
    present: Tensor
    rank: int = 0

    @classmethod
    def of(cls, inverse: Tensor, part: ReaderPart, scale: Tensor) -> _PartState:
        d = len(inverse)
        weight, scale, columns = part.weight.to(inverse.dtype), scale.to(inverse.dtype), part.columns
        return cls(
            inverse,
            weight * scale[:, None],
            scale,
            part.components,
            columns,
            inverse[columns[:, :, None], columns[:, None, :]],
            inverse.new_empty((columns.numel(), d)),
            torch.arange(d, device=inverse.device),
            torch.ones(d, dtype=torch.bool),
        )

    def costs(self) -> Tensor:
        """``tr[W_I H_II⁻¹ W_Iᵀ]`` of each component left, behind the norm, ``(n,)``."""
        piece = self.weight.T[self.columns]
        energy = piece @ piece.transpose(1, 2)
        solved: Tensor = torch.linalg.solve(self.blocks, energy)
        return solved.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0).double().cpu()

    def remove(self, removed: Tensor) -> float:
        """Remove the components marked in ``removed`` bool ``(n,)`` and return their joint cost, ahead of any norm.

        One step of a block Cholesky factorisation of H, pivoted by what goes: only the columns of H that are
        about to go are ever brought up to date. Raises :class:`IndefiniteError`.
        """
        index = self.columns[removed].reshape(-1)
        old = self.factor[: self.rank]
        cross = self.inverse.index_select(0, self.positions[index]).index_select(1, self.positions)
        cross.addmm_(old[:, index].T, old, alpha=-1)
        factor, info = torch.linalg.cholesky_ex(cross[:, index])
        if int(info):
            raise IndefiniteError
        new = torch.linalg.solve_triangular(factor, cross, upper=False)
        pieces = torch.linalg.solve_triangular(factor, self.weight[:, index].T, upper=False)
        self.weight.addmm_(pieces.T, new, alpha=-1)
        self.factor[self.rank : self.rank + len(new)] = new
        self.rank += len(new)
        self.present[index.cpu()] = False
        self.columns, self.components = self.columns[~removed], self.components[~removed]
        rows = new.T[self.columns]
        self.blocks = self.blocks[~removed] - rows @ rows.transpose(1, 2)
        self._compact()
        return float((pieces.square().sum(0) / self.scale.square()).sum(dtype=torch.float64))

    def _compact(self) -> None:
        """Drop the stale columns once they are a quarter: copying at every step would cost more than it saves."""
        if self.present.sum() > 0.75 * len(self.present):
            return
        left = torch.nonzero(self.present).flatten().to(self.positions.device)
        smaller = self.factor.new_empty((len(self.factor), len(left)))
        torch.index_select(self.factor[: self.rank], 1, left, out=smaller[: self.rank])
        self.factor, self.weight = smaller, self.weight.index_select(1, left)
        self.positions = self.positions[left]
        self.columns = (torch.cumsum(self.present, 0) - 1).to(self.columns.device)[self.columns]
        self.present = torch.ones(len(left), dtype=torch.bool)

    def whole_weight(self) -> Tensor:
        """The part's weights as they are now, ``(o, d)``, zero in the removed columns."""
        present = self.present.to(self.positions.device)
        whole = self.weight.new_zeros((len(self.weight), len(self.inverse)))
        whole[:, self.positions[present]] = self.weight[:, present]
        return whole / self.scale[:, None]


class Elimination:
    """Optimal Brain Surgeon on blocks: exact removal costs and updates for one group (docs/method.md, selection).

    With ``H = (S + λI)⁻¹``, removing the columns I costs ``tr[W_I H_II⁻¹ W_Iᵀ]``; afterwards
    ``W ← W − W_I H_II⁻¹ H_I,:`` and ``H ← H − H_:,I H_II⁻¹ H_I,:``. Several readers add their costs. What goes
    next is decided by errors as they leave a BatchNorm (rows of W times ``Reader.scale``); what it cost is the error
    ahead of it, which is the one that can be told from the weights alone. ``wide`` is the precision in which
    readers of more than ``WIDE`` columns lose theirs; all else is float64.
    """

    def __init__(self, readers: list[Reader], ridge: float, wide: torch.dtype = torch.float64) -> None:
        self.n = len(readers[0].owner)
        self.readers = readers
        self.state = [
            [
                _PartState.of(
                    damped_inverse(part.second, ridge).to(wide if len(part.second) > WIDE else torch.float64),
                    part,
                    reader.scales[part.group],
                )
                for part in reader.parts()
            ]
            for reader in readers
        ]

    def costs(self) -> Tensor:
        """Cost behind the norms of removing each remaining component alone; infinity for the removed ones. ``(n,)``."""
        total = torch.full((self.n,), math.inf, dtype=torch.float64)
        for number, states in enumerate(self.state):
            for state in states:
                if len(state.components):
                    alone = state.costs()
                    total[state.components] = total[state.components] + alone if number else alone
        return total

    def remove(self, components: Tensor) -> float:
        """Remove components, by number, jointly and return the exact joint cost. Raises :class:`IndefiniteError`."""
        cost = 0.0
        for state in (state for states in self.state for state in states):
            removed = torch.isin(state.components, components)
            if bool(removed.any()):
                cost += state.remove(removed)
        return cost

    def weights(self) -> tuple[Tensor, ...]:
        """Every reader's weights as they are now, float32 ``(G, o, d)``."""
        result = []
        for reader, states in zip(self.readers, self.state, strict=True):
            weight = reader.weight.float()
            for part, state in zip(reader.parts(), states, strict=True):
                weight[part.group] = state.whole_weight().float()
            result.append(weight)
        return tuple(result)


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
    how = (keep_at_least, order, partition, steps, trial)
    try:
        return _eliminate(Elimination(readers, ridge, torch.float32), *how)
    except (IndefiniteError, torch.linalg.LinAlgError):  # in single precision, maybe
        return _eliminate(Elimination(readers, ridge), *how)


def _eliminate(
    state: Elimination,
    keep_at_least: int,
    order: Tensor | None,
    partition: Tensor | None,
    steps: int,
    trial_size: int | None,
) -> Curve:
    readers, n = state.readers, state.n
    rank = None if order is None else _rank(order, n)
    labels = torch.zeros(n, dtype=torch.int64) if partition is None else torch.unique(partition, return_inverse=True)[1]
    count = int(labels.max()) + 1
    members = [torch.nonzero(labels == label).flatten() for label in range(count)]
    least = max(keep_at_least, count)
    energy = sum(float((r.product * r.weight).sum()) for r in readers)
    removals: list[Tensor] = []
    cost, removed = [0.0], 0
    trial: Trial | None = None
    while n - removed - count >= least:
        alone = state.costs()
        ranking = alone if rank is None else torch.where(alone.isinf(), alone, rank)
        each = min(max(1, n // (steps * count)), (n - removed - least) // count)
        # one of each part in turn: every multiple of the number of parts is a valid place to stop
        chosen = torch.stack([m[ranking[m].argsort(stable=True)[:each]] for m in members], 1).reshape(-1)
        joint = state.remove(chosen)
        shares = alone[chosen].cumsum(0) / alone[chosen].sum().clamp_min(1e-300)
        cost.extend((cost[-1] + joint * shares).tolist() if joint > 0 else [cost[-1]] * len(chosen))
        removals.append(chosen)
        removed += len(chosen)
        if trial_size is not None and (trial is None or trial.removed < trial_size):
            if removed >= trial_size or n - removed - count < least:
                trial = Trial(removed, state.weights())
    removal = torch.cat(removals) if removals else torch.empty(0, dtype=torch.int64)
    return Curve(removal, torch.tensor(cost, dtype=torch.float64), energy, best_singletons(readers, n), trial)


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
