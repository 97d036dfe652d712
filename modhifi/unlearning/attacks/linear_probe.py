"""``linear-probe``: a linear classifier that is fitted on the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure
from modhifi.unlearning.standardise import standardise

# Ridge in units of the standardised features' variance, as in the reference measurements.
RIDGE = 1e-3


def linear_probe(fit: Tensor, labels: Tensor, test: Tensor, ridge: float = RIDGE) -> Tensor:
    """The classes, int64 ``(n,)``, that a ridge regression on one-hot labels reads from the features.

    ``fit`` ``(m, d)`` with ``labels`` int64 ``(m,)`` is what it learns from, ``test`` ``(n, d)`` what it predicts.
    """
    a, b = standardise(fit, test)
    classes: Tensor
    classes, targets = labels.unique(return_inverse=True)
    a, b = F.pad(a, (0, 1), value=1.0), F.pad(b, (0, 1), value=1.0)
    eye = torch.eye(a.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(a.T @ a + ridge * len(a) * eye, a.T @ F.one_hot(targets).double())
    return classes[(b @ weights).argmax(1)]


def run(target: Attacked) -> dict[str, float | None]:
    """The share of the forgotten and of the retained samples that the probe recognises."""
    predicted = linear_probe(*target.lesson, target.test.features)
    return {
        "probe": target.recognised(predicted, target.forgotten),
        "probe_retain": target.recognised(predicted, target.retained),
    }


ATTACKS.register(
    Attack(
        "linear-probe",
        "ridge regression on the features",
        "features",
        (
            Measure("probe", "forgotten classes by a linear probe"),
            Measure("probe_retain", "the others by the same probe"),
        ),
        run,
        source="Alain and Bengio 2016",
    )
)
