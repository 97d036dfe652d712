"""How far a student is from its teacher: at the output and block by block. Pure functions of tensors.

Sources: Hinton et al. 2015, "Distilling the knowledge in a neural network"; Romero et al. 2015, "FitNets".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
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
    if closed:
        teacher = teacher.index_fill(-1, torch.tensor(closed, device=teacher.device), -torch.inf)
    wanted = (teacher / temperature).softmax(-1)
    rows = kl_div((student / temperature).log_softmax(-1), wanted, reduction="none").sum(-1)
    return temperature**2 * _mean(rows, real)


def block_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """The squared distance of the blocks' outputs over the teacher's squared norm, a mean over rows and blocks.

    A row is an item, of sequences ``(batch, positions, width)`` a position; ``real`` masks positions.
    """
    shares = []
    for wanted, got in zip(teacher, student, strict=True):
        wanted, got = wanted.float(), got.float()
        if wanted.ndim != 3:
            wanted, got = wanted.flatten(1), got.flatten(1)
        distance, norm = (wanted - got).square().sum(-1), wanted.square().sum(-1)
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
