"""Streaming moments of what each reader reads: its mean and its covariance, from forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moment of a reader's input rows (tokens, or im2col patches), per conv group.

    ``n`` rows; ``mean`` float64 ``(G, d)``; ``cov`` float64 ``(G, d, d)``, the covariance around that mean. Columns are
    in im2col order: channel, then kernel position. Padding counts as the zeros it is. Of the experts of a mixture, one
    a group, ``seen`` int64 ``(E,)`` has how many of the n tokens were routed to each; mean and covariance are those of
    all tokens, with zeros for the others.
    """

    n: int
    mean: Tensor
    cov: Tensor
    seen: Tensor | None = None

    @property
    def rows(self) -> int | Tensor:
        """The rows that went in, of each group where they differ."""
        return self.n if self.seen is None else self.seen

    @property
    def few(self) -> Tensor:
        """Which groups saw too few rows for a Gram, bool ``(G,)``: fewer than a share ``FEW`` of their columns."""
        if self.seen is None:
            return torch.zeros(len(self.cov), dtype=torch.bool, device=self.cov.device)
        return self.seen < FEW * self.cov.shape[-1]

    @property
    def gram(self) -> Tensor:
        """The uncentred second moment ``E[x xᵀ]``, float64 ``(G, d, d)``."""
        return self.cov + self.mean[:, :, None] * self.mean[:, None, :]

    def to(self, device: torch.device) -> Moments:
        """The same moments on another device."""
        seen = None if self.seen is None else self.seen.to(device)
        return Moments(self.n, self.mean.to(device), self.cov.to(device), seen)


# An expert that sees fewer rows than this share of its columns is judged by its weights alone.
FEW = 1 / 4


# A product of two numbers of these types is exact in single precision, in which it is added up.
EXACT_IN_SINGLE = (torch.bfloat16, torch.float16)
# Rows are held until they have so many elements, and are at least so many, before their products are summed: adding to
# a wide Gram costs more than the product of few rows.
HELD_ELEMENTS, HELD_ROWS = 2**20, 1024


class Accumulator:
    """Sums ``x - shift`` and its products over all rows x; ``shift`` is the mean of the first rows that are summed.

    Products of float32 rows are float32 and sums over them float64: a mean that is large beside the deviations costs
    no digits. Rows of half precision have digits for no such mean; their products are made without a shift.
    """

    def __init__(self) -> None:
        self.n = 0
        self.shift: Tensor | None = None
        self.held: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add r new rows, which are the columns of ``rows`` ``(G, d, r)``."""
        self.n += rows.shape[2]
        held = rows.shape[2] + sum(piece.shape[2] for piece in self.held)
        if held >= max(HELD_ROWS, HELD_ELEMENTS // (rows.shape[0] * rows.shape[1])):
            self.held.append(rows)
            self._sum()
        else:
            self.held.append(rows.clone())  # what they share memory with changes

    def state(self) -> dict[str, Tensor]:
        """All that the sums are, by name; with ``n`` and these, :meth:`restore` goes on to the bit."""
        sums = {} if self.shift is None else {"shift": self.shift, "first": self.first, "second": self.second}
        return sums | ({"held": torch.cat(self.held, 2)} if self.held else {})

    def restore(self, n: int, state: Mapping[str, Tensor]) -> None:
        """Become what another accumulator was with this ``state`` after ``n`` rows."""
        self.n, self.held = n, [state["held"]] if "held" in state else []
        if "shift" in state:
            self.shift, self.first, self.second = state["shift"], state["first"], state["second"]

    def _sum(self) -> None:
        """Sum the products of the rows that are held."""
        rows = self.held[0] if len(self.held) == 1 else torch.cat(self.held, 2)
        self.held.clear()
        wide = torch.float64 if rows.device.type != "mps" else torch.float32
        exact = rows.dtype in EXACT_IN_SINGLE
        groups, width = rows.shape[:2]
        if self.shift is None:
            self.shift = rows.new_zeros((groups, width), dtype=torch.float32) if exact else rows.mean(2)
            self.first = torch.zeros((groups, width), dtype=wide, device=rows.device)
            self.second = torch.zeros((groups, width, width), dtype=wide, device=rows.device)
        if not exact:
            rows = rows - self.shift[:, :, None]
        self.first += rows.sum(2, dtype=wide)
        turned = rows.transpose(1, 2)
        # only the upper triangle, strip by strip: the product is symmetric
        for strip in _strips(width):
            self.second[:, strip, strip.start :] += _product(rows[:, strip], turned[:, :, strip.start :])

    def finish(self) -> Moments:
        """The moments of everything added. Spends the sums, which become the result in place: Grams are large."""
        if self.held:
            self._sum()
        assert self.shift is not None
        first, second = self.first.double() / self.n, self.second.double()
        del self.second
        second.baddbmm_(first[:, :, None], first[:, None, :], beta=1 / self.n, alpha=-1)
        for strip in _strips(second.shape[1]):
            if strip.stop < second.shape[1]:
                second[:, strip.stop :, strip] = second[:, strip, strip.stop :].transpose(1, 2)
        return Moments(self.n, first + self.shift.double(), second)


def _strips(width: int) -> list[slice]:
    strip = max(1024, width // 4)
    return [slice(start, min(start + strip, width)) for start in range(0, width, strip)]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix products ``left right``, float32; on a GPU those of half precision are made as they are."""
    if left.dtype in EXACT_IN_SINGLE and left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
