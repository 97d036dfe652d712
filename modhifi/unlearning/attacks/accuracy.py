"""``accuracy``: what the output still recognises."""

from __future__ import annotations

from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure


def run(target: Attacked) -> dict[str, float | None]:
    """Accuracies of the arg max, and the largest loss of a retained class against the original."""
    predicted, before = target.test.logits.argmax(1), target.original_test.logits.argmax(1)
    losses = []
    for index in target.labels[target.retained].unique().tolist():
        chosen = target.retained & (target.labels == index)
        losses.append(target.recognised(before, chosen) - target.recognised(predicted, chosen))
    return {
        "forget": target.recognised(predicted, target.forgotten),
        "retain": target.recognised(predicted, target.retained),
        "worst_loss": max(losses),
    }


ATTACKS.register(
    Attack(
        "accuracy",
        "what the output still recognises",
        "outputs",
        (
            Measure("forget", "accuracy on forgotten classes"),
            Measure("retain", "accuracy on the others"),
            Measure("worst_loss", "largest loss of one retained class", headline=False),
        ),
        run,
    )
)
