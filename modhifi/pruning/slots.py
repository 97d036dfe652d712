"""Parts of readers that lose their components together: which of several groups have one shape. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modhifi.calibration.low_rank import LowRank
from modhifi.pruning.readers import Reader, ReaderPart

# Readers of fewer output channels are filled up with channels of zeros, to go with others, up to so many elements in
# all.
FILLED = 2**24


@dataclass(frozen=True)
class Slot:
    """One part of one reader of one group: numbers of the group and of the reader in it, the part, its scale ``(o,)``.

    ``labels`` are those of the partition that its components have, None where they share some with other parts.
    """

    group: int
    reader: int
    part: ReaderPart
    scale: Tensor | None
    labels: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """Of how many rows its second moment stands in the span, 0 where it is a matrix."""
        return self.part.second.factor.shape[1] if isinstance(self.part.second, LowRank) else 0


def stacked(groups: Sequence[list[Reader]], labels: Tensor | None, count: int) -> Iterator[list[Slot]]:
    """The parts of all readers of groups of equal shapes, those together that have one shape.

    ``labels`` int64 ``(n,)`` of the components are numbers under ``count``. In every list the slots stand reader by
    reader, and group by group in these.
    """
    stacks: dict[tuple[object, ...], list[Slot]] = defaultdict(list)
    for number, same in enumerate(zip(*groups, strict=True)):
        parts = [reader.parts for reader in same]
        for at, part in enumerate(parts[0]):
            names = _labels_of(part, labels, count, alone=len(parts[0]) == 1)
            for group, reader in enumerate(same):
                part = parts[group][at]
                scale = None if reader.scale is None else reader.scale[part.group]
                slot = Slot(group, number, part, scale, names)
                shape = (len(part.second), *part.columns.shape, slot.rows, scale is None, names and len(names))
                stacks[*shape, *((number, at) if names is None else ())].append(slot)
    for slots in stacks.values():
        yield from _filling(slots, len(groups))


def _filling(slots: Sequence[Slot], groups: int) -> Iterator[list[Slot]]:
    """The slots, those together that may be filled up to the output channels of the largest, for all groups alike."""
    rest = sorted(slots, key=lambda slot: -len(slot.part.weight))
    while rest:
        largest, d = len(rest[0].part.weight), len(rest[0].part.second)
        fits = [
            len(slot.part.weight) == largest or (number // groups + 1) * groups * largest * d <= FILLED
            for number, slot in enumerate(rest)
        ]
        yield [slot for slot, fit in zip(rest, fits, strict=True) if fit]
        rest = [slot for slot, fit in zip(rest, fits, strict=True) if not fit]


def _labels_of(part: ReaderPart, labels: Tensor | None, count: int, alone: bool) -> tuple[int, ...] | None:
    """The labels that only components of this part have; None where other parts, unless it is ``alone``, have them."""
    if alone:
        return tuple(range(count))
    if labels is None:
        return None
    inside = labels[part.components]
    own = inside.unique()
    return tuple(own.tolist()) if int(torch.isin(labels, own).sum()) == len(inside) else None


def scales_of(slots: Sequence[Slot]) -> Tensor | None:
    """The scales of the slots, ``(B, o)``, None where they have none."""
    scales = [slot.scale for slot in slots if slot.scale is not None]
    return pad_sequence(scales, batch_first=True, padding_value=1.0) if scales else None


def by_group(values: Tensor, groups: int) -> Tensor:
    """Values of the slots, ``(B, ...)``, added up over the readers and parts of each group."""
    return values if len(values) == groups else values.unflatten(0, (-1, groups)).sum(0)


def components_first(columns: Tensor, d: int) -> Tensor:
    """All d columns, those of components ``(B, c)`` first, ``(B, d)``."""
    others = torch.ones(len(columns), d, dtype=torch.uint8, device=columns.device).scatter_(1, columns, 0)
    rest = others.argsort(dim=1, descending=True, stable=True)[:, : d - columns.shape[1]]
    return torch.cat([columns, rest], 1)
