"""The optimisers of a distillation, and where they register."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from modhifi.registry import Registry

# Nothing decays: the student starts from weights that are nearly right.
MOMENTUM, DECAY = 0.9, 0.0


@dataclass(frozen=True)
class OptimizerKind:
    """An optimiser: ``make`` takes parameters and the largest learning rate, ``rate`` is the default of that one."""

    name: str
    summary: str
    make: Callable[[Iterable[Tensor], float], Optimizer]
    rate: float
    source: str = ""


OPTIMIZERS: Registry[OptimizerKind] = Registry("optimizer")


def sgd(parameters: Iterable[Tensor], rate: float) -> Optimizer:
    """Stochastic gradient descent with Nesterov's momentum."""
    return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)


def adamw(parameters: Iterable[Tensor], rate: float) -> Optimizer:
    """AdamW without decay."""
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=DECAY)


OPTIMIZERS.register(
    OptimizerKind(
        "sgd",
        "gradient descent with Nesterov's momentum; the default of networks with BatchNorm",
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
