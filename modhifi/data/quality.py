"""How good calibration images are, told without labels: what the network remembers and what it predicts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from modhifi.data.image_inputs import class_count
from modhifi.data.samples import Samples
from modhifi.models.hooks import only_input
from modhifi.models.loaded import LoadedModel

# Samples that are run to compare a network's memory with what it sees.
LOOKED_AT = 128


def statistics_gap(mean: Tensor, var: Tensor, norm: _BatchNorm) -> Tensor:
    """How far the moments ``(C,)`` of a BatchNorm's input are from what it remembers: a scalar, 0 for equal moments.

    Mean over channels of ``((μ − μ̂) / σ̂)² + (σ/σ̂ − 1)²``, hats for the stored ones.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    stored = (norm.running_var + norm.eps).sqrt()
    gap = ((mean - norm.running_mean) / stored).square() + ((var + norm.eps).sqrt() / stored - 1).square()
    return gap.mean()


@torch.no_grad()
def look(loaded: LoadedModel, samples: Samples, batch_size: int = 32) -> dict[str, Any]:
    """What the network makes of the first ``LOOKED_AT`` samples, as JSON-able data.

    ``norm_gap``: by BatchNorm, how far its input is from what it remembers (see :func:`statistics_gap`), and
    ``mean_norm_gap``; ``classes``: how many of its classes a classifier predicts, of how many; ``balance``: the entropy
    of its predictions over that of an even spread. What does not apply is left out.
    """
    classes = class_count(loaded)  # runs the model: before the hooks
    norms = {
        name: module
        for name, module in loaded.model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    sums: dict[str, list[Any]] = {}

    def see(name: str, x: Tensor) -> None:
        dims = [d for d in range(x.ndim) if d != 1]
        wide = x.double()
        terms = [x.numel() / x.shape[1], wide.sum(dims), wide.square().sum(dims)]
        sums[name] = [old + new for old, new in zip(sums.get(name, [0.0] * 3), terms, strict=True)]

    handles = [
        norm.register_forward_pre_hook(lambda m, a, k, name=name: see(name, only_input(a, k)), with_kwargs=True)
        for name, norm in norms.items()
    ]
    few = samples.subset(range(min(LOOKED_AT, len(samples))))
    device = next(loaded.model.parameters()).device
    try:
        if not handles and classes is None:
            return {}
        predicted = []
        for batch in few.batches(batch_size):
            logits = loaded.logits(batch.to(device))
            if classes is not None:
                predicted.append(logits.argmax(1))
    finally:
        for handle in handles:
            handle.remove()
    figures: dict[str, Any] = {"looked_at": len(few)}
    if sums:
        figures["norm_gap"] = {}
        for name, (n, first, second) in sums.items():
            mean = first / n
            figures["norm_gap"][name] = float(statistics_gap(mean, (second / n - mean**2).clamp_min(0), norms[name]))
        figures["mean_norm_gap"] = sum(figures["norm_gap"].values()) / len(sums)
    if classes is not None:
        counts = torch.bincount(torch.cat(predicted).cpu(), minlength=classes).double()
        share = counts[counts > 0] / counts.sum()
        figures["classes"] = [int((counts > 0).sum()), classes]
        figures["balance"] = (
            float(-(share * share.log()).sum() / math.log(min(classes, len(few)))) if len(few) > 1 else 0.0
        )
    return figures
