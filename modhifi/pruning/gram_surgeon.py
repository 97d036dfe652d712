"""Optimal Brain Surgeon on blocks for readers with a Gram: the state of those of one shape. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modhifi.calibration.low_rank import as_tensor
from modhifi.pruning.fidelity import singleton_fidelity
from modhifi.pruning.linalg import columns_at, damped_inverse, rows_at
from modhifi.pruning.slots import Slot, by_group, components_first, scales_of

# Readers of more columns lose their components in single precision, which costs half. Their inverse is still made in
# double: badly conditioned Grams have none in single.
WIDE = 512
# The share of the columns of a wide reader that may be stale: dropping them at every step would cost more than it
# saves, and in narrower readers it saves nothing.
STALE = 1 / 4


class GramStack:
    """Slots of one shape while components go: k components of m columns each, d columns in all, o output channels.

    ``both`` ``(B, l, l + o)`` is ``[H, Wᵀ]`` behind the norm, for the columns that are left and some stale ones, and
    ``taken`` ``(B, r, l + o)`` holds what each of the r removed columns takes from it. Of wide readers H stays as it
    was: only what is about to go is brought up to date, at half of the work. No slot loses more than ``most``
    components. The columns of component j of those in
    ``components`` ``(B, k)`` stand at ``j m .. (j + 1) m``, columns of none behind. ``positions`` ``(B, l)`` says which
    column of the reader each is. Slots stand reader by reader, and group by group in these.
    """

    def __init__(self, slots: Sequence[Slot], groups: int, n: int, ridge: float, wide: torch.dtype, most: int) -> None:
        self.slots, self.groups, self.n = slots, groups, n
        parts = [slot.part for slot in slots]
        second = torch.stack([as_tensor(p.second) for p in parts])
        weight = pad_sequence([p.weight for p in parts], batch_first=True)
        device, d = second.device, second.shape[-1]
        self.components = torch.stack([p.components for p in parts]).to(device)
        k, self.m = parts[0].columns.shape
        columns = torch.stack([p.columns for p in parts]).flatten(1)
        positions = components_first(columns, d)
        self.positions = positions.to(device)
        if not torch.equal(positions, torch.arange(d, device=positions.device).expand_as(positions)):
            second = columns_at(rows_at(second, self.positions), self.positions)
            weight = columns_at(weight, self.positions)
        self.columns = torch.arange(k * self.m, device=device).view(k, self.m)
        # which components of the group they are, counted through all groups and readers
        self.owner = torch.tensor([slot.group for slot in slots], device=device)
        self.place = self.owner[:, None] * n + self.components
        product = torch.bmm(weight, second)
        self.energy = by_group((product * weight).sum((1, 2)), groups)
        single = torch.vmap(lambda w, s, p: singleton_fidelity(w, s, self.columns, p).amax(0))
        self.fidelity = single(weight, second, product)
        self.scale = scales_of(slots)
        if self.scale is not None:
            weight = weight * self.scale[:, :, None]
        self.both = torch.cat([damped_inverse(second, ridge), weight.mT], 2)
        del second, weight, product
        self.late = d > WIDE
        if self.late:
            self.both = self.both.to(wide)
        self.taken = self.both.new_empty(len(slots), min(k, most) * self.m, self.both.shape[2])
        self.whole = k == n
        labels = [slot.labels for slot in slots]
        self.labels = None if None in labels else torch.tensor(labels, device=device)
        self.gone, self.ends, self.infos = 0, [0], list[Tensor]()
        self._index()

    def _index(self) -> None:
        k, m, device = self.components.shape[1], self.m, self.components.device
        width = self.both.shape[1]
        self.columns = self.columns[:k]
        self.base = torch.arange(len(self.slots), device=device)[:, None] * width
        # views, which follow all changes in place
        self.flat = self.both.view(-1, self.both.shape[2])
        self.weight = self.both[:, :, width:]
        self.owned = self.weight[:, : k * m]
        inverse = self.both[:, : k * m, : k * m]
        self.blocks = inverse.unflatten(2, (k, m)).unflatten(1, (k, m)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        if self.late:
            self.blocks = self.blocks.contiguous()
        self.diagonal = self.blocks[:, :, 0, 0]
        if self.late and self.ends[-1]:
            self._subtract(self.taken[:, : self.ends[-1]])
        self.row_of = None
        if not self.whole:
            # the place of every component of the group among these; the others' is never read
            self.row_of = torch.zeros(len(self.slots), self.n, dtype=torch.int64, device=device)
            self.row_of.scatter_(1, self.components, torch.arange(k, device=device).expand(len(self.slots), -1))

    def _subtract(self, taken: Tensor) -> None:
        """Take the products of rows ``(B, r, l + o)`` with themselves from the diagonal blocks, in place."""
        k, m = self.components.shape[1], self.m
        if m == 1:
            self.diagonal -= taken[:, :, :k].square().sum(1)
        else:
            pieces = taken[:, :, : k * m].unflatten(2, (k, m)).permute(0, 2, 3, 1).reshape(-1, m, taken.shape[1])
            self.blocks.view(-1, m, m).baddbmm_(pieces, pieces.mT, alpha=-1)

    def costs(self) -> Tensor:
        """``tr[W_I H_II⁻¹ W_Iᵀ]`` of each component alone, added up over the readers, float64 ``(groups, n)``.

        Those of removed components, and of others that are not in any slot, mean nothing.
        """
        (size, k), m = self.components.shape, self.m
        if m == 1:
            alone = self.owned.square().sum(2, dtype=torch.float64) / self.diagonal
        else:
            # No LU: behind a step that failed the blocks are not finite, and LAPACK's pivots for such are not valid.
            root, info = torch.linalg.cholesky_ex(self.blocks)
            half = torch.linalg.solve_triangular(root, self.owned.reshape(size, k, m, -1), upper=False)
            alone = half.square().sum((2, 3), dtype=torch.float64)
            alone = alone.masked_fill(info != 0, 0)  # it goes next, and fails there
        if not self.whole:
            alone = alone.new_zeros(size, self.n).scatter_(1, self.components, alone)
        return by_group(alone, self.groups)

    def remove(self, chosen: Tensor, labels: int) -> None:
        """Remove ``chosen`` int64 ``(groups, c)`` jointly: one block step of a Gaussian elimination of H.

        With ``labels`` of the partition, those of each stand in turn.
        """
        rows, first = self._rows(chosen, labels), self.ends[-1]
        self.ends.append(first + rows.shape[1] * self.m)
        if rows.shape[1] == 0:
            return
        index = rows if self.m == 1 else self.columns[rows].flatten(1)
        width, step = self.both.shape[1], index[:, None]
        cross = self.flat[index + self.base]
        if self.late and first:
            taken = self.taken[:, :first, :width]
            own = taken.gather(2, step.expand(-1, first, -1))
            cross[:, :, :width].baddbmm_(own.mT, taken, alpha=-1)
        root, info = torch.linalg.cholesky_ex(cross.gather(2, step.expand(-1, index.shape[1], -1)))
        self.infos.append(info)
        new = torch.linalg.solve_triangular(root, cross, upper=False, out=self.taken[:, first : self.ends[-1]])
        inverse = new[:, :, :width].mT
        if self.late:
            self.weight.baddbmm_(inverse, new[:, :, width:], alpha=-1)
            self._subtract(new)
        else:
            self.both.baddbmm_(inverse, new, alpha=-1)
        self.gone += rows.shape[1]

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
        k, m, (size, width) = self.components.shape[1], self.m, self.both.shape[:2]
        if not self.late or self.gone * m <= STALE * width:
            return
        stale = gone.view(-1)[self.place]
        left = stale.to(torch.uint8).argsort(dim=1, stable=True)[:, : k - self.gone]
        rest = torch.arange(k * m, self.both.shape[2], device=left.device).expand(size, -1)
        across, last = torch.cat([self.columns[left].flatten(1), rest], 1), self.ends[-1]
        rows = across[:, : width - self.gone * m]
        self.both = columns_at(rows_at(self.both, rows), across)
        before, self.taken = self.taken, self.taken.new_empty(*self.taken.shape[:2], across.shape[1])
        torch.gather(before[:, :last], 2, across[:, None].expand(-1, last, -1), out=self.taken[:, :last])
        self.positions = self.positions.gather(1, rows)
        self.components, self.place = self.components.gather(1, left), self.place.gather(1, left)
        self.gone, self.whole = 0, False
        self._index()

    def lost(self) -> Tensor:
        """What all that is removed costs ahead of any norm, after each step, float64 ``(groups, steps + 1)``."""
        pieces = self.taken[:, : self.ends[-1], self.both.shape[1] :]
        if self.scale is not None:
            pieces = pieces / self.scale[:, None]
        costs = pieces.square().sum(2, dtype=torch.float64).cumsum(1)
        return by_group(torch.nn.functional.pad(costs, (1, 0))[:, self.ends], self.groups)

    def weights(self, gone: Tensor) -> Tensor:
        """Every slot's weights as they are now, float32 ``(B, o, d)``, zero in the removed columns."""
        width, k = self.both.shape[1], self.components.shape[1]
        weight = self.weight.mT
        if self.scale is not None:
            weight = weight / self.scale[:, :, None]
        stale = torch.nn.functional.pad(gone.view(-1)[self.place].repeat_interleave(self.m, 1), (0, width - k * self.m))
        weight = weight.float().masked_fill(stale[:, None], 0)
        whole = weight.new_zeros(*weight.shape[:2], self.slots[0].part.second.shape[-1])
        return whole.scatter_(2, self.positions[:, None].expand_as(weight), weight)

    def solved(self) -> Tensor:
        """For which groups every factorisation succeeded, bool ``(groups,)``."""
        failures = torch.stack([torch.zeros_like(self.owner), *self.infos]).sum(0)
        return by_group(failures, self.groups) == 0
