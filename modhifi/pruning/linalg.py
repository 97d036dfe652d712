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


def rows_at(matrices: Tensor, places: Tensor) -> Tensor:
    """The rows of each of ``(B, r, c)`` at its ``places``, int64 ``(B, p)``."""
    return matrices[torch.arange(len(places), device=places.device)[:, None], places]


def columns_at(matrices: Tensor, places: Tensor) -> Tensor:
    """The columns of each of ``(B, r, c)`` at its ``places``, int64 ``(B, p)``."""
    # take_along_dim would write an index as large as the result
    return matrices.gather(2, places[:, None].expand(-1, matrices.shape[1], -1))


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
    gap = (squares - traces / d) * (rows + 1 - 2 / d)
    return torch.where(gap > 0, traces.add(squares, alpha=1 - 2 / d) / gap, 1.0).clamp(0.0, 1.0)


@overload
def shrunk(second: Tensor, share: Tensor, scale: Tensor) -> Tensor: ...
@overload
def shrunk(second: LowRank, share: Tensor, scale: Tensor) -> LowRank: ...
def shrunk(second: Second, share: Tensor, scale: Tensor) -> Second:
    """``(1 − share) S + share · scale · I``; ``second`` ``(G, d, d)``, ``share`` and ``scale`` ``(G,)``."""
    if isinstance(second, LowRank):
        return second.shrunk(share, scale)
    result = second * (1 - share).view(-1, 1, 1)
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
    return _first_damped(matrix, ridge, damping_unit(matrix) if unit is None else unit, _cholesky)


def damped_inverse(matrices: Tensor, ridge: float) -> Tensor:
    """``(matrix + λI)⁻¹`` of each of ``(B, d, d)``, with the damping, and the error, of :func:`factorise`."""
    unit = matrices.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    damped = matrices.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge * torch.where(unit == 0, 1.0, unit))
    result = _checked_inverse(damped)
    if result is None:  # one of them: each has its own damping
        result = torch.cat([_first_damped(m[None], ridge, damping_unit(m), _checked_inverse)[0] for m in matrices])
    return result


def _first_damped(
    matrix: Tensor, ridge: float, unit: float, decompose: Callable[[Tensor], Tensor | None]
) -> tuple[Tensor, float]:
    for growth in range(GROWTHS + 1):
        grown = ridge * 10**growth
        damped = matrix.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(grown * unit)
        result = decompose(damped)
        if result is not None:
            return result, grown
    raise IndefiniteError


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factors of symmetric matrices ``(..., d, d)``; None if one is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if bool(info.any()) else factor


def _checked_inverse(matrix: Tensor) -> Tensor | None:
    """Inverses of symmetric matrices ``(B, d, d)``; None if one is not positive definite."""
    infos: list[Tensor] = []
    result = _inverse(matrix, infos)
    return None if bool(torch.stack(infos).any()) else result


def _inverse(matrix: Tensor, infos: list[Tensor]) -> Tensor:
    """Inverses of positive definite matrices ``(B, d, d)`` by halves, nearly all of it in matrix products.

    What is put into ``infos`` is 0 where they are positive definite. LAPACK's own (``cholesky_inverse``) does less
    work, but on busy cores its threads wait for each other.
    """
    n = matrix.shape[-1]
    if n <= _leaf(matrix):
        factor, info = torch.linalg.cholesky_ex(matrix)
        infos.append(info)
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        root: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        return torch.bmm(root.mT, root)
    first, across, below, last = _quarters(matrix)
    head = _inverse(first, infos)
    cross = torch.bmm(head, across)
    tail = _inverse(_minus(last.clone(), below, cross), infos)
    corner = torch.bmm(cross, tail).neg_()
    result = torch.empty_like(matrix)
    blocks = _minus(head, corner, cross.mT), corner, corner.mT, tail
    for place, block in zip(_quarters(result), blocks, strict=True):
        place.copy_(block)
    return result


def _quarters(matrix: Tensor) -> tuple[Tensor, ...]:
    """The four blocks of matrices ``(B, d, d)``, row by row: views."""
    half = matrix.shape[-1] // 2
    sizes = [half, matrix.shape[-1] - half]
    return tuple(block for rows in matrix.split(sizes, 1) for block in rows.split(sizes, 2))


def _leaf(matrix: Tensor) -> int:
    return LEAF if matrix.device.type == "cpu" else LEAF_ON_GPU


def _minus(result: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``result -= left right`` in place, for symmetric products: of what lies off the diagonal, half is computed."""
    half = result.shape[-1] // 2
    if half < _leaf(result):
        return result.baddbmm_(left, right, alpha=-1)
    sizes = [half, result.shape[-1] - half]
    (first, across, below, last), rows, columns = _quarters(result), left.split(sizes, 1), right.split(sizes, 2)
    _minus(first, rows[0], columns[0])
    _minus(last, rows[1], columns[1])
    below.copy_(across.baddbmm_(rows[0], columns[1], alpha=-1).mT)
    return result
