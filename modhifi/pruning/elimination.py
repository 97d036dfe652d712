"""In which order a group's components go, and what that costs. Pure.

Every selector returns a :class:`Curve`; costs are squared local errors after least squares over all kept columns, so
curves of different selectors and groups can be compared and allocated together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi.errors import IndefiniteError
from modhifi.pruning.linalg import damped_inverse
from modhifi.pruning.readers import Reader, best_singletons


@dataclass(frozen=True)
class Trial:
    """What the readers become without the first ``removed`` components of a curve.

    ``weights`` has for each reader its least-squares weights, float32 ``(G, o, d)``, zero in the removed columns.
    """

    removed: int
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class Curve:
    """``order`` int64 ``(r,)``: components in order of removal; ``cost`` float64 ``(r + 1,)``: total squared local
    error of the group's readers after removing the first j; ``energy``: output energy of those readers; ``fidelity``
    float64 ``(n,)``: the components' best singleton fidelity; ``trial`` where one was asked for."""

    order: Tensor
    cost: Tensor
    energy: float
    fidelity: Tensor | None = None
    trial: Trial | None = None


# Readers of more columns lose their components in single precision, which costs half. Their inverse is still made in
# double: badly conditioned Grams have none in single.
WIDE = 512


@dataclass
class _Part:
    """One conv group of one reader while components go.

    ``inverse`` is H ``(d, d)`` of the full reader and never changes: H of what is left is ``inverse − UᵀU``, where the
    first ``spent`` rows of ``factor`` are U. Columns of U and of ``weight`` stand for the columns ``at`` of the reader;
    ``live`` says which of them still count. ``blocks`` ``(n, m, m)`` are the components' own blocks of the current H,
    ``columns`` ``(n, m)`` their places, ``mine`` their numbers in the group.
    """

    inverse: Tensor
    weight: Tensor
    scale: Tensor
    columns: Tensor
    mine: Tensor
    blocks: Tensor
    factor: Tensor
    at: Tensor
    live: Tensor
    spent: int = 0

    @classmethod
    def of(cls, inverse: Tensor, weight: Tensor, scale: Tensor, mine: Tensor, columns: Tensor) -> _Part:
        d = len(inverse)
        weight, scale = weight.to(inverse.dtype), scale.to(inverse.dtype)
        return cls(
            inverse,
            weight * scale[:, None],
            scale,
            columns,
            mine,
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

    def remove(self, gone: Tensor) -> float:
        """Remove the components marked in ``gone`` bool ``(n,)`` and return their joint cost, ahead of any norm.

        One step of a block Cholesky factorisation of H, pivoted by whom we let go: only the columns of H that are
        about to go are ever brought up to date.
        """
        index = self.columns[gone].reshape(-1)
        old = self.factor[: self.spent]
        cross = self.inverse.index_select(0, self.at[index]).index_select(1, self.at)
        cross.addmm_(old[:, index].T, old, alpha=-1)
        factor, info = torch.linalg.cholesky_ex(cross[:, index])
        if int(info):
            raise IndefiniteError
        new = torch.linalg.solve_triangular(factor, cross, upper=False)
        pieces = torch.linalg.solve_triangular(factor, self.weight[:, index].T, upper=False)
        self.weight.addmm_(pieces.T, new, alpha=-1)
        self.factor[self.spent : self.spent + len(new)] = new
        self.spent += len(new)
        self.live[index.cpu()] = False
        self.columns, self.mine, self.blocks = self.columns[~gone], self.mine[~gone], self.blocks[~gone]
        rows = new.T[self.columns]
        self.blocks = self.blocks - rows @ rows.transpose(1, 2)
        self._compact()
        return float((pieces.square().sum(0) / self.scale.square()).sum(dtype=torch.float64))

    def _compact(self) -> None:
        """Drop the stale rows once they are a quarter: copying at every step would cost more than it saves."""
        if self.live.sum() > 0.75 * len(self.live):
            return
        left = torch.nonzero(self.live).flatten().to(self.at.device)
        smaller = self.factor.new_empty((len(self.factor), len(left)))
        torch.index_select(self.factor[: self.spent], 1, left, out=smaller[: self.spent])
        self.factor, self.weight, self.at = smaller, self.weight.index_select(1, left), self.at[left]
        self.columns = (torch.cumsum(self.live, 0) - 1).to(self.columns.device)[self.columns]
        self.live = torch.ones(len(left), dtype=torch.bool)

    def whole_weight(self) -> Tensor:
        """The layer's weights as they are now, ``(o, d)``, zero in the removed columns."""
        whole = self.weight.new_zeros((len(self.weight), len(self.inverse)))
        whole[:, self.at[self.live.to(self.at.device)]] = self.weight[:, self.live.to(self.at.device)]
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
                _Part.of(
                    damped_inverse(second, ridge).to(wide if len(second) > WIDE else torch.float64),
                    weight,
                    scale,
                    mine,
                    columns,
                )
                for (weight, second, mine, columns), scale in zip(reader.parts(), reader.scales, strict=True)
                if len(mine)
            ]
            for reader in readers
        ]

    def costs(self) -> Tensor:
        """Cost behind the norms of removing each remaining component alone; infinity for the removed ones. ``(n,)``."""
        total = torch.full((self.n,), math.inf, dtype=torch.float64)
        for number, parts in enumerate(self.state):
            for part in parts:
                if len(part.mine):
                    alone = part.costs()
                    total[part.mine] = alone if not number else total[part.mine] + alone
        return total

    def remove(self, chosen: Tensor) -> float:
        """Remove components jointly and return the exact joint cost."""
        cost = 0.0
        for part in (p for parts in self.state for p in parts):
            gone = torch.isin(part.mine, chosen)
            if bool(gone.any()):
                cost += part.remove(gone)
        return cost

    def weights(self) -> tuple[Tensor, ...]:
        """Every reader's weights as they are now, float32 ``(G, o, d)``."""
        result = []
        for reader, parts in zip(self.readers, self.state, strict=True):
            whole, mine = reader.weight.float(), iter(parts)
            for g, (*_, numbers, _) in enumerate(reader.parts()):
                if len(numbers):
                    whole[g] = next(mine).whole_weight().float()
            result.append(whole)
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
    :class:`IndefiniteError`.
    """
    how = (keep_at_least, order, partition, steps, trial)
    try:
        return _eliminate(Elimination(readers, ridge, torch.float32), *how)
    except IndefiniteError:  # in single precision, maybe
        return _eliminate(Elimination(readers, ridge), *how)


def _eliminate(
    state: Elimination,
    keep_at_least: int,
    order: Tensor | None,
    partition: Tensor | None,
    steps: int,
    trial: int | None,
) -> Curve:
    readers, n = state.readers, state.n
    labels = torch.zeros(n, dtype=torch.int64) if partition is None else torch.unique(partition, return_inverse=True)[1]
    count = int(labels.max()) + 1
    energy = sum(float((r.product * r.weight).sum()) for r in readers)
    gone: list[Tensor] = []
    cost = [0.0]
    rank, found = None, None
    if order is not None:
        rank = torch.empty(n, dtype=torch.float64)
        rank[order] = torch.arange(len(order), dtype=torch.float64)
    removed = 0
    while n - removed - count >= max(keep_at_least, count):
        alone = state.costs()
        ranking = alone if rank is None else torch.where(alone.isinf(), alone, rank)
        each = max(1, n // (steps * count))
        each = min(each, (n - removed - max(keep_at_least, count)) // count)
        members = [torch.nonzero(labels == k).flatten() for k in range(count)]
        # one of each part in turn: every multiple of the number of parts is a valid place to stop
        chosen = torch.stack([m[ranking[m].argsort(stable=True)[:each]] for m in members], 1).reshape(-1)
        spent = state.remove(chosen)
        weights = alone[chosen].cumsum(0) / alone[chosen].sum().clamp_min(1e-300)
        cost.extend((cost[-1] + spent * weights).tolist() if spent > 0 else [cost[-1]] * len(chosen))
        gone.append(chosen)
        removed += len(chosen)
        if trial is not None and (found is None or found.removed < trial):
            if removed >= trial or n - removed - count < max(keep_at_least, count):
                found = Trial(removed, state.weights())
    removal = torch.cat(gone) if gone else torch.empty(0, dtype=torch.int64)
    return Curve(removal, torch.tensor(cost, dtype=torch.float64), energy, best_singletons(readers, n), found)
