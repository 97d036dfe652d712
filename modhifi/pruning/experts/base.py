"""What a selector of experts sees and says, and the registry of such selectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from modhifi.pruning.experts.block import Block
from modhifi.registry import Registry

Cost = Callable[[Block, Tensor, int], Tensor]
"""From a block of experts, those that are still there, bool ``(E,)``, and a seed to what each is worth, ``(E,)``.

Of those still there the one of the least worth goes next. What is said of the others is not read.
"""


@dataclass(frozen=True)
class ExpertSelector:
    """A named rule of which experts of a mixture go first; ``source`` names its paper.

    ``anew`` says that the worth of an expert changes when others go: it is asked for after every removal.
    """

    name: str
    summary: str
    source: str
    worth: Cost
    anew: bool = False


EXPERT_SELECTORS: Registry[ExpertSelector] = Registry("selector of experts")
