"""The type of a selector, the registry of selectors, and the helpers of those that sort components by a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi.calibration.low_rank import Second
from modhifi.pruning.readers import Reader
from modhifi.registry import Registry

Order = Callable[[Sequence[Reader], int], Tensor | None]
"""From a group's readers and a seed to its n components from first to last to go, int64 ``(n,)`` on the CPU.

None leaves it to :func:`modhifi.pruning.elimination.eliminate`, which finds an order while it removes.
"""


@dataclass(frozen=True)
class Selector:
    """A named rule of which components go first.

    ``source`` names its paper; ``needs_moments`` says that it reads moments.
    """

    name: str
    summary: str
    source: str
    order: Order
    needs_moments: bool = True


SELECTORS: Registry[Selector] = Registry("selector")


def register_selector(name: str, order: Order, summary: str = "", source: str = "") -> None:
    """Adds a selector under a name that recipes and ``method`` then know.

    ``order(readers, seed)`` takes the readers of a group of n components, one :class:`modhifi.pruning.readers.Reader`
    for each layer, and returns the components' numbers from first to last to go, int64 ``(n,)``. The removed components
    are priced and compensated as with any other selector. ``summary`` says in one line what the rule is, ``source``
    names its paper. The entry lasts as long as the program.

    Raises ModhifiError for a name that is taken; :func:`modhifi.prune` raises it for an order that is no permutation.

    >>> import modhifi, torch
    >>> def last(readers, seed):
    ...     n = len(readers[0].owner)
    ...     return torch.arange(n - 1, -1, -1)
    >>> modhifi.register_selector("last", last, "the last components go first")
    >>> given = {"method": {"selector": "last", "layout": "uniform"}, "checks": {"walked": 0}}
    >>> small = modhifi.prune("demo:resnet", "demo:calibration", ratio=0.5, samples=32, **given)
    >>> small.plan.kept["conv1.0"]
    (0, 1, 2, 3, 4, 5, 6, 7)
    """
    SELECTORS.register(Selector(name, summary, source, order))


Score = Callable[[Tensor, Second, Tensor], Tensor]
"""From weight ``(o, d)``, second moment ``(d, d)`` and columns ``(n, m)`` to one figure a component, ``(n,)``."""


def summed(readers: Sequence[Reader], score: Score) -> Tensor:
    """A score added up over a group's readers, float64 ``(n,)`` on the CPU."""
    total = torch.zeros(len(readers[0].owner), dtype=torch.float64)
    for part in (part for reader in readers for part in reader.parts):
        total[part.components] += score(part.weight, part.second, part.columns).cpu()
    return total


def lowest_first(score: Score) -> Order:
    """The order in which the summed score rises, ties by number."""
    return lambda readers, seed: summed(readers, score).argsort(stable=True)
