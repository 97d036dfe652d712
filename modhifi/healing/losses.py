"""How far a student is from its teacher: at the output and block by block. Pure functions of tensors.

Sources: Hinton et al. 2015, "Distilling the knowledge in a neural network"; Romero et al. 2015, "FitNets".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import kl_div

from modhifi.bounds.held_out import classes_last


def output_loss(
    teacher: Tensor,
    student: Tensor,
    real: Tensor | None = None,
    *,
    temperature: float = 1.0,
    features: bool = False,
    closed: Sequence[int] = (),
) -> Tensor:
    """The mean distance of two outputs over items, or over the real positions of sequences; a float32 number.

    Of logits ``(batch, ..., classes)`` the Kullback-Leibler divergence at a temperature, times its square, in nats. The
    teacher gives the ``closed`` classes no probability, and shares theirs out. Of ``features`` the squared distance
    over the teacher's squared norm. ``real`` is a bool mask ``(batch, positions)``.
    """
    teacher, student = classes_last(teacher).float(), classes_last(student).float()
    if features:
        return block_loss([teacher], [student], real)
    if closed:  # the lowest number, of which the exponential is 0 as that of -inf is, and 0 times it no NaN
        lowest = torch.finfo(teacher.dtype).min
        teacher = teacher.index_fill(-1, torch.tensor(closed, device=teacher.device), lowest)
    if temperature != 1:  # logits of a vocabulary are large
        teacher, student = teacher / temperature, student / temperature
    wanted = teacher.log_softmax(-1)
    rows = kl_div(student.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
    return temperature**2 * _mean(rows, real)


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
