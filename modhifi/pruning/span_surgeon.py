"""Optimal Brain Surgeon on blocks for readers of fewer rows than columns, in the span of the rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modhifi.calibration.low_rank import LowRank
from modhifi.pruning.readers import Slot


class SpanStack:
    """What `brain_surgeon.Stack` is, for slots whose second moment is ``S + λI = F Fᵀ + αI`` with few columns in F.

    With K the columns that are left and R those removed, ``M = F_KᵀF_K + αI`` and ``E = W_R F_R`` say all: the inverse
    of S on K is ``(I − F_K M⁻¹ F_Kᵀ) / α``, and least squares has made ``Ŵ_K = W_K + E M⁻¹ F_Kᵀ`` of the weights. Each
    slot has all components of its group.
    """

    def __init__(self, slots: Sequence[Slot], groups: int, n: int, ridge: float) -> None:
        self.slots, self.groups, self.n = slots, groups, n
        parts = [slot.part for slot in slots]
        seconds = [part.second for part in parts if isinstance(part.second, LowRank)]
        self.factor = torch.stack([second.factor for second in seconds])
        unit = torch.stack([second.diagonals().mean() for second in seconds])
        constant = torch.stack([second.constant for second in seconds])
        self.alpha = constant + ridge * torch.where(unit == 0, 1.0, unit)
        self.weight = pad_sequence([part.weight for part in parts], batch_first=True)
        scales = [slot.scale for slot in slots if slot.scale is not None]
        self.scale = pad_sequence(scales, batch_first=True, padding_value=1.0) if scales else None
        if self.scale is not None:
            self.weight = self.weight * self.scale[:, :, None]
        device = self.factor.device
        self.columns = torch.stack([part.columns for part in parts]).to(device)
        # where in the slot each component of the group stands
        self.place = torch.stack([part.components for part in parts]).to(device).argsort(1)
        self.numbers = torch.arange(len(slots), device=device)
        self.left = self.factor.mT @ self.factor
        self.left.diagonal(dim1=1, dim2=2).add_(self.alpha[:, None])
        self.lost = self.weight.new_zeros(len(slots), self.weight.shape[1], self.factor.shape[2])
        self.info = torch.zeros(len(slots), dtype=torch.int32, device=device)

    def costs(self) -> Tensor:
        """``tr[W_I H_II⁻¹ W_Iᵀ]`` of each component alone, added up over the readers, float64 ``(groups, n)``."""
        columns = self.columns.gather(1, self.place[:, :, None].expand_as(self.columns))
        weight, inverse = self._now(columns)
        alone = torch.linalg.solve_ex(inverse, weight.mT @ weight)[0].diagonal(dim1=2, dim2=3).sum(2)
        return self._by_group(alone.clamp_min(0))

    def _now(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(B, k, o, m)`` and inverse ``(B, k, m, m)`` of blocks of columns ``(B, k, m)``, as they are now."""
        root, info = torch.linalg.cholesky_ex(self.left)
        self.info += info
        numbers = self.numbers[:, None, None]
        rows = self.factor[numbers, columns]
        half = torch.linalg.solve_triangular(root, rows.flatten(1, 2).mT, upper=False)
        half = half.unflatten(2, columns.shape[1:]).transpose(1, 2)
        inverse = -half.mT @ half
        inverse.diagonal(dim1=2, dim2=3).add_(1)
        moved = torch.cholesky_solve(self.lost.mT, root).mT
        weight = self.weight.mT[numbers, columns].mT + moved[:, None] @ rows.mT
        return weight, inverse / self.alpha[:, None, None, None]

    def _by_group(self, values: Tensor) -> Tensor:
        """Values of the slots, ``(B, ...)``, added up over the readers of each group."""
        total: Tensor = values.unflatten(0, (-1, self.groups)).sum(0)
        return total

    def remove(self, chosen: Tensor, labels: int) -> Tensor:
        """Remove ``chosen`` int64 ``(groups, c)`` jointly; their cost ahead of any norm, float64 ``(groups,)``."""
        chosen = chosen.repeat(len(self.slots) // self.groups, 1)
        columns = self.columns[self.numbers[:, None], self.place.gather(1, chosen)].flatten(1)
        weight, inverse = self._now(columns[:, None])
        weight, inverse = weight[:, 0], inverse[:, 0]
        if self.scale is not None:
            weight = weight / self.scale[:, :, None]
        cost = torch.linalg.solve_ex(inverse, weight.mT @ weight)[0].diagonal(dim1=1, dim2=2).sum(1)
        rows = self.factor[self.numbers[:, None], columns]
        self.lost += self.weight.mT[self.numbers[:, None], columns].mT @ rows
        self.left -= rows.mT @ rows
        return self._by_group(cost)

    def compact(self, gone: Tensor) -> None:
        """Nothing is stale here: what is removed is in neither sum."""

    def weights(self, gone: Tensor) -> Tensor:
        """Every slot's weights as they are now, float32 ``(B, o, d)``, zero in the removed columns."""
        root, _ = torch.linalg.cholesky_ex(self.left)
        weight = self.weight + torch.cholesky_solve(self.lost.mT, root).mT @ self.factor.mT
        if self.scale is not None:
            weight = weight / self.scale[:, :, None]
        out = gone.repeat(len(self.slots) // self.groups, 1)
        removed = torch.zeros(weight.shape[::2], dtype=torch.bool, device=weight.device)
        columns = self.columns.gather(1, self.place[:, :, None].expand_as(self.columns))
        removed.scatter_(1, columns.flatten(1), out.repeat_interleave(columns.shape[2], 1))
        return weight.float().masked_fill(removed[:, None], 0)

    def solved(self) -> Tensor:
        """For which groups every factorisation succeeded, bool ``(groups,)``."""
        return self._by_group(self.info) == 0
