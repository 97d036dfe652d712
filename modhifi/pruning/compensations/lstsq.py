"""Least squares over everything that stays: one factorisation for all output channels."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.calibration.low_rank import LowRank, Second
from modhifi.pruning.compensations.base import COMPENSATIONS, Compensation, kept_columns
from modhifi.pruning.linalg import damping_unit, factorise


def least_squares(weight: Tensor, second: Second, kept: Tensor, ridge: float = 1e-4) -> Tensor:
    """``Ŵ_K = (W S_{:,K} + λW_K)(S_KK + λI)⁻¹``, zero elsewhere, float64 ``(o, d)``.

    ``weight`` float64 ``(o, d)``, ``second`` float64 ``(d, d)``, ``kept`` bool ``(d,)``; λ is ``ridge`` times the
    mean diagonal of S. Raises :class:`modhifi.errors.IndefiniteError`.
    """
    if not isinstance(second, LowRank):
        return least_squares_towards(weight, second, second, kept, ridge)
    unit = float(second.diagonals().mean()) or 1.0
    target = second.product(weight, kept)
    result = torch.zeros_like(weight)
    result[:, kept] = regression(weight[:, kept], target, second.restricted(kept), unit, ridge)
    return result


def least_squares_towards(weight: Tensor, cross: Tensor, second: Tensor, kept: Tensor, ridge: float = 1e-4) -> Tensor:
    """``Ŵ_K = (W C_{:,K} + λW_K)(S_KK + λI)⁻¹``: the target is ``W x_d`` where the input is ``x_p``.

    ``cross`` float64 ``(d, d)`` is ``C = E[x_d x_pᵀ]``, ``second`` is ``S`` of ``x_p``, both centred or both not; the
    rest and the error as in :func:`least_squares`.
    """
    target = weight @ cross[:, kept]
    result = torch.zeros_like(weight)
    result[:, kept] = regression(weight[:, kept], target, second[kept][:, kept], damping_unit(second), ridge)
    return result


def regression(weight: Tensor, target: Tensor, second: Second, unit: float, ridge: float) -> Tensor:
    """``(T + λW)(S + λI)⁻¹`` float64 ``(o, k)``: weights ``W`` moved to where their outputs' products with x are T.

    ``weight`` and ``target`` ``E[y xᵀ]`` are float64 ``(o, k)``, ``second`` is ``E[x xᵀ]``, and λ is the ridge times
    ``unit``. Raises :class:`modhifi.errors.IndefiniteError`.
    """
    if isinstance(second, LowRank):
        return second.times_inverse(target + ridge * unit * weight, ridge * unit)
    factor, used = factorise(second, ridge, unit)
    return torch.cholesky_solve((target + used * unit * weight).T, factor).T


def edit(weight: Tensor, second: Second, blocks: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """:func:`least_squares` over the columns that stay, in blocks or outside."""
    return least_squares(weight, second, kept_columns(weight.shape[1], blocks, kept), ridge)


COMPENSATIONS.register(
    Compensation(
        "lstsq",
        "least squares over all that stays",
        "He, Zhang, Sun 2017 (arXiv 1707.06168), here with a ridge, for all output channels at once",
        edit,
        least_squares=True,
    )
)
