"""No compensation: what goes is cut out, and what stays is as it was."""

from __future__ import annotations

from torch import Tensor

from modhifi.calibration.low_rank import Second
from modhifi.pruning.compensations.base import COMPENSATIONS, Compensation, kept_columns


def edit(weight: Tensor, second: Second, blocks: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The weights with zeros in the columns that go; ``second`` and ``ridge`` are not read."""
    return weight * kept_columns(weight.shape[1], blocks, kept)


COMPENSATIONS.register(
    Compensation("none", "nothing, also for the mean", "", edit, restores_mean=False, needs_moments=False)
)
