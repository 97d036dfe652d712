"""Labels of samples: their own or the model's, and the populations that forgetting tells apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel

# An image that the model itself labels counts where its top class has this probability, and leads by this much.
CONFIDENCE, MARGIN = 0.5, 0.2
# What a description says of labels that the samples have and the model does not.
UNUSED = re.compile(r"labels unused: [^;]+")


def label_samples(loaded: LoadedModel, samples: Samples, batch_size: int) -> tuple[Samples, str | None]:
    """The samples with labels: their own, or the model's predictions where it is sure; and a remark on the latter."""
    if samples.labels is not None:
        return samples, None
    with torch.no_grad():
        outputs = [loaded.logits(b).float().softmax(1).cpu() for b in samples.batches(batch_size)]
    top = torch.cat(outputs).topk(2, 1)
    sure = (top.values[:, 0] >= CONFIDENCE) & (top.values[:, 0] - top.values[:, 1] >= MARGIN)
    confident = torch.nonzero(sure).flatten()
    dropped = UNUSED.search(samples.description)
    remark = (
        f"{dropped[0].strip() if dropped else 'no labels'}: {len(confident)} of {len(samples)} images were labelled by "
        f"the model itself (probability at least {CONFIDENCE:g}, leading by {MARGIN:g}), so accuracy on them is "
        "agreement with the original"
    )
    return replace(samples.subset(confident), labels=top.indices[confident, 0]), remark


def populations(samples: Samples, classes: Sequence[int], earlier: Sequence[int] = ()) -> Tensor:
    """The population of each labelled sample, int64 ``(n,)``: 0 retained, j the j-th forgotten class, -1 neither."""
    assert samples.labels is not None
    groups = torch.zeros(len(samples), dtype=torch.int64)
    for index in earlier:
        groups[samples.labels == index] = -1
    for number, index in enumerate(classes, start=1):
        groups[samples.labels == index] = number
    return groups


def class_name(loaded: LoadedModel, index: int) -> str:
    """The label of a class where the model has one, else its number."""
    return loaded.labels[index] if loaded.labels and index < len(loaded.labels) else str(index)
