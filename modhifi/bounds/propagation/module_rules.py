"""Rules for modules that compute in many small steps what has one known bound: RMSNorms, tanh-GELU, sorting.

A module is taken for what its name says only if its output on the tensors at hand agrees with the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.bounds.lipschitz import SLOPES
from modhifi.bounds.propagation.interval import UP, coarsen
from modhifi.bounds.propagation.rules import normalised
from modhifi.bounds.propagation.walked_call import WalkedCall

ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "NewGELUActivation": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "FastGELUActivation": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "PytorchGELUTanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "QuickGELUActivation": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
}
# Sorting channels in groups, and reflecting pairs of them onto one side of a line: 1-Lipschitz (Anil et al. 2019, ICML;
# Singla et al. 2022, ICLR).
ISOMETRIES = frozenset({"maxmin", "groupsort", "groupsort2", "fullsort", "householder"})


def module_rule(module: nn.Module) -> Callable[[WalkedCall, list[Tensor]], Any] | None:
    """The rule of a module as a whole, or None: what runs inside is followed instead."""
    name = type(module).__name__
    if name in ACTIVATIONS:
        return _activation
    if name.lower() in ISOMETRIES:
        return _isometry
    # torch's own RMSNorm is one function, which has a rule.
    if name.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm) and getattr(module, "weight", None) is not None:
        return _rms_norm if _eps(module) is not None else None
    return None


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(eps) if isinstance(eps, float) else None


def _activation(call: WalkedCall, outputs: list[Tensor]) -> list[Any] | None:
    x = call.inputs[0]
    name, formula = ACTIVATIONS[call.name]
    if not torch.allclose(formula(x), outputs[0], atol=1e-9, rtol=1e-7):
        return None
    return call.elementwise(formula, x, outputs[0], max(abs(s) for s in SLOPES[name]))


def _isometry(call: WalkedCall, outputs: list[Tensor]) -> list[Any] | None:
    module: Any = call.func
    x, out = call.inputs[0], outputs[0]
    if x.ndim < 2 or x.shape != out.shape or any(id(p) in call.twins for p in module.parameters()):
        return None
    if type(module).__name__.lower() == "householder":
        formulas = [_reflected(x, getattr(module, "theta", None))]
    else:
        formulas = [f for size in {getattr(module, "group_size", None) or 2, x.shape[1]} for f in _sorted(x, size)]
    if not any(f is not None and torch.allclose(f, out, atol=1e-12, rtol=1e-9) for f in formulas):
        return None
    bound = call.bound(x)
    radius = coarsen(bound.radius, [1 if d == 1 else n for d, n in enumerate(bound.radius.shape)])
    return [bound.scaled(radius * UP, 1.0)]


def _sorted(x: Tensor, size: int) -> list[Tensor]:
    """Channels (axis 1) sorted in groups of neighbours or of every ``channels / size``-th, up and down."""
    if x.shape[1] % size:
        return []
    near, far = x.unflatten(1, (-1, size)), x.unflatten(1, (size, -1))
    return [
        t.sort(dim, descending).values.flatten(1, 2) for t, dim in ((near, 2), (far, 1)) for descending in (False, True)
    ]


def _reflected(x: Tensor, theta: Any) -> Tensor | None:
    """Pairs (one of either half of the channels) reflected at the line of angle theta / 2 where they lie below it."""
    if not isinstance(theta, Tensor) or 2 * theta.numel() != x.shape[1]:
        return None
    theta = theta.detach().reshape(-1, *[1] * (x.ndim - 2))
    one, two = x.chunk(2, 1)
    keep = one * (theta / 2).sin() - two * (theta / 2).cos() > 0
    first = torch.where(keep, one, one * theta.cos() + two * theta.sin())
    return torch.cat([first, torch.where(keep, two, one * theta.sin() - two * theta.cos())], 1)


def _rms_norm(call: WalkedCall, outputs: list[Tensor]) -> list[Any] | None:
    module: Any = call.func
    x, eps, gamma = call.inputs[0], _eps(module), _gain(module, call.inputs[0], outputs[0])
    if gamma is None or eps is None or id(module.weight) in call.twins:
        return None
    return [normalised(x, call.bound(x), gamma, gamma, eps, centred=False)]


def _plain(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _gain(module: Any, x: Tensor, out: Tensor) -> Tensor | None:
    """What an RMSNorm multiplies by: its weight or, as Gemma counts, one more; None if it is no RMSNorm after all."""
    plain, weight = _plain(x, _eps(module) or 0.0), module.weight
    return next((g for g in (weight, 1 + weight) if torch.allclose(plain * g, out, atol=1e-5, rtol=1e-5)), None)


def as_function(module: nn.Module) -> Callable[..., Any]:
    """A module with a rule as a function that keeps float64: many an RMSNorm casts to float32 inside."""
    if module_rule(module) is not _rms_norm:
        return module.forward

    def run(x: Tensor) -> Tensor:
        gain = _gain(module, x, module.forward(x))
        return module.forward(x) if gain is None else _plain(x, _eps(module) or 0.0) * gain

    return run
