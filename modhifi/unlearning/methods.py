"""Closed forms that make a linear operator forget a class: tensors in, an :class:`Edit` out, no models.

Every function takes the operator's weight as ``(out, d)`` (a convolution flattened over its patch axis, one call per
convolution group), computes in float64 and returns float64. ``x`` is the operator's input row, ``mean`` is ``E[x]`` and
``gram`` is ``E[x x^T]``, both estimated on the samples that the argument names. ``centred`` says that the operator has
a place for a mean (a bias, or a BatchNorm behind it); without one, the edits leave the output at the retain mean alone.
The formulas are those of docs/unlearning.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.unlearning.erasure import (
    Edit,
    Norm,
    about,
    erase,
    erase_writers,
    erasing_projection,
    factorise,
    mean_diagonal,
    pooled,
    settle_norm,
    stress_classes,
)

__all__ = [
    "Edit",
    "Norm",
    "contrastive",
    "erase",
    "erase_writers",
    "erasing_projection",
    "gls",
    "head_mask",
    "hifi_negate",
    "hifi_zero",
    "pooled",
    "projection",
    "settle_norm",
    "stress_classes",
]

# The bias that closes an output: finite in half precision, and zero after any softmax.
CLOSED = -1e4


def gls(
    weight: Tensor,
    forget_gram: Tensor,
    forget_mean: Tensor,
    retain_gram: Tensor,
    retain_mean: Tensor,
    *,
    strength: float,
    centred: bool = True,
    damping: float = 1e-4,
) -> Edit:
    """Generalised least squares between keeping the retain output and pulling the forget output to the retain mean's.

    ``weight``: ``(out, d)``; means ``(d,)``, Grams ``(d, d)``. Minimises ``E_r |(W' - W)(x - mu_r)|^2 + rho |W' - W|^2
    + lambda E_f |W' (x - mu_r)|^2``: ``W' = W R (R + lambda F)^-1`` with ``R``, ``F`` the second moments of retain and
    forget samples about the retain mean, ``rho = damping`` of the mean diagonal of ``R`` and
    ``lambda = strength * tr R / tr F``. Not centred: ``R``, ``F`` about zero and the forget output pulled to
    ``W mu_r``: ``W' = W (R + lambda mu_r mu_f^T) (R + lambda F)^-1``. ``strength`` 0 changes nothing. Raises
    ModhifiError where the moments cannot be factorised. Limits: a compromise, never complete forgetting. Source: ours.
    """
    original, forget_mean, retain_mean = weight.double(), forget_mean.double(), retain_mean.double()
    origin = retain_mean if centred else torch.zeros_like(retain_mean)
    keep, drop = about(retain_gram, retain_mean, origin), about(forget_gram, forget_mean, origin)
    energy = float(drop.trace())
    pull = strength * float(keep.trace()) / energy if energy > 0 else 0.0
    # The ridge belongs to what is kept, so that it pulls towards the original weight.
    unit = mean_diagonal(keep)
    factor, used = factorise(keep + pull * drop, damping, unit)
    kept = keep + used * unit * torch.eye(len(keep), dtype=torch.float64)
    target = kept if centred else kept + pull * torch.outer(retain_mean, forget_mean)
    edited = torch.cholesky_solve((original @ target).T, factor).T
    return Edit(edited, (original - edited) @ retain_mean if centred else None, used)


def hifi_zero(weight: Tensor, scores: Tensor, blocks: Tensor, share: float, *, mean: Tensor | None = None) -> Edit:
    """Zero the ``share`` of the weights ``W_ci`` with the highest fidelity on the forget samples.

    ``weight``: ``(out, d)``. ``scores``: ``(out, n)``, the singleton fidelity of component ``i`` for output ``c``.
    ``blocks``: ``(n, m)`` int64, the columns of each component. ``share`` in [0, 1]; components with no positive score
    are never chosen. ``mean``: ``(d,)`` retain mean, to move the lost mean into a shift; the paper moves nothing.
    Raises ModhifiError for a share outside [0, 1]. Source: arXiv 2511.19566, its rule for BatchNorm networks (the top
    1 to 20 %).
    """
    return _mask(weight, scores, blocks, share, 0.0, mean)


def hifi_negate(weight: Tensor, scores: Tensor, blocks: Tensor, share: float, *, mean: Tensor | None = None) -> Edit:
    """Flip the sign of the ``share`` of the weights ``W_ci`` with the highest fidelity on the forget samples.

    Arguments and errors as in :func:`hifi_zero`. Source: arXiv 2511.19566, its rule for LayerNorm networks with
    residual connections.
    """
    return _mask(weight, scores, blocks, share, -1.0, mean)


def contrastive(
    weight: Tensor,
    forget_scores: Tensor,
    retain_scores: Tensor,
    blocks: Tensor,
    share: float,
    *,
    mean: Tensor | None = None,
) -> Edit:
    """Zero the ``share`` of the weights whose fidelity on the forget samples most exceeds that on the retain samples.

    ``forget_scores``, ``retain_scores``: ``(out, n)``; the rest and the errors as in :func:`hifi_zero`. Weights that
    serve the retained classes more are never chosen. Source: ours, on the scores of arXiv 2511.19566.
    """
    return _mask(weight, forget_scores - retain_scores, blocks, share, 0.0, mean)


def projection(
    weight: Tensor, forget_gram: Tensor, retain_gram: Tensor, *, forget_scale: float, retain_scale: float
) -> Edit:
    """Remove from the input its part in the forget space, but for what lies in the retain space.

    ``weight``: ``(out, d)``, Grams ``(d, d)`` about zero. ``W' = W [I - (I - M_r) M_f]``, ``M = U L U^T`` with the
    Gram's eigenvectors and ``L = a s / ((a - 1) s + 1)``, ``s`` its eigenvalues normalised to sum 1, ``a`` =
    ``forget_scale`` or ``retain_scale`` (searched per model in the paper). No shift. An empty forget space changes
    nothing. Raises ModhifiError for a scale that is not positive. Source: Kodge, Saha and Roy, TMLR 2024.
    """
    original = weight.double()
    forget, retain = _soft_projector(forget_gram, forget_scale), _soft_projector(retain_gram, retain_scale)
    lost = original @ forget - original @ retain @ forget
    return Edit(original - lost, None)


def head_mask(weight: Tensor, bias: Tensor | None, classes: Sequence[int]) -> Edit:
    """Close the outputs ``classes`` of a classifier: the control that forgets nothing.

    ``weight``: ``(out, d)``, ``bias``: ``(out,)`` or None. With a bias the rows become zero and the biases ``CLOSED``;
    without one they become the mean of the other rows, which is never the largest output.
    Raises ModhifiError where a class does not exist or none is left.
    """
    original, outputs = weight.double(), weight.shape[0]
    wrong = [c for c in classes if not 0 <= c < outputs]
    if wrong:
        raise ModhifiError(f"class {wrong[0]} does not exist; the classifier has outputs 0 to {outputs - 1}")
    closed = torch.zeros(outputs, dtype=torch.bool)
    closed[list(classes)] = True
    if bool(closed.all()):
        raise ModhifiError("every class would be forgotten; leave at least one")
    if bias is None:
        return Edit(torch.where(closed[:, None], original[~closed].mean(0), original), None)
    shift = torch.where(closed, CLOSED - bias.double(), 0.0)
    return Edit(original.masked_fill(closed[:, None], 0.0), shift)


def _soft_projector(gram: Tensor, scale: float) -> Tensor:
    if scale <= 0:
        raise ModhifiError(f"a projection scale of {scale:g} is not positive; choose 1 or more")
    values, vectors = torch.linalg.eigh((gram.double() + gram.double().T) / 2)
    values = values.clamp_min(0)
    total = values.sum()
    values = values / total if float(total) > 0 else values
    soft: Tensor = vectors @ torch.diag(scale * values / ((scale - 1) * values + 1)) @ vectors.T
    return soft


def _mask(weight: Tensor, scores: Tensor, blocks: Tensor, share: float, factor: float, mean: Tensor | None) -> Edit:
    if not 0 <= share <= 1:
        raise ModhifiError(f"a share of {share:g} is not between 0 and 1; give 0.05 for 5 % of the weights")
    original = weight.double()
    order = scores.flatten().argsort(descending=True, stable=True)[: round(share * scores.numel())]
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[order] = scores.flatten()[order] > 0
    gain = torch.ones_like(original)
    gain[:, blocks.flatten()] = (
        torch.where(chosen.view_as(scores), factor, 1.0).double().repeat_interleave(blocks.shape[1], 1)
    )
    edited = original * gain
    return Edit(edited, None if mean is None else (original - edited) @ mean.double())
