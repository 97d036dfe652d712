"""``relearn``: prototypes of the forgotten classes from a few samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure
from modhifi.unlearning.attacks.nearest_mean import nearest_mean

SHOTS = 10


def relearn(fit: Tensor, labels: Tensor, test: Tensor, forgotten: Sequence[int], shots: int = SHOTS) -> Tensor:
    """The class, int64 ``(n,)``, of the nearest mean, where a forgotten class has the mean of its first ``shots`` rows.

    ``fit`` ``(m, d)`` with ``labels`` int64 ``(m,)``; ``test`` ``(n, d)``.
    """
    keep = torch.ones(len(labels), dtype=torch.bool)
    for c in forgotten:
        keep[torch.nonzero(labels == c).flatten()[shots:]] = False
    return nearest_mean(fit[keep], labels[keep], test)


def run(target: Attacked) -> dict[str, float | None]:
    """The share of the forgotten samples that are recognised."""
    predicted = relearn(*target.lesson, target.test.features, target.classes)
    return {"relearn": target.recognised(predicted, target.forgotten)}


ATTACKS.register(
    Attack(
        "relearn",
        "nearest class mean with prototypes of a few forgotten images",
        "features",
        (Measure("relearn", f"forgotten classes by {SHOTS}-shot prototypes"),),
        run,
        source="Snell, Swersky and Zemel 2017",
    )
)
