"""Features in units of the standard deviations that an attack has seen."""

from __future__ import annotations

import torch
from torch import Tensor


def standardise(fit: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets, float64, in units of the fitted set's mean and standard deviation; constant features become 0."""
    fit, test = fit.double(), test.double()
    mean, spread = fit.mean(0), fit.std(0)
    scale = torch.where(spread > 1e-9 * spread.max(), spread, torch.inf)
    return (fit - mean) / scale, (test - mean) / scale
