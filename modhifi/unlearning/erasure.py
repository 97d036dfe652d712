"""Erase what tells a class apart, at the readers or at the writers of a stream: closed forms on tensors.

The conventions are those of :mod:`modhifi.unlearning.methods`, which offers these functions beside the other methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi.errors import ModhifiError

# Where a Cholesky factorisation fails, the damping is multiplied by the next of these; the Edit records the result.
DAMPING_STEPS = (1.0, 10.0, 100.0, 1000.0)
# A direction weaker than this share of the strongest one counts as a combination of the others.
RANK_TOLERANCE = 1e-8
# Channels that their BatchNorm or layer scale attenuates below this share of the median cannot be written.
SCALE_FLOOR = 1e-3


@dataclass(frozen=True)
class Edit:
    """An operator's new weight, and what keeps the output at the retain mean where it was.

    ``weight``: ``(out, d)`` float64. ``shift``: ``(out,)`` float64, to be added to the bias, or subtracted from the
    ``running_mean`` of the BatchNorm behind the operator; None where the method asks for no change.
    ``damping``: the ridge used, in units of the mean diagonal of the matrix that was factorised; None where none was.
    """

    weight: Tensor
    shift: Tensor | None
    damping: float | None = None

    def blend(self, weight: Tensor, strength: float) -> Edit:
        """The edit ``strength`` of the way from the original ``weight`` ``(out, d)``: 0 is no change, 1 the edit."""
        original = weight.double()
        shift = None if self.shift is None else strength * self.shift
        return Edit(original + strength * (self.weight - original), shift, self.damping)


def pooled(means: Tensor, grams: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The mean ``(d,)`` and Gram ``(d, d)`` of a mixture of ``k`` populations.

    ``means``: ``(k, d)``, ``grams``: ``(k, d, d)``, ``weights``: ``k`` shares, normalised here.
    """
    share = torch.tensor(weights, dtype=torch.float64)
    share = share / share.sum()
    return torch.einsum("k,kd->d", share, means.double()), torch.einsum("k,kde->de", share, grams.double())


def erasing_projection(
    gram: Tensor,
    mean: Tensor,
    forget_means: Tensor,
    retain_mean: Tensor,
    *,
    extra: Tensor | None = None,
    centred: bool = True,
    damping: float = 1e-4,
) -> tuple[Tensor, float]:
    """The oblique projection ``P`` ``(d, d)`` onto what tells the forgotten classes apart, and the damping used.

    ``P = D (D^T S^-1 D)^-1 D^T S^-1`` with ``D`` spanned by ``mu_f - mu_r`` of every forgotten class and the ``extra``
    directions: of all ``P`` with ``P D = D`` the one with the least ``E |P (x - mu)|^2``. Not centred: also
    ``P mu_r = 0``. See :func:`erase` for the arguments, the source and what it raises.
    """
    gram, mean, retain_mean = gram.double(), mean.double(), retain_mean.double()
    basis = _directions(forget_means.double() - retain_mean, extra)
    held = basis
    if not centred and float(retain_mean.norm()) > 0:
        unit = retain_mean / retain_mean.norm()
        if float((unit - basis @ (basis.T @ unit)).norm()) < 1e-6:
            raise ModhifiError(
                "the retain mean is itself a direction to erase and this operator has no bias to keep it; "
                "leave the operator out or give it a bias"
            )
        held = torch.cat([basis, unit[:, None]], 1)
    factor, used = factorise(gram - torch.outer(mean, mean) if centred else gram, damping)
    read = torch.cholesky_solve(held, factor)
    coordinates = torch.linalg.solve(held.T @ read, read.T)
    return basis @ coordinates[: basis.shape[1]], used


def erase(
    weight: Tensor,
    gram: Tensor,
    mean: Tensor,
    forget_means: Tensor,
    retain_mean: Tensor,
    *,
    extra: Tensor | None = None,
    centred: bool = True,
    damping: float = 1e-4,
) -> Edit:
    """A reader that cannot tell the forgotten classes from the rest by any linear function: ``W' = W (I - P)``.

    ``weight``: ``(out, d)``. ``gram``, ``mean``: ``(d, d)``, ``(d,)`` of forget and retain samples pooled.
    ``forget_means``: ``(m, d)``, one row per forgotten class. ``retain_mean``: ``(d,)``. ``extra``: ``(k, d)`` further
    directions. ``shift = W P mu_r``, so that every forgotten class mean and the retain
    mean give one output, the retain mean's. Raises ModhifiError where the moments cannot be factorised, or where a
    reader without a place for the mean is asked to erase the retain mean itself.

    Limits: ``P`` is idempotent, a second pass on the same moments changes nothing; it is blind to what differs
    in higher moments than the mean unless ``extra`` names it. Source: least-squares concept erasure, LEACE, Belrose et
    al. 2023 (the mean taken at the retain samples); the form without a place for the mean is ours.
    """
    projection, used = erasing_projection(
        gram, mean, forget_means, retain_mean, extra=extra, centred=centred, damping=damping
    )
    original = weight.double()
    change = original @ projection
    return Edit(original - change, change @ retain_mean.double() if centred else None, used)


def erase_writers(
    weight: Tensor,
    forget_means: Tensor,
    forget_grams: Tensor,
    retain_mean: Tensor,
    retain_gram: Tensor,
    *,
    scale: Tensor | None = None,
    forget_weight: float = 0.1,
    extra: Tensor | None = None,
    exact: bool = False,
    centred: bool = True,
    damping: float = 1e-4,
) -> Edit:
    """A writer that subtracts from the residual stream what tells the forgotten classes apart there.

    ``weight``: ``(out, d)``. The moments are those of the joint rows ``v = [x, s]``, ``d + out`` long: ``x`` the
    writer's input, ``s`` the stream right after the writer's branch is added. ``forget_means``: ``(m, d + out)``,
    ``forget_grams``: ``(m, d + out, d + out)``, one for each forgotten class; ``retain_mean``: ``(d + out,)``,
    ``retain_gram``: ``(d + out, d + out)``. ``scale``: ``(out,)``, what stands between the writer's output and the
    stream: ``gamma / sqrt(var + eps)`` of a BatchNorm, a layer scale, or None for 1; channels with a scale near zero
    are left alone. ``extra``: ``(k, out)`` further directions of the stream. ``forget_weight``: the share of the
    forget samples in the pooled moments.

    With ``D`` the directions ``mu_f(s) - mu_r(s)``, ``A = S_s^-1 D (D^T S_s^-1 D)^-1`` and ``z = A^T (s - mu_r(s))``,
    ``D z`` is what LEACE would remove from ``s``. ``B`` predicts ``z`` from ``x - mu_r(x)`` by least squares, and the
    writer subtracts ``D B^T (x - mu_r(x))``: ``W' = W - diag(1 / scale) D B^T``, a change of rank ``m`` (+ ``k``).
    ``exact`` constrains ``B`` so that the class means of the stream coincide afterwards; without it they close as far
    as ``x`` explains them. Not centred (a plain Linear without bias): ``B^T mu_r(x) = 0``, and no shift.

    Raises ModhifiError where the moments cannot be factorised, or the constraints contradict each other. Limits:
    ungrouped writers; the class may survive in a nonlinear function of ``s``. Source: ours; the target is that of
    LEACE (Belrose et al. 2023).
    """
    original, width = weight.double(), weight.shape[1]
    retain_mean = retain_mean.double()
    # Everything about the retain mean: the projection is the same for any mixture, the regression is not.
    share = forget_weight / len(forget_means)
    # In place: these matrices are the largest there are.
    moments = about(retain_gram, retain_mean, retain_mean).mul_(1 - forget_weight)
    for class_mean, class_gram in zip(forget_means, forget_grams, strict=True):
        moments.add_(about(class_gram, class_mean, retain_mean), alpha=share)
    gaps = (forget_means.double() - retain_mean).T
    basis = _directions(gaps[width:].T, extra)
    stream, _ = factorise(moments[width:, width:], damping)
    read = torch.cholesky_solve(basis, stream)
    scores = torch.linalg.solve(basis.T @ read, read.T).T

    factor, used = factorise(moments[:width, :width], damping)
    predict = torch.cholesky_solve(moments[:width, width:] @ scores, factor)
    fixed, target = gaps.new_zeros(width, 0), gaps.new_zeros(0, basis.shape[1])
    if exact:
        fixed, target = gaps[:width], gaps[width:].T @ scores
    if not centred:
        fixed = torch.cat([fixed, retain_mean[:width, None]], 1)
        target = torch.cat([target, target.new_zeros(1, basis.shape[1])])
    if fixed.shape[1]:
        pull = torch.cholesky_solve(fixed, factor)
        # In units of squared standard deviations: a class gap below a thousandth of one is none.
        inverse = torch.linalg.pinv(fixed.T @ pull, atol=1e-6, hermitian=True)
        predict = predict + pull @ inverse @ (target - fixed.T @ predict)
        missed = (fixed.T @ predict - target).abs().max() if target.numel() else target.new_zeros(())
        if float(missed) > 1e-4:
            raise ModhifiError("the writer's input does not separate the forgotten classes; leave the writer out")
    change = basis @ predict.T
    if scale is not None:
        scale = scale.double()
        dead = scale.abs() < SCALE_FLOOR * scale.abs().median()
        change = torch.where(dead[:, None], 0.0, change / torch.where(dead, 1.0, scale)[:, None])
    return Edit(original - change, change @ retain_mean[:width] if centred else None, used)


def stress_classes(gram: Tensor, mean: Tensor, class_means: Tensor, shares: Tensor, weight: float) -> Tensor:
    """The Gram ``(d, d)`` of the retained samples with the spread of their class means counted ``1 + weight`` times.

    ``class_means`` ``(k, d)`` with ``shares`` ``(k,)``. An edit by :func:`erase_writers` takes from a sample as much as
    it looks like the forgotten class, and the classes most like that one pay; with a ``weight`` their means are kept
    where they are, as far as they do not coincide with the forgotten one's. Source: ours.
    """
    gaps = (class_means.double() - mean.double()) * shares.double().sqrt()[:, None]
    return torch.addmm(gram.double(), gaps.T, gaps, alpha=weight)


@dataclass(frozen=True)
class Norm:
    """The four vectors ``(channels,)`` float64 of a BatchNorm in eval mode."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor


def settle_norm(norm: Norm, mean: Tensor, variance: Tensor, eps: float) -> Norm:
    """The same function written with other statistics: ``mean`` and ``variance`` ``(channels,)`` of its input now.

    Behind an edited operator the stored statistics are those of the original; whoever re-estimates them on retain data
    rescales the edit and may bring the class back. Settled on the edited network's own retain statistics, the output
    is unchanged and such a re-estimation finds what is stored. ``gamma' = gamma sqrt((variance + eps) / (old + eps))``,
    ``beta' = beta + gamma (mean - old) / sqrt(old variance + eps)``. Limits: it closes this one way back, it erases
    nothing. Source: ours.
    """
    gain = norm.gamma.double() / torch.sqrt(norm.variance.double() + eps)
    mean, variance = mean.double(), variance.double()
    beta = norm.beta.double() + gain * (mean - norm.mean.double())
    return Norm(gain * torch.sqrt(variance + eps), beta, mean, variance)


def about(gram: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
    """The second moment about ``origin`` of samples with this Gram and mean."""
    mean, origin = mean.double(), origin.double()
    left, right = torch.stack([mean, origin], 1), torch.stack([-origin, origin - mean])
    return torch.addmm(gram.double(), left, right)


def mean_diagonal(matrix: Tensor) -> float:
    """The unit of damping; 1 for a matrix without energy, which any ridge makes solvable."""
    return float(matrix.diagonal().mean()) or 1.0


def factorise(matrix: Tensor, damping: float, unit: float | None = None) -> tuple[Tensor, float]:
    """The Cholesky factor of ``matrix + damping * unit * I``, and the first damping of the steps at which it exists.

    Of the symmetric ``matrix`` the lower triangle is read. ``unit`` defaults to its mean diagonal. Raises ModhifiError
    where every step fails.
    """
    unit = mean_diagonal(matrix) if unit is None else unit
    for step in DAMPING_STEPS:
        damped = matrix.clone()
        damped.diagonal().add_(damping * step * unit)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return factor, damping * step
    raise ModhifiError(
        f"the moments cannot be factorised even with damping {damping * DAMPING_STEPS[-1]:g}; "
        "use more samples or check them for NaN"
    )


def _directions(gaps: Tensor, extra: Tensor | None) -> Tensor:
    """An orthonormal basis ``(d, r)`` of the rows to erase: the projection depends on their span alone."""
    rows = gaps if extra is None else torch.cat([gaps, extra.double()])
    # Rows of very different length must not hide each other; rows of zero length name no direction.
    lengths = rows.norm(dim=1, keepdim=True)
    rows = rows[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    rank = int((values > RANK_TOLERANCE * values.max()).sum()) if len(rows) else 0
    basis: Tensor = vectors[:rank].T
    return basis
