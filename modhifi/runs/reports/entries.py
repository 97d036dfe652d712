"""What can be told of two models whose outputs cannot be compared item by item, such as detectors: how many entries."""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import nn

from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel


@torch.inference_mode()
def count_entries(
    original: LoadedModel, edited: nn.Module, held: Samples, batch_size: int
) -> dict[str, tuple[float, float]]:
    """The mean number of entries an item in each output of both models: ``{"boxes": (before, after)}``."""
    counts = []
    for model in (original.model, edited):
        rows: Counter[str] = Counter()
        for batch in held.batches(batch_size):
            for name, tensor in original.outputs(batch, model).items():
                rows[re.sub(r"^\d+\.", "", name)] += len(tensor) if tensor.ndim else 1
        counts.append(rows)
    before, after = counts
    return {name: (before[name] / len(held), after[name] / len(held)) for name in before | after}
