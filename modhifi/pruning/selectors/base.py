"""What a selector is, and what those share that sort components by a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi.pruning.readers import Reader
from modhifi.registry import Registry

Order = Callable[[Sequence[Reader], int], Tensor | None]
"""From a group's readers and a seed to its n components from first to last to go, int64 ``(n,)`` on the CPU.

None leaves it to :func:`modhifi.pruning.elimination.eliminate`, which finds an order while it removes.
"""


@dataclass(frozen=True)
class Selector:
    """A named rule of which components go first; ``needs_gram`` says whether it reads second moments."""

    name: str
    summary: str
    source: str
    order: Order
    needs_gram: bool = True


SELECTORS: Registry[Selector] = Registry("selector")


Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From weight ``(o, d)``, second moment ``(d, d)`` and columns ``(n, m)`` to one figure a component, ``(n,)``."""


def summed(readers: Sequence[Reader], score: Score) -> Tensor:
    """A score added up over a group's readers, float64 ``(n,)`` on the CPU."""
    total = torch.zeros(len(readers[0].owner), dtype=torch.float64)
    for part in (part for reader in readers for part in reader.parts()):
        total[part.components] += score(part.weight, part.second, part.columns).cpu()
    return total


def lowest_first(score: Score) -> Order:
    """The order in which the summed score rises, ties by number."""
    return lambda readers, seed: summed(readers, score).argsort(stable=True)
