"""Optimal Brain Surgeon on blocks for readers of fewer rows than columns, in the span of the rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modhifi.calibration.low_rank import LowRank
from modhifi.pruning.fidelity import singleton_fidelity
from modhifi.pruning.linalg import columns_at, rows_at
from modhifi.pruning.slots import Slot, by_group, components_first, scales_of

# The weights that are looked at together: what is made of them takes several times their memory.
PART = 2**24


class SpanStack:
    """What `gram_surgeon.GramStack` is, for slots whose second moment is ``S + λI = F Fᵀ + αI`` with few columns in F.

    With K the columns that are left and R those removed, ``M = F_KᵀF_K + αI`` and ``E = W_R F_R`` say all: the inverse
    of S on K is ``(I − F_K M⁻¹ F_Kᵀ) / α``, and least squares has made ``Ŵ_K = W_K + E M⁻¹ F_Kᵀ`` of the weights. Each
    slot has all components of its group; their columns stand first, component by component.
    """

    def __init__(self, slots: Sequence[Slot], groups: int, ridge: float) -> None:
        self.slots, self.groups = slots, groups
        parts = [slot.part for slot in slots]
        weight, device = pad_sequence([part.weight for part in parts], batch_first=True), parts[0].weight.device
        columns = torch.stack([part.columns[part.components.argsort()] for part in parts])
        self.n, self.m = columns.shape[1:]
        self.positions = components_first(columns.flatten(1), weight.shape[2]).to(device)
        self.columns = torch.arange(self.n * self.m, device=device).view(self.n, self.m)
        owner = torch.tensor([slot.group for slot in slots], device=device)
        self.place = owner[:, None] * self.n + torch.arange(self.n, device=device)
        seconds = [part.second for part in parts if isinstance(part.second, LowRank)]
        constant = torch.stack([second.constant for second in seconds])
        self.factor = rows_at(torch.stack([second.factor for second in seconds]), self.positions)
        self.weight = columns_at(weight, self.positions)
        del weight
        self.energy = by_group(LowRank(self.factor, constant).energy(self.weight), groups)
        outputs = max(1, PART // self.weight[:, 0].numel())
        fidelity = torch.vmap(lambda w, f, c: singleton_fidelity(w, LowRank(f, c), self.columns).amax(0))
        some = [fidelity(part, self.factor, constant) for part in self.weight.split(outputs, 1)]
        self.fidelity = torch.stack(some).amax(0)
        self.scale = scales_of(slots)
        if self.scale is not None:
            self.weight = self.weight * self.scale[:, :, None]
        unit = LowRank(self.factor, constant).diagonals().mean(1)
        self.alpha = (constant + ridge * torch.where(unit == 0, 1.0, unit))[:, None]
        self.left = torch.bmm(self.factor.mT, self.factor)
        self.left.diagonal(dim1=1, dim2=2).add_(self.alpha)
        self.moved = self.weight.new_zeros(len(slots), self.factor.shape[2], self.weight.shape[1])
        self.now: tuple[Tensor, Tensor] | None = None
        self.prices = [self.weight.new_zeros(len(slots))]
        self.infos = list[Tensor]()

    def _now(self) -> tuple[Tensor, Tensor]:
        """``M^(-1/2) Fᵀ`` ``(B, r, d)`` and the weights ``(B, o, d)``, as they are now."""
        if self.now is None:
            root, info = torch.linalg.cholesky_ex(self.left)
            self.infos.append(info)
            half = torch.linalg.solve_triangular(root, self.factor.mT, upper=False)
            moved = torch.linalg.solve_triangular(root, self.moved, upper=False)
            self.now = half, torch.baddbmm(self.weight, moved.mT, half)
        return self.now

    def costs(self) -> Tensor:
        """``tr[W_I H_II⁻¹ W_Iᵀ]`` of each component alone, added up over the readers, float64 ``(groups, n)``."""
        now = self._now()
        some = max(1, PART // (self.m * now[1][:, :, 0].numel())) * self.m
        parts = zip(*(x[:, :, : self.n * self.m].split(some, 2) for x in now), strict=True)
        costs = [
            _cost(*(x.unflatten(2, (-1, self.m)).transpose(1, 2).flatten(0, 1) for x in part)).view(len(self.slots), -1)
            for part in parts
        ]
        return by_group(torch.cat(costs, 1) * self.alpha, self.groups)

    def remove(self, chosen: Tensor, labels: int) -> None:
        """Remove ``chosen`` int64 ``(groups, c)`` jointly."""
        columns = self.columns[chosen.repeat(len(self.slots) // self.groups, 1)].flatten(1)
        half, weight = (now.gather(2, columns[:, None].expand(-1, now.shape[1], -1)) for now in self._now())
        if self.scale is not None:
            weight = weight / self.scale[:, :, None]
        self.prices.append(_cost(half, weight) * self.alpha[:, 0])
        rows = self.factor.gather(1, columns[:, :, None].expand(-1, -1, self.factor.shape[2]))
        own = self.weight.gather(2, columns[:, None].expand(-1, self.weight.shape[1], -1))
        self.moved.baddbmm_(rows.mT, own.mT)
        self.left.baddbmm_(rows.mT, rows, alpha=-1)
        self.now = None

    def compact(self, gone: Tensor) -> None:
        """Nothing is stale here: what is removed is in neither sum."""

    def lost(self) -> Tensor:
        """What all that is removed costs ahead of any norm, after each step, float64 ``(groups, steps + 1)``."""
        return by_group(torch.stack(self.prices, 1).cumsum(1), self.groups)

    def weights(self, gone: Tensor) -> Tensor:
        """Every slot's weights as they are now, float32 ``(B, o, d)``, zero in the removed columns."""
        weight = self._now()[1]
        if self.scale is not None:
            weight = weight / self.scale[:, :, None]
        removed = gone.view(-1)[self.place].repeat_interleave(self.m, 1)
        zeros = torch.nn.functional.pad(removed, (0, weight.shape[2] - removed.shape[1]))[:, None]
        weight = weight.to(torch.float32, copy=True).masked_fill_(zeros, 0)
        return torch.empty_like(weight).scatter_(2, self.positions[:, None].expand_as(weight), weight)

    def solved(self) -> Tensor:
        """For which groups every factorisation succeeded, bool ``(groups,)``."""
        failures = torch.stack([torch.zeros_like(self.place[:, 0]), *self.infos]).sum(0)
        return by_group(failures, self.groups) == 0


def _cost(half: Tensor, weight: Tensor) -> Tensor:
    """``tr[W (I − hᵀh)⁻¹ Wᵀ]`` of weights ``(N, o, m)`` and ``h`` ``(N, r, m)``, ``(N,)``."""
    identity = torch.eye(half.shape[2], dtype=half.dtype, device=half.device)
    inverse = torch.baddbmm(identity, half.mT, half, alpha=-1)
    root, info = torch.linalg.cholesky_ex(inverse)
    solved: Tensor = torch.linalg.matrix_norm(torch.linalg.solve_triangular(root, weight.mT, upper=False)).square()
    return solved.masked_fill(info != 0, 0)
