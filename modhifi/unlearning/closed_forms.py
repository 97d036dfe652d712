"""What the closed forms of unlearning share: an edit, mixtures of populations, directions to erase.

Every closed form takes an operator's weight as ``(out, d)`` (a convolution flattened over its patch axis, one call per
convolution group), computes in float64 and returns float64. ``x`` is the operator's input row, ``mean`` is ``E[x]`` and
``gram`` is ``E[x x^T]``, both estimated on the samples that the argument names. ``centred`` says that the operator has
a place for a mean (a bias, or a BatchNorm behind it); without one, the edits leave the output at the retain mean alone.
The formulas are those of docs/unlearning.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A direction of unit rows weaker than this counts as a combination of the others.
RANK_TOLERANCE = 1e-8


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


def about(gram: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
    """The second moment about ``origin`` of samples with this Gram and mean."""
    mean, origin = mean.double(), origin.double()
    left, right = torch.stack([mean, origin], 1), torch.stack([-origin, origin - mean])
    return torch.addmm(gram.double(), left, right)


def directions(gaps: Tensor) -> Tensor:
    """An orthonormal basis ``(d, r)`` of the rows to erase: the projection depends on their span alone."""
    # Rows of very different length must not hide each other; rows of zero length name no direction.
    rows = torch.nn.functional.normalize(gaps, dim=1, eps=torch.finfo(gaps.dtype).tiny)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = vectors[: int((values > RANK_TOLERANCE).sum())].T
    return basis
