"""``divergence``: how far the output on retained samples moved from the original's."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure


def divergence(logits: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence of softmax outputs ``(n, classes)`` from those of the first, in nats."""
    log_p, log_q = logits.double().log_softmax(1), other.double().log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def run(target: Attacked) -> dict[str, float | None]:
    """Over the classes that stay: a closed output has no probability that a logarithm could be taken of."""
    removed = (*target.classes, *target.earlier)
    stay = torch.tensor([c for c in range(target.original_test.logits.shape[1]) if c not in removed])
    before, after = (seen.logits[target.retained][:, stay] for seen in (target.original_test, target.test))
    return {"kl": divergence(before, after)}


ATTACKS.register(
    Attack(
        "divergence",
        "how far the output on retained images moved",
        "outputs",
        (Measure("kl", "KL to the original on retained images, over the classes that stay", "nats", headline=False),),
        run,
    )
)
