"""Sound Lipschitz constants of the nonlinear parts of a network: activations, norms, sums, the input box.

All constants are for the Euclidean norm, all are upper bounds (rounded up), and none is estimated by sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from modhifi.errors import ModhifiError

# The smallest and largest slope of each elementwise activation, rounded outwards. gelu(x) - gelu(-x) = x, and the same
# holds for its tanh form and for silu, hence smallest = 1 - largest. quick_gelu is silu scaled: same slopes.
SLOPES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "relu": (0.0, 1.0),
        "relu6": (0.0, 1.0),
        "hardtanh": (0.0, 1.0),
        "softplus": (0.0, 1.0),
        "logsigmoid": (0.0, 1.0),
        "softsign": (0.0, 1.0),
        "tanh": (0.0, 1.0),
        "sigmoid": (0.0, 0.25),
        "hardsigmoid": (0.0, 0.166667),
        "hardswish": (-0.500001, 1.500001),
        "gelu": (-0.128905, 1.128905),
        "gelu_tanh": (-0.128994, 1.128994),
        "silu": (-0.099840, 1.099840),
        "quick_gelu": (-0.099840, 1.099840),
        "mish": (-0.112527, 1.088499),
        "selu": (0.0, 1.758100),
    }
)


def activation_slopes(name: str, parameter: float | Sequence[float] | None = None) -> tuple[float, float] | None:
    """The (smallest, largest) slope of an elementwise activation, or None where no sound rule is known.

    `parameter` is leaky_relu's negative slope, elu's or celu's alpha, or prelu's weights.
    """
    if name in ("leaky_relu", "prelu", "elu", "celu"):
        default = 0.01 if name == "leaky_relu" else 1.0
        values = [default] if parameter is None else [parameter] if isinstance(parameter, (int, float)) else parameter
        if not all(map(math.isfinite, values)) or (name == "celu" and min(values) <= 0):
            return None
        # Left of zero elu's slope alpha exp(x) runs from 0 to alpha, celu's exp(x / alpha) from 0 to 1.
        values = {"elu": [*values, 0.0], "celu": [0.0]}.get(name, values)
        return min(1.0, *values), max(1.0, *values)
    return SLOPES.get(name)


def activation_constant(name: str, parameter: float | Sequence[float] | None = None) -> float | None:
    """The Lipschitz constant of an elementwise activation, or None where no sound rule is known."""
    slopes = activation_slopes(name, parameter)
    return None if slopes is None else max(abs(slopes[0]), abs(slopes[1]))


def norm_constant(gamma: Tensor | None, eps: float) -> float:
    """The global constant max|gamma| / sqrt(eps) of RMSNorm, LayerNorm, GroupNorm; infinite for eps = 0."""
    top = 1.0 if gamma is None else float(gamma.detach().abs().double().max())
    return top / math.sqrt(eps) * (1 + 1e-12) if eps > 0 else math.inf


def batchnorm_scale(gamma: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """The factor gamma / sqrt(variance + eps) that a BatchNorm in eval mode applies to each channel: float64 (c,)."""
    scale = (variance.detach().double() + eps).rsqrt()
    return scale if gamma is None else scale * gamma.detach().double()


def input_box(mean: Tensor, std: Tensor, size: Sequence[int]) -> tuple[Tensor, float]:
    """The centre (c, *size), float64, and the Euclidean radius of the box of all normalised images.

    Pixels before normalisation are in [0, 1]. Raises ModhifiError for a standard deviation that is not positive. Every
    image lies within the radius of the centre, so `|f(x)| <= |f(centre)| + constant * radius` for every input.
    """
    if bool((std <= 0).any()):
        raise ModhifiError("a standard deviation of the preprocessing is not positive; check mean and std")
    mean, std = mean.detach().double().flatten(), std.detach().double().flatten()
    shape = (-1, *[1] * len(size))
    centre = ((0.5 - mean) / std).reshape(shape).expand(-1, *size).clone()
    radius = 0.5 * math.sqrt(math.prod(size) * float(std.pow(-2).sum()))
    return centre, radius * (1 + 1e-12)


def minkowski(constants: Sequence[float], squared_errors: Sequence[Tensor]) -> float:
    """The bound `sum_k C_k sqrt(mean e_k^2)` of `sqrt(E|dN|^2)` over samples, by Minkowski's inequality.

    `squared_errors` holds e_k^2 (n,) for each modified layer, `constants` its C_k. Source: docs/method.md, R1.

    `sum_k C_k^2 mean e_k^2` would be unsound: errors of several layers may point the same way.
    """
    terms = [c * float(torch.sqrt(e.double().mean())) for c, e in zip(constants, squared_errors, strict=True)]
    return math.fsum(terms) * (1 + 1e-12)
