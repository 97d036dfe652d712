"""What a distillation keeps: its learning curve, its place, and the student that comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Healed:
    """The student with its best weights, in eval mode and in the dtypes that it came in.

    ``curve`` has an entry an interval: ``step``, ``seconds``, ``loss`` (mean of the training loss since the entry
    before), and on the validation samples ``divergence`` and ``agreement`` with its standard ``error``. ``best`` is the
    step of the weights taken, ``broken`` that of an interval whose loss was not finite, None where all were. ``blocks``
    were matched. ``precision`` is what the products of a step were made in, as accelerate calls it.
    """

    model: nn.Module
    curve: tuple[Mapping[str, Any], ...]
    steps: int
    seconds: float
    best: int
    broken: int | None
    early: bool
    blocks: tuple[str, ...]
    precision: str
    notes: tuple[str, ...]


@dataclass
class State:
    """What a checkpoint holds beside the weights.

    ``rate`` multiplies the learning rate, as it has since entry ``since`` of the curve.
    """

    step: int = 0
    micro: int = 0
    rate: float = 1.0
    since: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def best_entry(curve: Sequence[Mapping[str, Any]]) -> int:
    """The place in a curve of the weights to take.

    An entry takes the place of an earlier one whose agreement it exceeds by more than its own standard error,
    ``error``, or to which it comes as near with less divergence: a few samples more that agree are chance.
    """
    best = 0
    for place, entry in enumerate(curve):
        margin = (entry["agreement"] or 0.0) - (curve[best]["agreement"] or 0.0)
        nearer = entry["divergence"] < curve[best]["divergence"]
        if margin > entry["error"] or (nearer and margin >= -entry["error"]):
            best = place
    return best
