"""The paper's compensation: one scalar for each kept weight block of each output channel."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.calibration.low_rank import Second
from modhifi.pruning.compensations.base import COMPENSATIONS, Compensation, kept_columns
from modhifi.pruning.compensations.lstsq import least_squares
from modhifi.pruning.fidelity import optimal_scalars


def edit(weight: Tensor, second: Second, blocks: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Each kept block of each output channel times its scalar δ*; columns outside every block stay as they are.

    With one column for each component and none outside, a scalar for every weight is as free as the weight: that is
    least squares, solved once for all output channels, with the ridge in units of S.
    """
    stay = kept_columns(weight.shape[1], blocks, kept)
    if blocks.shape == (weight.shape[1], 1):
        return least_squares(weight, second, stay, ridge)
    scales = optimal_scalars(weight, second, blocks, torch.nonzero(kept).flatten(), ridge)
    edited = weight * stay
    for component, scale in zip(blocks[kept], scales.T, strict=True):
        edited[:, component] = weight[:, component] * scale[:, None]
    return edited


COMPENSATIONS.register(Compensation("delta", "one scalar a kept weight block, δ*", "arXiv 2511.19566, δ*", edit))
