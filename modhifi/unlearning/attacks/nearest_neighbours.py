"""``nearest-neighbours``: the class of most of the nearest samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure
from modhifi.unlearning.standardise import standardise

NEIGHBOURS = 20


def nearest_neighbours(fit: Tensor, labels: Tensor, test: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The class, int64 ``(n,)``, of most of the ``k`` nearest rows of ``fit``, in standardised features.

    ``fit`` ``(m, d)`` with ``labels`` int64 ``(m,)``; ``test`` ``(n, d)``; all ``m`` rows where there are fewer.
    """
    a, b = standardise(fit, test)
    classes: Tensor
    classes, targets = labels.unique(return_inverse=True)
    nearest = torch.cdist(b, a).topk(min(k, len(a)), largest=False).indices
    return classes[F.one_hot(targets[nearest], len(classes)).sum(1).argmax(1)]


def run(target: Attacked) -> dict[str, float | None]:
    """The share of the forgotten samples that are recognised."""
    predicted = nearest_neighbours(*target.lesson, target.test.features)
    return {"neighbours": target.recognised(predicted, target.forgotten)}


ATTACKS.register(
    Attack(
        "nearest-neighbours",
        "majority of the nearest samples in the features",
        "features",
        (Measure("neighbours", f"forgotten classes by {NEIGHBOURS} nearest neighbours"),),
        run,
        source="Cover and Hart 1967",
    )
)
