"""Second moments of few rows and many columns: never made, worked with in the span of the rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrices ``S = F Fᵀ + c I``: ``factor`` float64 ``(..., d, r)``, ``constant`` float64 ``(...,)``.

    It stands where ``(..., d, d)`` would, in the memory of its factor. ``weight @ second`` is a tensor.
    """

    factor: Tensor
    constant: Tensor

    def __len__(self) -> int:
        return len(self.factor)

    def __getitem__(self, group: int) -> LowRank:
        return LowRank(self.factor[group], self.constant[group])

    def __rmatmul__(self, weight: Tensor) -> Tensor:
        return (weight @ self.factor) @ self.factor.mT + weight * self.constant[..., None, None]

    def energy(self, weight: Tensor) -> Tensor:
        """``tr[W S Wᵀ]`` of weights ``(..., o, d)``, ``(...,)``, without a product of their size."""
        spanned, own = (torch.linalg.matrix_norm(x).square() for x in (weight @ self.factor, weight))
        total: Tensor = spanned + self.constant * own
        return total

    def product(self, weight: Tensor, columns: Tensor) -> Tensor:
        """``W S_{:,K}`` ``(o, k)`` of one matrix, without the other columns."""
        return weight[:, columns].mul_(self.constant).addmm_(weight @ self.factor, self.factor[columns].mT)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrices."""
        return (*self.factor.shape[:-1], self.factor.shape[-2])

    @cached_property
    def inner(self) -> Tensor:
        """``FᵀF``, ``(..., r, r)``, which has the eigenvalues of ``F Fᵀ``."""
        return self.factor.mT @ self.factor

    def diagonals(self) -> Tensor:
        """The diagonals, ``(..., d)``."""
        return self.factor.square().sum(-1) + self.constant[..., None]

    def squares(self) -> Tensor:
        """``‖S‖²`` of each matrix, ``(...,)``."""
        both = self.constant * self.inner.diagonal(dim1=-2, dim2=-1).sum(-1)
        return self.inner.square().sum((-1, -2)) + 2 * both + self.factor.shape[-2] * self.constant.square()

    def shrunk(self, share: Tensor, scale: Tensor) -> LowRank:
        """``(1 − share) S + share · scale · I``."""
        return LowRank(self.factor * (1 - share).sqrt()[..., None, None], self.constant * (1 - share) + share * scale)

    def to(self, device: torch.device) -> LowRank:
        """The same on another device."""
        return LowRank(self.factor.to(device), self.constant.to(device))

    def times_inverse(self, weight: Tensor, ridge: float) -> Tensor:
        """``W (S + ridge I)⁻¹`` ``(o, d)``, of one matrix; by Woodbury's identity only r columns are solved for."""
        alpha = self.constant + ridge
        inner = self.inner.clone()
        inner.diagonal().add_(alpha)
        root = torch.linalg.cholesky(inner)
        solved = torch.cholesky_solve((weight @ self.factor).mT, root)
        return torch.addmm(weight, solved.mT, self.factor.mT, alpha=-1).div_(alpha)

    def restricted(self, columns: Tensor) -> LowRank:
        """The matrix of some columns, of one matrix."""
        return replace(self, factor=self.factor[columns])

    def blocks(self, columns: Tensor) -> Tensor:
        """The blocks of S that belong to ``columns`` int64 ``(n, m)``, ``(n, m, m)``, of one matrix."""
        rows = self.factor[columns]
        result = rows @ rows.mT
        result.diagonal(dim1=1, dim2=2).add_(self.constant)
        return result

    def dense(self) -> Tensor:
        """The matrices themselves, ``(..., d, d)``."""
        result = self.factor @ self.factor.mT
        result.diagonal(dim1=-2, dim2=-1).add_(self.constant[..., None])
        return result


Second = Tensor | LowRank
"""A second moment ``(..., d, d)``, or what stands for it."""


def as_tensor(second: Second) -> Tensor:
    """The second moment as a tensor, for whoever needs all of its entries."""
    return second.dense() if isinstance(second, LowRank) else second


def add_outer(second: Second, vector: Tensor) -> Second:
    """``S + v vᵀ`` of each matrix; ``vector`` ``(..., d)``."""
    if isinstance(second, LowRank):
        return replace(second, factor=torch.cat([second.factor, vector[..., None]], -1))
    return second + vector[..., None] * vector[..., None, :]


def mixed(parts: Sequence[tuple[float, Second]]) -> Second:
    """The weighted sum of second moments, in the span of all their rows where each stands in that of its own."""
    spanned = [(weight, second) for weight, second in parts if isinstance(second, LowRank)]
    if len(spanned) == len(parts):
        factor = torch.cat([weight**0.5 * second.factor for weight, second in spanned], -1)
        return LowRank(factor, torch.stack([weight * second.constant for weight, second in spanned]).sum(0))
    total = torch.zeros_like(as_tensor(parts[0][1]))
    for weight, second in parts:
        total.add_(as_tensor(second), alpha=weight)
    return total
