"""Optimal Brain Surgeon on blocks: several groups of equal shape lose components in lock-step. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from modhifi.pruning.gram_surgeon import GramStack
from modhifi.pruning.readers import Reader
from modhifi.pruning.slots import stacked
from modhifi.pruning.span_surgeon import SpanStack


class Elimination:
    """Exact removal costs and updates for groups of readers (docs/method.md, selection).

    With ``H = (S + λI)⁻¹``, removing the columns I costs ``tr[W_I H_II⁻¹ W_Iᵀ]``; afterwards
    ``W ← W − W_I H_II⁻¹ H_I,:`` and ``H ← H − H_:,I H_II⁻¹ H_I,:``. Several readers add their costs. What goes
    next is decided by errors as they leave a BatchNorm (rows of W times ``Reader.scale``); what it cost is the error
    ahead of it, which is the one that can be told from the weights alone. ``wide`` is the precision in which
    readers of more than ``gram_surgeon.WIDE`` columns lose theirs; all else is float64.

    ``groups`` have readers of equal shapes, and lose ``most`` components at most. Where they are several, equally many
    components of every label of ``labels`` int64 ``(n,)``, numbers from 0 on, must go at a time, and those of each
    label in turn. ``energy`` float64 ``(groups,)`` is that of the readers' outputs, ``fidelity`` float64
    ``(groups, n)`` the best singleton fidelity of the components. Raises
    :class:`modhifi.errors.IndefiniteError` where a Gram has no inverse.
    """

    def __init__(
        self,
        groups: Sequence[list[Reader]],
        ridge: float,
        wide: torch.dtype = torch.float64,
        labels: Tensor | None = None,
        most: int | None = None,
    ) -> None:
        self.readers, n = groups, len(groups[0][0].owner)
        self.labels = 1 if labels is None else int(labels.max()) + 1
        self.stacks = [
            SpanStack(slots, len(groups), ridge)
            if slots[0].rows and len(slots[0].part.components) == n
            else GramStack(slots, len(groups), n, ridge, wide, n if most is None else most)
            for slots in stacked(groups, labels, self.labels)
        ]
        self.energy = reduce(torch.add, [stack.energy for stack in self.stacks])
        self.gone = torch.zeros(len(groups), n, dtype=torch.bool, device=self.energy.device)
        self.fidelity = torch.zeros(self.gone.shape, dtype=torch.float64, device=self.energy.device)
        for stack in self.stacks:
            self.fidelity.view(-1).scatter_reduce_(0, stack.place.flatten(), stack.fidelity.flatten(), "amax")

    def costs(self) -> Tensor:
        """Cost behind the norms of removing each component alone; infinity for the removed ones. ``(groups, n)``."""
        return reduce(torch.add, [stack.costs() for stack in self.stacks]).masked_fill(self.gone, math.inf)

    def remove(self, components: Tensor) -> None:
        """Remove components ``(groups, c)``, by number, jointly."""
        self.gone.scatter_(1, components, True)
        for stack in self.stacks:
            stack.remove(components, self.labels)
            stack.compact(self.gone)

    def lost(self) -> Tensor:
        """The exact costs of all that is removed, ahead of the norms, after each step, ``(groups, steps + 1)``."""
        return reduce(torch.add, [stack.lost() for stack in self.stacks])

    def weights(self) -> list[tuple[Tensor, ...]]:
        """Every reader's weights as they are now, by group, float32 ``(G, o, d)``."""
        result = [tuple(reader.weight.float() for reader in readers) for readers in self.readers]
        for stack in self.stacks:
            for slot, weight in zip(stack.slots, stack.weights(self.gone), strict=True):
                result[slot.group][slot.reader][slot.part.group] = weight[: len(slot.part.weight)]
        return result

    def solved(self) -> Tensor:
        """For which groups the numbers can be believed, bool ``(groups,)``."""
        return torch.stack([stack.solved() for stack in self.stacks]).all(0)
