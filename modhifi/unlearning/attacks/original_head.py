"""``original-head``: the original's classifier on the edited model's features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure


def read_by(classifier: nn.Module, features: Tensor) -> Tensor:
    """The class, int64 ``(n,)``, that a linear classifier reads from features ``(n, d)``."""
    head: Any = classifier
    weight = head.weight.detach().flatten(1).float().cpu()
    weight = weight if weight.shape[1] == features.shape[1] else weight.T
    bias = 0.0 if head.bias is None else head.bias.detach().float().cpu()
    return (features @ weight.T + bias).argmax(1)  # type: ignore[no-any-return]


def run(target: Attacked) -> dict[str, float | None]:
    """The share of the forgotten samples that are recognised; None for a model of other features."""
    if target.original_head is None:
        return {"original_head": None}
    predicted = read_by(target.original_head, target.test.features)
    return {"original_head": target.recognised(predicted, target.forgotten)}


ATTACKS.register(
    Attack(
        "original-head",
        "the original classifier on the new features",
        "features",
        (Measure("original_head", "forgotten classes by the original head on these features", headline=False),),
        run,
    )
)
