"""``nearest-mean``: the class whose mean features are nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure
from modhifi.unlearning.standardise import standardise


def nearest_mean(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The class, int64 ``(n,)``, whose mean is nearest to each row of ``test`` ``(n, d)``, in standardised features.

    The means are those of ``fit`` ``(m, d)`` with ``labels`` int64 ``(m,)``.
    """
    a, b = standardise(fit, test)
    classes: Tensor = labels.unique()
    means = torch.stack([a[labels == c].mean(0) for c in classes])
    return classes[torch.cdist(b, means).argmin(1)]


def run(target: Attacked) -> dict[str, float | None]:
    """The share of the forgotten samples that are recognised."""
    predicted = nearest_mean(*target.lesson, target.test.features)
    return {"nearest_mean": target.recognised(predicted, target.forgotten)}


ATTACKS.register(
    Attack(
        "nearest-mean",
        "nearest class mean in the features",
        "features",
        (Measure("nearest_mean", "forgotten classes by nearest class mean"),),
        run,
        source="Mensink et al. 2013",
    )
)
