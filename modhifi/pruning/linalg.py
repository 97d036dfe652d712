"""Damped inverses, and matrices of second moments shrunk towards what few rows can tell."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.errors import IndefiniteError


def mean_diagonal(second: Tensor) -> Tensor:
    """``tr S / d``, ``(G,)``."""
    return second.diagonal(dim1=1, dim2=2).mean(1)


def shrinkage(second: Tensor, rows: int) -> Tensor:
    """The share of the identity in :func:`applied_second`, float64 ``(G,)`` in [0, 1]."""
    d = second.shape[-1]
    trace = second.diagonal(dim1=1, dim2=2).sum(1)
    squares = torch.linalg.vector_norm(second, dim=(1, 2)).square()
    gap = (rows + 1 - 2 / d) * (squares - trace.square() / d)
    share = ((1 - 2 / d) * squares + trace.square()) / gap.clamp_min(1e-300)
    return torch.where(gap > 0, share, torch.ones_like(share)).clamp(0.0, 1.0)


def shrunk(second: Tensor, share: Tensor, scale: Tensor) -> Tensor:
    """``(1 − share) S + share · scale · I``; ``second`` ``(G, d, d)``, ``share`` and ``scale`` ``(G,)``."""
    result = second * (1 - share[:, None, None])
    result.diagonal(dim1=1, dim2=2).add_((share * scale)[:, None])
    return result


def damped_inverse(second: Tensor, ridge: float) -> Tensor:
    """``(S + λI)⁻¹`` with λ = ``ridge`` times the mean diagonal.

    If the matrix is not positive definite, λ grows tenfold up to four times; then it is an error.
    """
    scale = float(second.diagonal().mean()) or 1.0
    for attempt in range(5):
        damped = second.clone()
        damped.diagonal().add_(ridge * 10**attempt * scale)
        inverse = _inverse(damped)
        if inverse is not None:
            return inverse
    raise IndefiniteError


def _inverse(matrix: Tensor) -> Tensor | None:
    """Inverse of a positive definite matrix by halves, nearly all of it in matrix products; None if it is not one.

    LAPACK's own (``cholesky_inverse``) does less work, but on busy cores its threads wait for each other.
    """
    n = len(matrix)
    if n <= 256:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            return None
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        root: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        return root.T @ root
    half = n // 2
    head = _inverse(matrix[:half, :half])
    if head is None:
        return None
    cross = head @ matrix[:half, half:]
    tail = _inverse(_minus(matrix[half:, half:].clone(), matrix[half:, :half], cross))
    if tail is None:
        return None
    result = torch.empty_like(matrix)
    result[half:, half:] = tail
    corner = cross @ -tail
    result[:half, half:] = corner
    result[half:, :half] = corner.T
    result[:half, :half] = _minus(head, corner, cross.T)
    return result


def _minus(result: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``result -= left right`` in place, for a symmetric product: of what lies off the diagonal, half is computed."""
    half = len(result) // 2
    if half < 256:
        return result.addmm_(left, right, alpha=-1)
    _minus(result[:half, :half], left[:half], right[:, :half])
    _minus(result[half:, half:], left[half:], right[:, half:])
    result[:half, half:].addmm_(left[:half], right[:, half:], alpha=-1)
    result[half:, :half] = result[:half, half:].T
    return result
