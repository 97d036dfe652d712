"""Muon: steps along the orthogonalised momentum of every matrix, as large as its weights say.

A gradient of a few images lies in few directions, and those of two batches have hardly one in common. Orthogonalised,
all directions of a matrix are learnt at one pace. `torch.optim.Muon` takes no convolutions.

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (momentum, iteration and its
coefficients); You et al. 2017, "Large batch training of convolutional networks" (steps relative to the weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

MOMENTUM, ITERATIONS, COEFFICIENTS = 0.95, 5, (3.4445, -4.7750, 2.0315)
# The root mean square that weights are taken to have at least: what starts at zero has to move.
LEAST = 1e-3


class Muon(Optimizer):
    """Muon for every parameter of ``model`` that takes gradients.

    ``lr`` is the Frobenius norm of a step over that of the weights. Convolutions are matrices ``(outputs, rest)``, and
    stacks of matrices are so many. Vectors go along their normalised momentum, as a matrix of one row would. The
    iteration runs in ``dtype``.
    """

    def __init__(self, model: nn.Module, lr: float, dtype: torch.dtype = torch.float32) -> None:
        kinds: dict[str, list[nn.Parameter]] = {"vector": [], "convolution": [], "matrix": []}
        for parameter, kind in _kinds(model):
            kinds[kind].append(parameter)
        groups = [{"params": params, "kind": kind} for kind, params in kinds.items() if params]
        super().__init__(groups, {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; what is of one shape is orthogonalised at once."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                moved = torch.stack([self._momentum(p) for p in parameters])
                steps = _directions(moved, group["kind"], self.dtype)
                for parameter, step in zip(parameters, steps, strict=True):
                    least = LEAST * parameter.numel() ** 0.5
                    size = torch.linalg.vector_norm(parameter).clamp_min(least)
                    parameter.addcmul_(step.to(parameter.dtype), size, value=-group["lr"])

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """Nesterov's."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
        return parameter.grad.add(momentum, alpha=MOMENTUM)


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices ``(n, rows, columns)`` whose singular values are near 1, in ``dtype``, by a Newton-Schulz iteration.

    A matrix of zeros stays one.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / _norm(x, (-2, -1))).to(dtype)
    if x.shape[-2] > 1:
        a, b, c = COEFFICIENTS
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The norm along some axes, kept, in float32 or more, nowhere 0."""
    norm: Tensor = torch.linalg.vector_norm(
        x, dim=axes, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return norm.clamp_min(torch.finfo(torch.float32).tiny)


def _kinds(model: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """Every parameter that takes gradients, once, and what it is read as."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            if parameter.ndim < 2:
                yield parameter, "vector"
            else:
                yield parameter, "convolution" if isinstance(module, _ConvNd) else "matrix"


def _directions(stacked: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The directions of norm 1 of parameters of one shape, ``(n, ...)``."""
    if kind == "vector":
        rows = stacked.reshape(len(stacked), -1)  # a number is one of length 1
        return (rows / _norm(rows, (-1,))).view(stacked.shape)
    matrices = stacked.flatten(2) if kind == "convolution" else stacked.flatten(0, -3)
    steps = orthogonalised(matrices, dtype).reshape(stacked.shape)
    return steps / _norm(steps, tuple(range(1, steps.ndim)))
