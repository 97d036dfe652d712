"""The optimisers of a distillation, by the names that a recipe knows them by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

# Nothing decays: the student starts from weights that are nearly right.
MOMENTUM, DECAY = 0.9, 0.0


def optimizer_of(name: str, parameters: Iterable[Tensor], rate: float) -> Optimizer:
    """``adamw``, or ``sgd`` with Nesterov's momentum."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=DECAY)
