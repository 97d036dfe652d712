"""Moments of synthetic data, corrected by what a BatchNorm remembers of a reader's output. Pure: tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import Moments

# No direction's variance changes by more than this factor, and no mean by more than one deviation: the outputs of a
# wide layer depend on each other, and statistics that contradict each other would ask for any change.
MOST = 4.0
# Eigenvalues of an output's covariance below this share of the largest are rounding.
ROUNDING = 1e-9


def remembered(moments: Moments, weight: Tensor, mean: Tensor, var: Tensor) -> Moments:
    """The moments nearest to the given ones under which the reader's output has a known mean and known variances.

    A BatchNorm behind a reader stores both as the true data had them; synthetic inputs give it others. With
    ``weight`` W float64 ``(G, o, d)``, output ``y = W x``, its covariance ``M = W Σ Wᵀ`` and ``K = Σ Wᵀ M⁻¹``, what
    is known of x given y is kept and y is told anew: ``μ' = μ + K (mean − W μ)`` and ``Σ' = Σ + K (D M D − M) Kᵀ``,
    D diagonal, so that y keeps its correlations and takes the stored variances (Jeffrey's rule for Gaussians: of all
    distributions with that y, the one of least Kullback-Leibler divergence to the given one). Changes are limited to
    ``MOST``. ``mean`` and ``var`` are float ``(G · o,)``, without the reader's own bias.
    """
    groups, outputs, _ = weight.shape
    mean, var = mean.to(weight).view(groups, outputs, 1), var.to(weight).view(groups, outputs)
    crossed = moments.cov @ weight.transpose(1, 2)
    spread = weight @ crossed
    values, vectors = torch.linalg.eigh((spread + spread.transpose(1, 2)) / 2)
    alive = values > ROUNDING * values[:, -1:].clamp_min(1e-300)
    whiten = vectors * torch.where(alive, values.clamp_min(1e-300).rsqrt(), 0.0)[:, None, :]
    variance = spread.diagonal(dim1=1, dim2=2)
    scale = torch.where(variance > ROUNDING * values[:, -1:], (var / variance.clamp_min(1e-300)).sqrt(), 1.0)
    # y in units of its own deviations, in which M is the identity and D M D is to become of limited size
    asked = whiten.transpose(1, 2) @ (scale[:, :, None] * spread * scale[:, None, :]) @ whiten
    sizes, axes = torch.linalg.eigh(asked)
    through = crossed @ whiten
    along = through @ axes
    cov = moments.cov + (along * (sizes.clamp(1 / MOST, MOST) - 1)[:, None, :]) @ along.transpose(1, 2)
    shift = through @ (whiten.transpose(1, 2) @ (mean - weight @ moments.mean[:, :, None])).clamp(-1, 1)
    return Moments(moments.n, moments.mean + shift[:, :, 0], (cov + cov.transpose(1, 2)) / 2)
