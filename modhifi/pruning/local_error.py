"""How far a reader's output moves when its weights change. Pure."""

from __future__ import annotations

from torch import Tensor

from modhifi.calibration.low_rank import LowRank, Second


def local_error(weight: Tensor, edited: Tensor, second: Second) -> tuple[float, float]:
    """The expected squared change of a reader's output, and the output's energy, per row.

    ``tr[(W−Ŵ) S (W−Ŵ)ᵀ]`` and ``tr[W S Wᵀ]``: ``weight`` and ``edited`` float64 ``(o, d)``, ``second`` float64
    ``(d, d)``, the covariance where the change of the mean is restored, else the uncentred Gram.
    """
    gap = weight - edited
    if isinstance(second, LowRank):
        return float(second.energy(gap)), float(second.energy(weight))
    through = gap @ second
    error, used = max(0.0, float((through * gap).sum())), edited.any(0)
    own = edited[:, used]
    # W = gap + edited: only the columns in use have to meet S once more
    rest = ((own @ second[used][:, used]) * own).sum()
    return error, max(0.0, error + float(2 * (through * edited).sum() + rest))
