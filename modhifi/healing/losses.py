"""How far a student is from its teacher: at the output and block by block. Pure functions of tensors.

Sources: Hinton et al. 2015, "Distilling the knowledge in a neural network"; Romero et al. 2015, "FitNets".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from modhifi.structure.outputs import classes_last

# The logits that are compared at a time.
PART = 2**21
# The logit of a closed class: its exponential is 0 as that of -inf is, and 0 times it no NaN, in every dtype and at
# every temperature.
LOWEST = -1e30


def output_loss(
    teacher: Tensor,
    student: Tensor,
    real: Tensor | None = None,
    *,
    temperature: float = 1.0,
    spread: float | None = None,
    closed: Sequence[int] = (),
) -> Tensor:
    """The mean distance of two outputs over items, or over the real positions of sequences; a float32 number.

    Of logits ``(batch, ..., classes)`` the Kullback-Leibler divergence at a temperature, times its square, in nats. The
    teacher gives the ``closed`` classes no probability, and shares theirs out. Of values, whose ``spread`` is
    given, the squared distance of rows over it. ``real`` is a bool mask ``(batch, positions)``.
    """
    teacher, student = classes_last(teacher), classes_last(student)
    if spread is not None:
        return _mean((student.float() - teacher.float()).square().sum(-1), real) / spread
    if closed:
        lowest = max(torch.finfo(teacher.dtype).min, LOWEST)
        teacher = teacher.index_fill(-1, torch.tensor(closed, device=teacher.device), lowest)
    return temperature**2 * _mean(_Divergence.apply(teacher, student, temperature), real)


def block_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """The squared distance of the blocks' outputs over the teacher's squared norm, a mean over rows and blocks.

    A row is an item, of sequences ``(batch, positions, width)`` a position; ``real`` masks positions.
    """
    shares = []
    for wanted, got in zip(teacher, student, strict=True):
        # bfloat16 has the range of squares, and converting outputs costs as much as comparing them
        wanted, got = (x if x.dtype == torch.bfloat16 else x.float() for x in (wanted, got))
        row = (2,) if wanted.ndim == 3 else tuple(range(1, wanted.ndim))
        distance = _SquaredNorm.apply(got - wanted, row)
        norm = _SquaredNorm.apply(wanted, row)
        shares.append(_mean(distance / norm.clamp_min(torch.finfo(norm.dtype).tiny), real))
    return torch.stack(shares).mean()


def agreement(teacher: Tensor, student: Tensor, real: Tensor | None = None, closed: Sequence[int] = ()) -> Tensor:
    """The share of items, or of real positions, whose largest logit is that of the same class."""
    teacher, student = classes_last(teacher), classes_last(student)
    if closed:
        teacher = teacher.index_fill(-1, torch.tensor(closed, device=teacher.device), -torch.inf)
    return _mean((teacher.argmax(-1) == student.argmax(-1)).float(), real)


def _mean(rows: Tensor, real: Tensor | None) -> Tensor:
    """The mean over rows, of sequences over their real positions."""
    if real is None or real.shape != rows.shape:
        return rows.mean()
    return (rows * real).sum() / real.sum()


class _Divergence(torch.autograd.Function):
    """The divergence of every row of softened logits ``(..., classes)``, float32.

    Its gradient, the difference of the two probabilities, is taken on the way, some rows at a time: the logits of a
    vocabulary are the largest tensors of a step, and each would be read and written a dozen times.
    """

    @staticmethod
    def forward(context: Any, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        size = max(1, PART // student.shape[-1])
        difference = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        parts = zip(*(x.flatten(0, -2).split(size) for x in (teacher, student, difference)), strict=True)
        rows = []
        for given, seen, kept in parts:
            wanted, got = (x.float() if temperature == 1 else x.float() / temperature for x in (given, seen))
            wanted, got = wanted.log_softmax(-1), got.log_softmax(-1)
            probability = wanted.exp()
            rows.append(wanted.sub_(got).mul_(probability).sum(-1))
            if context.needs_input_grad[1]:
                kept.copy_(got.exp_().sub_(probability))
        context.save_for_backward(difference)
        context.temperature = temperature
        return torch.cat(rows).view(student.shape[:-1])

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (difference,) = context.saved_tensors
        return None, difference * (grad / context.temperature).unsqueeze(-1).to(difference.dtype), None


class _SquaredNorm(torch.autograd.Function):
    """The squared norms over some axes, float32 whatever the dtype: a pass each way, as blocks' outputs are large."""

    @staticmethod
    def forward(context: Any, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        context.save_for_backward(x)
        norm: Tensor = vector_norm(x, dim=axes, keepdim=True, dtype=torch.float32)
        context.shape = norm.shape
        return norm.square().squeeze(axes)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = context.saved_tensors
        return x * (2 * grad).view(context.shape).to(x.dtype), None
