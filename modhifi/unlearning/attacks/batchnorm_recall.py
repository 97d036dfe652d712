"""``batchnorm-recall``: re-estimate the norms on retained samples, as whoever fine-tunes would."""

from __future__ import annotations

import torch

from modhifi.data.labels import populations
from modhifi.unlearning.attacks.base import ATTACKS, Attack, Attacked, Measure, labels_of, share
from modhifi.unlearning.batchnorm import recall


def run(target: Attacked) -> dict[str, float | None]:
    """Accuracy on the forgotten classes afterwards, settled norms or not; None without BatchNorm."""
    groups = populations(target.data.fit, target.classes, target.earlier)
    retained = target.data.fit.subset(torch.nonzero(groups == 0).flatten())
    forgotten = target.data.test.subset(torch.nonzero(target.forgotten).flatten())
    result: dict[str, float | None] = {}
    for key, variant in (("recall", target.model), ("recall_plain", target.unsettled)):
        if variant is target.model and result:
            result[key] = result["recall"]
            continue
        again = None if variant is None else recall(target.loaded, variant, retained, target.batch_size)
        result[key] = None if again is None else share(target.logits(again, forgotten).argmax(1), labels_of(forgotten))
    return result


ATTACKS.register(
    Attack(
        "batchnorm-recall",
        "re-estimate the norms on retained images",
        "outputs",
        (
            Measure("recall", "forgotten classes after BatchNorm re-estimation"),
            Measure("recall_plain", "the same before the norms were settled", headline=False),
        ),
        run,
        source="ours",
    )
)
