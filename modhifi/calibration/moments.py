"""Streaming moments of what each reader reads: its mean and its covariance, from forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moment of a reader's input rows (tokens, or im2col patches), per conv group.

    ``n`` rows; ``mean`` float64 ``(G, d)``; ``cov`` float64 ``(G, d, d)``, the covariance around that mean. Columns are
    in im2col order: channel, then kernel position. Padding counts as the zeros it is.
    """

    n: int
    mean: Tensor
    cov: Tensor

    @property
    def gram(self) -> Tensor:
        """The uncentred second moment ``E[x xᵀ]``, float64 ``(G, d, d)``."""
        return self.cov + self.mean[:, :, None] * self.mean[:, None, :]

    def to(self, device: torch.device) -> Moments:
        """The same moments on another device."""
        return Moments(self.n, self.mean.to(device), self.cov.to(device))


def combined(parts: Sequence[tuple[float, Mapping[str, Moments]]]) -> dict[str, Moments]:
    """Moments of a mixture from those of its sources, each behind its share of the total mass, reader by reader.

    They are those of all rows together where a row of a source weighs its share over the source's rows. ``n`` is Kish's
    effective number of rows, ``1 / Σ share² / n`` (Kish, Survey Sampling, 1965), which is what an estimate from rows of
    unequal weight is worth. A reader that does not run on some source is left to the others.
    """
    if len(parts) == 1:
        return dict(parts[0][1])
    names = dict.fromkeys(name for _, moments in parts for name in moments)
    return {name: _combined([(share, m[name]) for share, m in parts if name in m]) for name in names}


def _combined(parts: Sequence[tuple[float, Moments]]) -> Moments:
    total = sum(share for share, _ in parts)
    weighed = [(share / total, moments) for share, moments in parts]
    rows = 1 / sum(weight**2 / moments.n for weight, moments in weighed)
    mean = torch.stack([weight * moments.mean for weight, moments in weighed]).sum(0)
    cov = torch.zeros_like(weighed[0][1].cov)
    for weight, moments in weighed:
        gap = moments.mean - mean
        cov.add_(moments.cov, alpha=weight).baddbmm_(gap[:, :, None], gap[:, None, :], alpha=weight)
    return Moments(round(rows), mean, cov)


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
