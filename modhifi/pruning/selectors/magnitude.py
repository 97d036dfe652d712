"""The norm of a component's weights in its readers."""

from __future__ import annotations

from torch import Tensor

from modhifi.calibration.low_rank import Second
from modhifi.pruning.selectors.base import SELECTORS, Selector, lowest_first


def squared_norm(weight: Tensor, second: Second, columns: Tensor) -> Tensor:
    """``‖W_i‖²``, the squared Frobenius norm of each component's columns ``(n, m)`` of ``weight`` ``(o, d)``, ``(n,)``.

    ``second`` is not read.
    """
    return weight.square().sum(0)[columns].sum(1)


SELECTORS.register(
    Selector(
        "magnitude",
        "the least weight norm",
        "Li et al. 2016 (arXiv 1608.08710)",
        lowest_first(squared_norm),
        needs_moments=False,
    )
)
