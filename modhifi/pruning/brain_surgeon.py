"""The state of Optimal Brain Surgeon on blocks: several groups of equal shape lose components in lock-step. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modhifi.calibration.low_rank import LowRank, as_tensor
from modhifi.pruning.linalg import damped_inverse
from modhifi.pruning.readers import Reader, ReaderPart, Slot
from modhifi.pruning.span_surgeon import SpanStack

# Readers of more columns lose their components in single precision, which costs half. Their inverse is still made in
# double: badly conditioned Grams have none in single.
WIDE = 512
# The share of the columns of a wide reader that may be stale: dropping them at every step would cost more than it
# saves, and in narrower readers it saves nothing.
STALE = 1 / 4
# Readers of fewer output channels are filled up with channels of zeros, to go with others, up to so many elements in
# all.
FILLED = 2**24


class Stack:
    """Slots of one shape while components go: k components of m columns each, d columns in all, o output channels.

    ``both`` ``(B, l, l + o)`` is ``[H, Wᵀ]`` behind the norm, for the columns that are left and some stale ones. Of
    wide readers H stays as it was, and ``factor`` ``(B, r, l)`` holds what the r removed columns take from it: only
    what is about to go is brought up to date, at half of the work. The columns of component j of those in
    ``components`` ``(B, k)`` stand at ``j m .. (j + 1) m``, columns of none behind. ``positions`` ``(B, l)`` says which
    column of the reader each is. Slots stand reader by reader, and group by group in these.
    """

    def __init__(self, slots: Sequence[Slot], groups: int, n: int, ridge: float, wide: torch.dtype) -> None:
        self.slots, self.groups, self.n = slots, groups, n
        parts = [slot.part for slot in slots]
        second = torch.stack([as_tensor(p.second) for p in parts])
        weight = pad_sequence([p.weight for p in parts], batch_first=True)
        device, d = second.device, second.shape[-1]
        self.m = parts[0].columns.shape[1]
        self.components = torch.stack([p.components for p in parts]).to(device)
        columns = torch.stack([p.columns for p in parts]).to(device).flatten(1)
        self.scale = None
        if slots[0].scale is not None:
            scales = [s.scale for s in slots if s.scale is not None]
            self.scale = pad_sequence(scales, batch_first=True, padding_value=1.0)
            weight = weight * self.scale[:, :, None]
        self.positions = _with_the_rest(columns, d)
        self.both = torch.cat([damped_inverse(second, ridge), weight.transpose(1, 2)], 2)
        del second, weight
        if not torch.equal(self.positions, torch.arange(d, device=device).expand_as(self.positions)):
            self._take(self.positions)
        self.factor = None
        if d > WIDE:
            self.both = self.both.to(wide)
            self.factor = self.both.new_empty(len(slots), self.components.shape[1] * self.m, d)
        self.rank = 0
        self.numbers = torch.arange(len(slots), device=device)[:, None]
        # which components of the group they are, counted through all groups and readers
        self.owner = torch.tensor([slot.group for slot in slots], device=device)
        self.place = self.owner[:, None] * n + self.components
        self.whole = self.components.shape[1] == n
        self.info = torch.zeros(len(slots), dtype=torch.int32, device=device)
        labels = [slot.labels for slot in slots]
        self.labels = None if None in labels else torch.tensor(labels, device=device)
        self.gone = 0
        self._index()

    def _index(self) -> None:
        k, m = self.components.shape[1], self.m
        device = self.components.device
        self.columns = torch.arange(k * m, device=device).view(k, m)
        width = self.both.shape[1]
        self.base = self.numbers * width
        # views, which follow all changes in place
        self.flat = self.both.view(-1, self.both.shape[2])
        self.weight = self.both[:, : k * m, width:]
        inverse = self.both[:, : k * m, : k * m]
        if m == 1:
            self.blocks = inverse.diagonal(dim1=1, dim2=2)
        else:
            blocks = inverse.unflatten(2, (k, m)).unflatten(1, (k, m))
            self.blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        if self.factor is not None:
            self.blocks = self._blocks_now()
        self.row_of = None
        if not self.whole:
            # the place of every component of the group among these; the others' is never read
            self.row_of = torch.zeros(len(self.slots), self.n, dtype=torch.int64, device=device)
            self.row_of.scatter_(1, self.components, torch.arange(k, device=device).expand(len(self.slots), -1))

    def _take(self, rows: Tensor) -> None:
        """Keep only some columns ``(B, l)``, in that order."""
        before, width = self.both.shape[1:]
        rest = torch.arange(before, width, device=rows.device).expand(len(rows), -1)
        both = self.both.gather(1, rows[:, :, None].expand(-1, -1, width))
        self.both = both.gather(2, torch.cat([rows, rest], 1)[:, None].expand(-1, rows.shape[1], -1))

    def _blocks_now(self) -> Tensor:
        """The diagonal blocks of H up to date, ``(B, k)`` or ``(B, k, m, m)``, a tensor of their own."""
        assert self.factor is not None
        blocks = self.blocks.clone(memory_format=torch.contiguous_format)
        if self.rank:
            self._subtract(blocks, self.factor[:, : self.rank])
        return blocks

    def _subtract(self, blocks: Tensor, rows: Tensor) -> None:
        """Take the products of ``rows`` ``(B, r, l)`` with themselves from diagonal blocks, in place."""
        k, m = self.components.shape[1], self.m
        if m == 1:
            blocks -= rows[:, :, :k].square().sum(1)
        else:
            pieces = rows[:, :, : k * m].unflatten(2, (k, m)).permute(0, 2, 3, 1)
            blocks -= pieces @ pieces.transpose(2, 3)

    def costs(self) -> Tensor:
        """``tr[W_I H_II⁻¹ W_Iᵀ]`` of each component alone, added up over the readers, float64 ``(groups, n)``.

        Those of removed components, and of others that are not in any slot, mean nothing.
        """
        (size, k), m = self.components.shape, self.m
        if m == 1:
            alone = self.weight.square().sum(2) / self.blocks
        else:
            pieces = self.weight.reshape(size * k, m, -1)
            energy = torch.bmm(pieces, pieces.transpose(1, 2)).view(size, k, m, m)
            # No LU: behind a step that failed the blocks are not finite, and LAPACK's pivots for such are not valid.
            factor, indefinite = torch.linalg.cholesky_ex(self.blocks)
            alone = torch.cholesky_solve(energy, factor).diagonal(dim1=2, dim2=3).sum(2)
            alone = alone.masked_fill(indefinite != 0, 0)  # it goes next, and fails there
        alone = alone.clamp_min(0).double()
        if not self.whole:
            alone = alone.new_zeros(size, self.n).scatter_(1, self.components, alone)
        return self._by_group(alone)

    def _by_group(self, values: Tensor) -> Tensor:
        """Values of the slots, ``(B, ...)``, added up over the readers and parts of each group."""
        count = len(self.slots) // self.groups
        return values if count == 1 else values.unflatten(0, (count, self.groups)).sum(0)

    def remove(self, chosen: Tensor, labels: int) -> Tensor:
        """Remove ``chosen`` int64 ``(groups, c)`` jointly; their joint cost ahead of any norm, float64 ``(groups,)``.

        With ``labels`` of the partition, those of each stand in turn. One block step of a Gaussian elimination of H.
        """
        rows = self._rows(chosen, labels)
        if rows.shape[1] == 0:
            return torch.zeros(self.groups, dtype=torch.float64, device=rows.device)
        index = rows if self.m == 1 else self.columns[rows].flatten(1)
        width = self.both.shape[1]
        cross = self.flat[index + self.base]
        if self.factor is not None:
            taken = self.factor[:, : self.rank]
            own = taken.gather(2, index[:, None].expand(-1, self.rank, -1))
            cross[:, :, :width].baddbmm_(own.transpose(1, 2), taken, alpha=-1)
        factor, info = torch.linalg.cholesky_ex(cross.gather(2, index[:, None].expand(-1, index.shape[1], -1)))
        self.info += info
        new = torch.linalg.solve_triangular(factor, cross, upper=False)
        if self.factor is None:
            self.both.baddbmm_(new[:, :, :width].transpose(1, 2), new, alpha=-1)
        else:
            self.both[:, :, width:].baddbmm_(new[:, :, :width].transpose(1, 2), new[:, :, width:], alpha=-1)
            self.factor[:, self.rank : self.rank + new.shape[1]] = new[:, :, :width]
            self.rank += new.shape[1]
            self._subtract(self.blocks, new[:, :, :width])
        self.gone += rows.shape[1]
        pieces = new[:, :, width:]
        if self.scale is not None:
            pieces = pieces / self.scale[:, None]
        return self._by_group(pieces.square().sum((1, 2), dtype=torch.float64))

    def _rows(self, chosen: Tensor, labels: int) -> Tensor:
        """Where the chosen components stand in each slot, ``(B, c)``."""
        if self.labels is None:  # a single slot of one group, with only some of the components
            chosen = chosen[:, torch.isin(chosen[0], self.components[0])]
        elif self.labels.shape[1] < labels:
            chosen = chosen.unflatten(1, (-1, labels))[self.owner[:, None], :, self.labels].flatten(1)
        elif len(self.slots) > self.groups:
            chosen = chosen.repeat(len(self.slots) // self.groups, 1)
        return chosen if self.row_of is None else self.row_of.gather(1, chosen)

    def compact(self, gone: Tensor) -> None:
        """Drop the stale columns of wide readers once there are many; ``gone`` bool ``(groups, n)`` are all removed."""
        k, m, d = self.components.shape[1], self.m, self.both.shape[1]
        if d <= WIDE or self.gone * m <= STALE * d:
            return
        stale = gone.view(-1)[self.place]
        left = stale.to(torch.uint8).argsort(dim=1, stable=True)[:, : k - self.gone]
        spare = torch.arange(k * m, d, device=left.device).expand(len(left), -1)
        rows = torch.cat([self.columns[left].flatten(1), spare], 1)
        self._take(rows)
        if self.factor is not None:
            smaller = self.factor.new_empty(*self.factor.shape[:2], rows.shape[1])
            taken = self.factor[:, : self.rank]
            torch.gather(taken, 2, rows[:, None].expand(-1, self.rank, -1), out=smaller[:, : self.rank])
            self.factor = smaller
        self.positions = self.positions.gather(1, rows)
        self.components, self.place = self.components.gather(1, left), self.place.gather(1, left)
        self.gone, self.whole = 0, False
        self._index()

    def weights(self, gone: Tensor) -> Tensor:
        """Every slot's weights as they are now, float32 ``(B, o, d)``, zero in the removed columns."""
        width, k = self.both.shape[1], self.components.shape[1]
        weight = self.both[:, :, width:].transpose(1, 2)
        if self.scale is not None:
            weight = weight / self.scale[:, :, None]
        stale = torch.nn.functional.pad(gone.view(-1)[self.place].repeat_interleave(self.m, 1), (0, width - k * self.m))
        weight = weight.float().masked_fill(stale[:, None], 0)
        whole = weight.new_zeros(*weight.shape[:2], self.slots[0].part.second.shape[-1])
        return whole.scatter_(2, self.positions[:, None].expand_as(weight), weight)

    def solved(self) -> Tensor:
        """For which groups every factorisation succeeded, bool ``(groups,)``."""
        return self._by_group(self.info) == 0


class Elimination:
    """Optimal Brain Surgeon on blocks: exact removal costs and updates for groups (docs/method.md, selection).

    With ``H = (S + λI)⁻¹``, removing the columns I costs ``tr[W_I H_II⁻¹ W_Iᵀ]``; afterwards
    ``W ← W − W_I H_II⁻¹ H_I,:`` and ``H ← H − H_:,I H_II⁻¹ H_I,:``. Several readers add their costs. What goes
    next is decided by errors as they leave a BatchNorm (rows of W times ``Reader.scale``); what it cost is the error
    ahead of it, which is the one that can be told from the weights alone. ``wide`` is the precision in which
    readers of more than ``WIDE`` columns lose theirs; all else is float64.

    ``groups`` have readers of equal shapes. Where these are several, equally many components of every label of
    ``labels`` int64 ``(n,)``, numbers from 0 on, must go at a time, and those of each label in turn. Raises
    :class:`modhifi.errors.IndefiniteError` where a Gram has no inverse.
    """

    def __init__(
        self,
        groups: Sequence[list[Reader]],
        ridge: float,
        wide: torch.dtype = torch.float64,
        labels: Tensor | None = None,
    ) -> None:
        self.readers = groups
        self.n = len(groups[0][0].owner)
        self.labels = 1 if labels is None else int(labels.max()) + 1
        stacks: dict[tuple[object, ...], list[Slot]] = defaultdict(list)
        for number, reader in enumerate(groups[0]):
            parts = reader.parts()
            own = [_labels_of(part, labels, self.labels, alone=len(parts) == 1) for part in parts]
            for at, names in enumerate(own):
                for group, readers in enumerate(groups):
                    same, part = readers[number], readers[number].parts()[at]
                    scale = None if same.scale is None else same.scale[part.group]
                    rows = part.second.factor.shape[1] if isinstance(part.second, LowRank) and len(parts) == 1 else 0
                    key = (rows, len(part.second), *part.columns.shape, scale is None, names and len(names))
                    place = (number, at) if names is None else ()
                    stacks[*key, *place].append(Slot(group, number, part, scale, names))
        self.stacks = [
            SpanStack(some, len(groups), self.n, ridge) if rows else Stack(some, len(groups), self.n, ridge, wide)
            for (rows, *_), slots in stacks.items()
            for some in _filling(slots, len(groups))
        ]
        self.gone = torch.zeros(len(groups), self.n, dtype=torch.bool, device=groups[0][0].weight.device)

    def costs(self) -> Tensor:
        """Cost behind the norms of removing each component alone; infinity for the removed ones. ``(groups, n)``."""
        total = self.stacks[0].costs()
        for stack in self.stacks[1:]:
            total += stack.costs()
        return total.masked_fill_(self.gone, math.inf)

    def remove(self, components: Tensor) -> Tensor:
        """Remove components ``(groups, c)``, by number, jointly; the exact joint costs, float64 ``(groups,)``."""
        self.gone.scatter_(1, components, True)
        total = torch.zeros(len(self.gone), dtype=torch.float64, device=self.gone.device)
        for stack in self.stacks:
            total += stack.remove(components, self.labels)
            stack.compact(self.gone)
        return total

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


def _with_the_rest(columns: Tensor, d: int) -> Tensor:
    """All d columns, the given ones ``(B, c)`` first, ``(B, d)``."""
    others = torch.ones(len(columns), d, dtype=torch.uint8, device=columns.device).scatter_(1, columns, 0)
    rest = others.argsort(dim=1, descending=True, stable=True)[:, : d - columns.shape[1]]
    return torch.cat([columns, rest], 1)
