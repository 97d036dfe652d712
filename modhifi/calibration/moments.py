"""Streaming moments of what each reader reads: its mean and its covariance, from forward passes alone."""

from __future__ import annotations

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


class Accumulator:
    """Sums ``x - shift`` and its products over all rows x; ``shift`` is the first rows' mean.

    Products are float32 and sums float64: a mean that is large beside the deviations costs no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self.shift: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add r new rows, which are the columns of ``rows`` ``(G, d, r)``."""
        wide = torch.float64 if rows.device.type != "mps" else torch.float32
        if self.shift is None:
            self.shift = rows.mean(2)
            width = rows.shape[1]
            self.first = torch.zeros(rows.shape[:2], dtype=wide, device=rows.device)
            self.second = torch.zeros((rows.shape[0], width, width), dtype=wide, device=rows.device)
        rows = rows - self.shift[:, :, None]
        self.n += rows.shape[2]
        self.first += rows.sum(2, dtype=wide)
        turned = rows.transpose(1, 2)
        # only the upper triangle, strip by strip: the product is symmetric
        for strip in self._strips():
            self.second[:, strip, strip.start :] += rows[:, strip] @ turned[:, :, strip.start :]

    def _strips(self) -> list[slice]:
        width = self.first.shape[1]
        strip = max(512, width // 8)
        return [slice(start, min(start + strip, width)) for start in range(0, width, strip)]

    def finish(self) -> Moments:
        """The moments of everything added. Spends the sums, which become the result in place: Grams are large."""
        assert self.shift is not None
        first, second = self.first.double() / self.n, self.second.double()
        del self.second
        second.baddbmm_(first[:, :, None], first[:, None, :], beta=1 / self.n, alpha=-1)
        for strip in self._strips():
            second[:, strip.stop :, strip] = second[:, strip, strip.stop :].transpose(1, 2)
        return Moments(self.n, first + self.shift.double(), second)
