"""``membership``: tell training images of the forgotten classes from test images by the confidence in their class."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.data.labels import populations
from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure, labels_of


def auc(members: Tensor, others: Tensor) -> float:
    """The chance that a member's score exceeds another's, ties counting half: 0.5 says that they look the same."""
    order = torch.cat([others, members]).double()
    values, inverse, counts = order.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - counts).double() + (counts.double() + 1) / 2
    total = ranks[inverse][len(others) :].sum()
    n, m = len(members), len(others)
    return float((total - n * (n + 1) / 2) / (n * m))


def run(target: Attacked) -> dict[str, float | None]:
    """The AUC of the log probability of the true class; None without training images of the forgotten classes."""
    if target.members is None or not bool((populations(target.members, target.classes) > 0).any()):
        return {"membership": None}

    def scores(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]

    members = target.members.subset(torch.nonzero(populations(target.members, target.classes) > 0).flatten())
    seen = scores(target.logits(target.model, members), labels_of(members))
    unseen = populations(target.data.test, target.classes) > 0
    return {"membership": auc(seen, scores(target.test.logits[unseen], target.labels[unseen]))}


ATTACKS.register(
    Attack(
        "membership",
        "training images told from test images by confidence",
        "members",
        (Measure("membership", "membership AUC on forgotten classes", headline=False),),
        run,
        source="Yeom et al. 2018",
    )
)
