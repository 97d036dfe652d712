"""Re-estimate BatchNorm statistics on samples."""

from __future__ import annotations

import torch
from torch import nn

from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, loaded: LoadedModel, samples: Samples, batch_size: int) -> None:
    """Replace every BatchNorm's running statistics by those of ``samples``, in place (plain average over batches)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    for batch in samples.batches(batch_size):
        loaded.logits(batch, model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.training = momentum, False
