"""Damped factorisations and inverses, and second moments shrunk towards what few rows can tell. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from modhifi.calibration.low_rank import LowRank, Second
from modhifi.errors import IndefiniteError

# How often a ridge grows tenfold, where rounding has made a matrix indefinite, before that is an error.
GROWTHS = 4
# Matrices of at most so many columns are inverted at once, larger ones by halves. On a CPU a large one at once is
# slower, on a GPU many small ones are.
LEAF, LEAF_ON_GPU = 256, 1024


def diagonals(second: Second) -> Tensor:
    """The diagonal of each matrix of ``(G, d, d)``, ``(G, d)``."""
    return second.diagonals() if isinstance(second, LowRank) else second.diagonal(dim1=1, dim2=2)


def mean_diagonal(second: Second) -> Tensor:
    """``tr S / d`` of each matrix of ``(G, d, d)``, ``(G,)``."""
    return diagonals(second).mean(1)


def shrinkage(second: Second, rows: int | Tensor) -> Tensor:
    """The share of the identity that Oracle Approximating Shrinkage derives from the rows, float64 ``(G,)`` in [0, 1].

    ``second`` float64 ``(G, d, d)`` is of ``rows`` rows, one number or int64 ``(G,)``. Source: Chen, Wiesel, Eldar,
    Hero, IEEE Transactions on Signal Processing 2010.
    """
    d = second.shape[-1]
    traces = diagonals(second).sum(1).square()
    if isinstance(second, LowRank):
        squares = second.squares()
    else:
        squares = torch.linalg.vector_norm(second, dim=(1, 2)).square()
    gap = (rows + 1 - 2 / d) * (squares - traces / d)
    return torch.where(gap > 0, ((1 - 2 / d) * squares + traces) / gap, 1.0).clamp(0.0, 1.0)


@overload
def shrunk(second: Tensor, share: Tensor, scale: Tensor) -> Tensor: ...
@overload
def shrunk(second: LowRank, share: Tensor, scale: Tensor) -> LowRank: ...
def shrunk(second: Second, share: Tensor, scale: Tensor) -> Second:
    """``(1 − share) S + share · scale · I``; ``second`` ``(G, d, d)``, ``share`` and ``scale`` ``(G,)``."""
    if isinstance(second, LowRank):
        return second.shrunk(share, scale)
    result = second * (1 - share[:, None, None])
    result.diagonal(dim1=1, dim2=2).add_((share * scale)[:, None])
    return result


def damping_unit(matrix: Tensor) -> float:
    """The mean diagonal of a matrix ``(d, d)``, in whose units damping is given; 1 for a matrix without energy."""
    return float(matrix.diagonal().mean()) or 1.0


def factorise(matrix: Tensor, ridge: float, unit: float | None = None) -> tuple[Tensor, float]:
    """The lower Cholesky factor of ``matrix + λI`` and the ridge used, where λ is the ridge times ``unit``.

    ``matrix`` is symmetric ``(d, d)``, of which the lower triangle is read; ``unit`` defaults to :func:`damping_unit`.
    The ridge grows tenfold, up to ``GROWTHS`` times, until a factor exists. Raises :class:`IndefiniteError` where none
    does.
    """
    return _first_damped(matrix, ridge, unit, _cholesky)


def damped_inverse(matrices: Tensor, ridge: float) -> Tensor:
    """``(matrix + λI)⁻¹`` of each of ``(..., d, d)``, with the damping, and the error, of :func:`factorise`."""
    unit = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = matrices.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_((ridge * torch.where(unit == 0, 1.0, unit))[..., None])
    result = _inverse(damped)
    if result is None:  # one of them: each has its own damping
        alone = [_first_damped(m, ridge, None, _inverse)[0] for m in matrices.reshape(-1, *matrices.shape[-2:])]
        result = torch.stack(alone).view_as(matrices)
    return result


def _first_damped(
    matrix: Tensor, ridge: float, unit: float | None, decompose: Callable[[Tensor], Tensor | None]
) -> tuple[Tensor, float]:
    unit = damping_unit(matrix) if unit is None else unit
    for growth in range(GROWTHS + 1):
        grown = ridge * 10**growth
        damped = matrix.clone()
        damped.diagonal().add_(grown * unit)
        result = decompose(damped)
        if result is not None:
            return result, grown
    raise IndefiniteError


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factors of symmetric matrices ``(..., d, d)``; None if one is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if bool(info.any()) else factor


def _inverse(matrix: Tensor) -> Tensor | None:
    """Inverses of positive definite matrices ``(..., d, d)`` by halves, nearly all of it in matrix products.

    None if one is not positive definite. LAPACK's own (``cholesky_inverse``) does less work, but on busy cores its
    threads wait for each other.
    """
    n = matrix.shape[-1]
    if n <= _leaf(matrix):
        factor = _cholesky(matrix)
        if factor is None:
            return None
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        root: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(matrix), upper=False)
        return root.mT @ root
    half = n // 2
    head = _inverse(matrix[..., :half, :half])
    if head is None:
        return None
    cross = head @ matrix[..., :half, half:]
    tail = _inverse(_minus(matrix[..., half:, half:].clone(), matrix[..., half:, :half], cross))
    if tail is None:
        return None
    result = torch.empty_like(matrix)
    result[..., half:, half:] = tail
    corner = cross @ -tail
    result[..., :half, half:] = corner
    result[..., half:, :half] = corner.mT
    result[..., :half, :half] = _minus(head, corner, cross.mT)
    return result


def _leaf(matrix: Tensor) -> int:
    return LEAF if matrix.device.type == "cpu" else LEAF_ON_GPU


def _minus(result: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``result -= left right`` in place, for symmetric products: of what lies off the diagonal, half is computed."""
    half = result.shape[-1] // 2
    if half < _leaf(result):
        return result.sub_(left @ right)
    _minus(result[..., :half, :half], left[..., :half, :], right[..., :half])
    _minus(result[..., half:, half:], left[..., half:, :], right[..., half:])
    result[..., :half, half:].sub_(left[..., :half, :] @ right[..., half:])
    result[..., half:, :half] = result[..., :half, half:].mT
    return result
