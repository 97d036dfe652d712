"""The optimisers of a distillation, and where they register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from modhifi.healing.muon import Muon
from modhifi.registry import Registry

# Nothing decays: the student starts from weights that are nearly right.
MOMENTUM, DECAY = 0.9, 0.0


@dataclass(frozen=True)
class OptimizerKind:
    """An optimiser of what takes gradients in a model.

    ``make`` takes the model, the largest learning rate, whose default is ``rate``, and the dtype of matrix products.
    """

    name: str
    summary: str
    make: Callable[[nn.Module, float, torch.dtype], Optimizer]
    rate: float
    source: str = ""


OPTIMIZERS: Registry[OptimizerKind] = Registry("optimizer")


def sgd(model: nn.Module, rate: float, dtype: torch.dtype) -> Optimizer:
    """Stochastic gradient descent with Nesterov's momentum."""
    return torch.optim.SGD(_trained(model), lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)


def adamw(model: nn.Module, rate: float, dtype: torch.dtype) -> Optimizer:
    """AdamW without decay."""
    return torch.optim.AdamW(_trained(model), lr=rate, weight_decay=DECAY)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


OPTIMIZERS.register(
    OptimizerKind(
        "sgd",
        "gradient descent with Nesterov's momentum",
        sgd,
        rate=0.02,
        source="Sutskever et al. 2013",
    )
)
OPTIMIZERS.register(
    OptimizerKind(
        "adamw",
        "AdamW without decay; the default of other networks",
        adamw,
        rate=1e-4,
        source="Loshchilov and Hutter 2019",
    )
)
OPTIMIZERS.register(
    OptimizerKind(
        "muon",
        "momentum, orthogonalised, in steps relative to the weights; the default of networks with BatchNorm",
        Muon,
        rate=0.003,
        source="Jordan et al. 2024",
    )
)
