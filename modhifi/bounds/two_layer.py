"""Tighter bounds of blocks of two linear layers with an elementwise activation between them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from modhifi.bounds.operator_norms import spectral_norm
from modhifi.errors import ModhifiError

_EPS = torch.finfo(torch.float64).eps
# The scale of T, in multiples of the smallest one that is feasible; 2 with T = I is the product of the two norms.
_SCALES = (1.0002, 1.01, 1.05, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5)


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale two weights (h, ...) and (out, h, ...) so that each hidden channel's row and column norms agree.

    `second / d` and `d * first` with any positive d bound the same block, because an elementwise activation's slopes
    commute with a diagonal: take the smaller product of norms, before or after. float64; also for the kernels of two
    ungrouped convolutions. Slopes must be elementwise (not max_min), with nothing else between the two.
    """
    hidden = first.shape[0]
    if second.shape[1] != hidden:
        raise ModhifiError(f"a layer of {hidden} outputs cannot feed one of {second.shape[1]} inputs; check the pair")
    one, two = first.detach().double(), second.detach().double()
    rows = one.reshape(hidden, -1).norm(dim=1)
    columns = two.transpose(0, 1).reshape(hidden, -1).norm(dim=1)
    scale = torch.where((rows > 0) & (columns > 0), (columns / rows).sqrt(), torch.ones_like(rows))
    return one * _along(scale, one, 0), two / _along(scale, two, 1)


def two_layer_bound(first: Tensor, second: Tensor, slopes: tuple[float, float] = (0.0, 1.0)) -> float:
    """An upper bound of the Lipschitz constant of `second @ phi(first @ x)`, slopes of phi in a given interval.

    `first` is (h, in), `second` (out, h). The smallest of: the product of norms, the same after diagonal rescaling,
    and for slopes in [0, 1] `L^2 = ||W1' T (2T - W2' W2)^-1 T W1||` for diagonal T with `2T - W2' W2` positive
    definite, proven by a Cholesky factorisation. Other intervals [a, b]: phi = a x + (b - a) psi, psi in [0, 1].
    Source: LipSDP (Fazlyab et al., NeurIPS 2019) without a solver; docs/bounds.md, R1.
    """
    low, high = slopes
    one, two = first.detach().double(), second.detach().double()
    balanced_one, balanced_two = balanced(one, two)
    product = min(
        spectral_norm(one) * spectral_norm(two),
        spectral_norm(balanced_one) * spectral_norm(balanced_two),
    )
    bound = max(abs(low), abs(high)) * product
    used = (one.norm(dim=1) > 0) & (two.norm(dim=0) > 0)
    if not bool(used.any()):
        return 0.0
    unit = _slope_restricted(one[used], two[:, used])
    linear = abs(low) * spectral_norm(two @ one) if low else 0.0
    centred = abs(low + high) / 2 * spectral_norm(two @ one) + (high - low) / 2 * product
    return min(bound, linear + (high - low) * unit, centred) * (1 + 1e-12)


def _slope_restricted(one: Tensor, two: Tensor) -> float:
    """The best certified bound for slopes in [0, 1] over a few directions and scales of T; infinite if none is."""
    gram = two.mT @ two
    candidates: list[tuple[float, Tensor]] = []
    for direction in _directions(one, gram):
        root = direction.sqrt()
        values, vectors = torch.linalg.eigh(gram / root[:, None] / root)
        rotated = vectors.mT @ (root[:, None] * one)
        for scale in _SCALES:
            t = float(values[-1]) / 2 * scale
            # T (2T - G)^-1 T = t^2 D^(1/2) V (2t - values)^-1 V' D^(1/2) for T = t D: one eigenbasis serves every t.
            weighted = rotated / (2 * t - values).clamp(min=_EPS * t).sqrt()[:, None]
            candidates.append((t * spectral_norm(weighted), t * direction))
    for estimate, diagonal in sorted(candidates, key=lambda pair: pair[0]):
        bound = certified(one, two, diagonal)
        # A certificate far above its estimate met a badly conditioned T: the next candidate may do better.
        if bound <= estimate * (1 + 1e-6):
            return bound
    return math.inf


def certified(first: Tensor, second: Tensor, diagonal: Tensor) -> float:
    """The LipSDP bound for one diagonal T (h,), slopes in [0, 1]; infinite where Cholesky cannot prove T feasible.

    A margin above the factorisation's rounding error is taken off the matrix first, so success in floating point
    proves positive definiteness, and the residual of the triangular solve is added to the result.
    """
    one, two, t = first.detach().double(), second.detach().double(), diagonal.detach().double()
    hidden = len(t)
    matrix = torch.diag(2 * t) - two.mT @ two
    # Cholesky's backward error is below (h + 2) eps times the trace, the Gram product's below out * eps * trace.
    margin = 4 * (hidden + len(two) + 4) * _EPS * float(2 * t.sum() + two.pow(2).sum())
    factor, failed = torch.linalg.cholesky_ex(matrix - margin * torch.eye(hidden, dtype=torch.float64))
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return math.inf
    target = t[:, None] * one
    solved = torch.linalg.solve_triangular(factor, target, upper=False)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(hidden, dtype=torch.float64), upper=False)
    residual = float((factor @ solved - target).norm())
    # The residual itself is known only to the rounding of its products.
    residual += 2 * (hidden + 2) * _EPS * (float(factor.norm()) * float(solved.norm()) + float(target.norm()))
    return spectral_norm(solved) + 2 * float(inverse.norm()) * residual


def _directions(one: Tensor, gram: Tensor) -> Iterator[Tensor]:
    yield torch.ones(len(gram), dtype=torch.float64)
    energy = gram.diagonal()
    yield (energy.sqrt() / one.norm(dim=1)).clamp(min=1e-150)
    yield energy.clamp(min=1e-150)
    yield gram.abs().sum(dim=1)
    # Weighted diagonal dominance: sum_j |G_ij| q_j / q_i with q the root of the energies.
    q = energy.sqrt()
    yield (gram.abs() @ q) / q


def _along(scale: Tensor, weight: Tensor, axis: int) -> Tensor:
    shape = [1] * weight.ndim
    shape[axis] = -1
    return scale.reshape(shape)
