"""New weights for the kept columns. Pure: moments and a kept set in, a full-size weight and a shift out.

The edited weight keeps its shape, with zeros in the removed columns; surgery cuts them out afterwards. The shift is
``(W − Ŵ) μ``: it is added to a bias or taken from a BatchNorm's running mean (docs/method.md, least squares).
"""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.errors import IndefiniteError
from modhifi.pruning.fidelity import compensation


def least_squares(weight: Tensor, second: Tensor, kept: Tensor, ridge: float = 1e-4) -> Tensor:
    """``Ŵ_K = (W S_{:,K} + λW_K)(S_KK + λI)⁻¹``, zero elsewhere.

    ``weight`` float64 ``(out, d)``, ``second`` float64 ``(d, d)``, ``kept`` bool ``(d,)``; λ is ``ridge`` times the
    mean diagonal of S. Damping grows tenfold, at most four times, if the factorisation fails. Returns ``(out, d)``.
    """
    return least_squares_towards(weight, second, second, kept, ridge)


def least_squares_towards(weight: Tensor, cross: Tensor, second: Tensor, kept: Tensor, ridge: float = 1e-4) -> Tensor:
    """``Ŵ_K = (W C_{:,K} + λW_K)(S_KK + λI)⁻¹``: the target is ``W x_d`` where the input is ``x_p``.

    ``cross`` float64 ``(d, d)`` is ``C = E[x_d x_pᵀ]``, ``second`` is ``S`` of ``x_p``, both centred or both not.
    """
    result = torch.zeros_like(weight)
    inner = second[kept][:, kept]
    scale = float(second.diagonal().mean()) or 1.0
    for attempt in range(5):
        damping = ridge * 10**attempt * scale
        damped = inner.clone()
        damped.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            target = weight @ cross[:, kept] + damping * weight[:, kept]
            result[:, kept] = torch.cholesky_solve(target.T, factor).T
            return result
    raise IndefiniteError


def scaled(weight: Tensor, second: Tensor, blocks: Tensor, kept: Tensor, ridge: float = 1e-4) -> Tensor:
    """The paper's compensation: each kept block of each output channel times its scalar δ*.

    ``blocks`` int64 ``(n, m)``, ``kept`` bool ``(n,)``. Columns outside every block stay as they are. With one column
    for each component and none outside, a scalar for every weight is as free as the weight: that is least squares,
    solved once for all output channels, with the ridge in units of S.
    """
    if blocks.shape == (weight.shape[1], 1):
        columns = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        columns[blocks[kept, 0]] = True
        return least_squares(weight, second, columns, ridge)
    chosen = torch.nonzero(kept).flatten()
    result = weight.clone()
    result[:, blocks[~kept].reshape(-1)] = 0
    scales = compensation(weight, second, blocks, chosen, ridge)
    for at, component in enumerate(chosen.tolist()):
        result[:, blocks[component]] = weight[:, blocks[component]] * scales[:, at : at + 1]
    return result


def masked(weight: Tensor, kept: Tensor) -> Tensor:
    """No compensation: zeros in the removed columns. ``kept`` bool ``(d,)``."""
    return weight * kept


def error_and_energy(weight: Tensor, edited: Tensor, second: Tensor) -> tuple[float, float]:
    """The expected squared change of a reader's output, ``tr[(W−Ŵ) S (W−Ŵ)ᵀ]``, and its energy ``tr[W S Wᵀ]``.

    If S is the covariance, the mean is taken to be restored. The energy needs only the columns that are left.
    """
    gap = weight - edited
    through = gap @ second
    error, used = max(0.0, float((through * gap).sum())), edited.any(0)
    own = edited[:, used]
    rest = ((own @ second[used][:, used]) * own).sum()
    return error, max(0.0, error + float(2 * (through * edited).sum() + rest))
