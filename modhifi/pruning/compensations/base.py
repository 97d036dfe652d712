"""What a compensation is: new weights for what is left of a reader. Pure: tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modhifi.calibration.low_rank import Second
from modhifi.registry import Registry


class Edit(Protocol):
    """New weights of a reader, float64 ``(o, d)``, zero in the columns of the components that go.

    ``weight`` float64 ``(o, d)``; ``second`` float64 ``(d, d)``, the matrix S that applies, or what stands for it;
    ``blocks`` int64 ``(n, m)``, the m columns of each of n components; ``kept`` bool ``(n,)``; ``ridge`` in units of
    the mean diagonal of what is solved with. Columns outside every block belong to nothing that goes. Raises
    :class:`modhifi.errors.IndefiniteError` where no damping makes a solution.
    """

    def __call__(self, weight: Tensor, second: Second, blocks: Tensor, kept: Tensor, ridge: float) -> Tensor: ...


@dataclass(frozen=True)
class Compensation:
    """A named rule for the weights that are left.

    ``least_squares`` says that its weights are those that :func:`modhifi.pruning.elimination.eliminate` finds on its
    way; ``restores_mean`` that a bias, or the running mean of a BatchNorm behind, takes the change of the mean;
    ``needs_moments`` that it reads moments.
    """

    name: str
    summary: str
    source: str
    edit: Edit
    least_squares: bool = False
    restores_mean: bool = True
    needs_moments: bool = True


COMPENSATIONS: Registry[Compensation] = Registry("compensation")


def kept_columns(columns: int, blocks: Tensor, kept: Tensor) -> Tensor:
    """Which of a reader's columns stay: all but those of the blocks ``(n, m)`` that go, bool ``(columns,)``."""
    stay = torch.ones(columns, dtype=torch.bool, device=blocks.device)
    stay[blocks[~kept].reshape(-1)] = False
    return stay
