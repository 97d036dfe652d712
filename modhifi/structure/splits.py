"""Operations that take channels from places which they name: what becomes of the pieces once channels go.

A piece that holds as many channels of every component needs nothing: the queries among an attention's packed heads. Of
any other either the model keeps the sizes, which a cut then sets anew, or the code takes equal parts, or it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A module and the attribute, or the entry of a list (``sizes.0``), that says how long a piece is.
Count = tuple[str, str]


@dataclass(frozen=True)
class Split:
    """Channels ``ids`` int64 ``(n,)`` and the ``pieces`` of them, each int64 places in ``ids``, in order.

    ``counts`` says what counts each piece, None for nothing that is known. ``complete``: the operation itself hands out
    every piece. ``reason`` says why the channels must stay, where they must.
    """

    ids: Tensor
    pieces: tuple[Tensor, ...]
    counts: tuple[Count | None, ...]
    complete: bool
    reason: str

    @property
    def equal(self) -> bool:
        """Whether all pieces have one size."""
        return len({len(piece) for piece in self.pieces}) == 1

    @property
    def apart(self) -> bool:
        """Whether the pieces can lose different numbers of channels: each, but for one at most, has its own count."""
        known = [count for count in self.counts if count is not None]
        return bool(known) and len(known) >= len(self.counts) - 1 and len(set(known)) == len(known)

    def shares_alike(self, label: np.ndarray) -> bool:
        """Whether every piece holds as many channels of every component, by the components' ``label``."""
        _, component = np.unique(self.labels(label), return_inverse=True)
        table = _table(component, self.pieces)
        return bool((table == table[:1]).all())

    def labels(self, label: np.ndarray) -> np.ndarray:
        """The component's label of every channel, -1 for a channel that belongs to none."""
        ids = self.ids.numpy()
        return np.where(ids >= 0, label[ids], -1)


@dataclass(frozen=True)
class Fate:
    """What becomes of a split: channels to ``unite``, to keep in equal ``parts``, or to ``freeze``.

    ``apart`` are pieces that are groups of their own.
    """

    unite: tuple[tuple[Tensor, Tensor], ...] = ()
    parts: Tensor | None = None
    apart: tuple[tuple[Tensor, Count | None], ...] = ()
    freeze: bool = False


def fate_of(split: Split, label: np.ndarray, families: Callable[[], np.ndarray]) -> Fate:
    """What becomes of a split, given the components' ``label`` and the number of the group that each is in.

    Pieces of one size and one fate lose as many channels each; where their fates differ, channel i of each goes with
    channel i of the others. Pieces of other sizes that nothing counts may go where no group lies in two of them: the
    sizes may be read from what is joined there, which a trial shows.
    """
    if split.shares_alike(label):
        return Fate()
    pieces = [split.ids[piece] for piece in split.pieces]
    if bool((split.ids < 0).any()):
        return Fate(freeze=True)
    if split.apart:
        return Fate(apart=tuple(zip(pieces, split.counts, strict=True)))
    if not split.complete:
        return Fate(freeze=True)
    table = _table(families()[split.labels(label)], split.pieces)
    if split.equal:
        if split.counts[0] is None and bool((table == table[:, :1]).all()):
            return Fate(parts=torch.cat(pieces))
        counted = ((pieces[0], split.counts[0]),) if split.counts[0] is not None else ()
        return Fate(unite=tuple((pieces[0], piece) for piece in pieces[1:]), apart=counted)
    return Fate(freeze=bool(((table > 0).sum(1) > 1).any()))


def _table(kinds: np.ndarray, pieces: tuple[Tensor, ...]) -> np.ndarray:
    """How many channels of each kind, numbers from 0 on, lie in each piece: int64 ``(kinds, pieces)``."""
    most = int(kinds.max()) + 1
    return np.stack([np.bincount(kinds[piece.numpy()], minlength=most) for piece in pieces], axis=1)
