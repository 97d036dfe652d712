"""Rules for modules that compute in many small steps what has one known bound: RMSNorms, tanh-GELU by hand.

A module is taken for what its name says only if its output on the tensors at hand agrees with the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.lipschitz import SLOPES

if TYPE_CHECKING:
    from modhifi.ladder_step import Step

ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "NewGELUActivation": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "FastGELUActivation": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "PytorchGELUTanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "QuickGELUActivation": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
}


def module_rule(module: nn.Module) -> Callable[[Step, list[Tensor]], Any] | None:
    """The rule of a module as a whole, or None: what runs inside is followed instead."""
    name = type(module).__name__
    if name in ACTIVATIONS:
        return _activation
    # torch's own RMSNorm is one function, which has a rule.
    if name.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm) and getattr(module, "weight", None) is not None:
        return _rms_norm if _eps(module) is not None else None
    return None


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(eps) if isinstance(eps, float) else None


def _activation(step: Step, outputs: list[Tensor]) -> list[Any] | None:
    x = step.inputs[0]
    name, formula = ACTIVATIONS[step.name]
    if not torch.allclose(formula(x), outputs[0], atol=1e-9, rtol=1e-7):
        return None
    return step.elementwise(formula, x, outputs[0], max(abs(s) for s in SLOPES[name]))


def _rms_norm(step: Step, outputs: list[Tensor]) -> list[Any] | None:
    from modhifi.ladder_rules import normalised

    module: Any = step.func
    x, weight, eps = step.inputs[0], module.weight, _eps(module)
    assert eps is not None
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    # Gemma counts its weight from one.
    gamma = weight if torch.allclose(plain, outputs[0], atol=1e-5, rtol=1e-5) else 1 + weight
    if id(weight) in step.twins or (
        gamma is not weight and not torch.allclose(plain / weight * gamma, outputs[0], atol=1e-5, rtol=1e-5)
    ):
        return None
    return [normalised(x, step.bound(x), gamma, gamma, eps, centred=False)]
