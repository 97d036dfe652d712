"""Streaming moments of what each reader reads: its mean and its covariance, from forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modhifi.calibration.low_rank import LowRank, Second, add_outer, as_tensor, mixed


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
    def held(self) -> Tensor:
        """What the second moment is made of: a matrix of each group, or rows."""
        return self.cov

    @property
    def counts(self) -> int | Tensor:
        """The rows that went in, of each group where they differ."""
        return self.n if self.seen is None else self.seen

    @property
    def few(self) -> Tensor:
        """Which groups saw too few rows for a Gram, bool ``(G,)``: fewer than a share ``FEW`` of their columns."""
        if self.seen is None:
            return torch.zeros(len(self.mean), dtype=torch.bool, device=self.mean.device)
        return self.seen < FEW * self.mean.shape[-1]

    @property
    def gram(self) -> Tensor:
        """The uncentred second moment ``E[x xᵀ]``, float64 ``(G, d, d)``."""
        return torch.baddbmm(self.cov, self.mean[:, :, None], self.mean[:, None])

    def to(self, device: torch.device) -> Moments:
        """The same moments on another device."""
        seen = None if self.seen is None else self.seen.to(device)
        return Moments(self.n, self.mean.to(device), self.cov.to(device), seen)


# An expert that sees fewer rows than this share of its columns is judged by its weights alone.
FEW = 1 / 4


class Spanned(Moments):
    """Moments of fewer rows than columns, held as those ``rows`` float32 ``(G, d, n)``.

    Grams, ``cov`` and ``gram``, are only made where they are asked for.
    """

    def __init__(self, rows: Tensor) -> None:
        object.__setattr__(self, "n", rows.shape[2])
        object.__setattr__(self, "mean", rows.double().mean(2))
        object.__setattr__(self, "rows", rows.float())

    rows: Tensor

    @property
    def held(self) -> Tensor:
        return self.rows

    @property
    def centred(self) -> Tensor:
        """The rows around their mean, float64."""
        return self.rows.double() - self.mean[:, :, None]

    @property
    def cov(self) -> Tensor:
        rows = self.centred
        return rows @ rows.mT / self.n

    def to(self, device: torch.device) -> Moments:
        return Spanned(self.rows.to(device))


@dataclass(frozen=True)
class PairedMoments:
    """Moments of input rows x and of target rows y that belong to them, per conv group.

    ``n`` rows; ``mean`` float64 ``(G, k)`` and ``cov`` float64 ``(G, k, k)`` of x; ``target`` float64 ``(G, o)`` the
    mean of y, ``energy`` float64 ``(G, o)`` its variances, ``cross`` float64 ``(G, o, k)`` the covariance of y and x.
    """

    n: int
    mean: Tensor
    cov: Second
    target: Tensor
    energy: Tensor
    cross: Tensor

    @classmethod
    def of_rows(cls, rows: Tensor, targets: Tensor) -> PairedMoments:
        """The moments of rows ``(G, k, n)`` and targets ``(G, o, n)``, with the covariance in the span of the rows."""
        n = rows.shape[2]
        mean, middle = rows.mean(2), targets.mean(2)
        x, y = rows - mean[:, :, None], targets - middle[:, :, None]
        cov = LowRank(x / n**0.5, rows.new_zeros(len(rows)))
        return cls(n, mean, cov, middle, y.square().mean(2), y @ x.mT / n)

    @property
    def uncentred(self) -> PairedMoments:
        """The same with second moments in place of the (co)variances."""
        return replace(
            self,
            cov=add_outer(self.cov, self.mean),
            energy=self.energy + self.target.square(),
            cross=self.cross + self.target[:, :, None] * self.mean[:, None],
        )

    def to(self, device: torch.device) -> PairedMoments:
        """The same moments on another device."""
        mean, target, energy, cross = (t.to(device) for t in (self.mean, self.target, self.energy, self.cross))
        return PairedMoments(self.n, mean, self.cov.to(device), target, energy, cross)


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
    weights, n = _weighed([(share, moments.n) for share, moments in parts])
    mean, cov = _mixed(weights, [(moments.mean, moments.cov) for _, moments in parts])
    seen = [moments.seen for _, moments in parts]
    known = [counts for counts in seen if counts is not None]
    return Moments(n, mean, as_tensor(cov), torch.stack(known).sum(0) if known else None)


def combined_pairs(parts: Sequence[tuple[float, PairedMoments]]) -> PairedMoments:
    """What :func:`combined` is for one reader's inputs, for inputs with their targets."""
    if len(parts) == 1:
        return parts[0][1]
    weights, n = _weighed([(share, moments.n) for share, moments in parts])
    mean, cov = _mixed(weights, [(moments.mean, moments.cov) for _, moments in parts])
    weighed = [(weight, moments) for weight, (_, moments) in zip(weights, parts, strict=True)]
    target = torch.stack([weight * moments.target for weight, moments in weighed]).sum(0)
    energy, cross = torch.zeros_like(target), torch.zeros_like(parts[0][1].cross)
    for weight, moments in weighed:
        gap = moments.target - target
        energy += weight * (moments.energy + gap.square())
        cross += weight * (moments.cross + gap[:, :, None] * (moments.mean - mean)[:, None])
    return PairedMoments(n, mean, cov, target, energy, cross)


def _weighed(parts: Sequence[tuple[float, int]]) -> tuple[list[float], int]:
    """The shares, which add up to 1, and Kish's effective number of rows."""
    total = sum(share for share, _ in parts)
    weights = [share / total for share, _ in parts]
    return weights, round(1 / sum(weight**2 / n for weight, (_, n) in zip(weights, parts, strict=True)))


def _mixed(weights: Sequence[float], parts: Sequence[tuple[Tensor, Second]]) -> tuple[Tensor, Second]:
    """Mean and covariance of a mixture, from those of its parts."""
    mean = torch.stack([weight * own for weight, (own, _) in zip(weights, parts, strict=True)]).sum(0)
    return mean, mixed(
        [(weight, add_outer(cov, own - mean)) for weight, (own, cov) in zip(weights, parts, strict=True)]
    )


# A product of two numbers of these types is exact in single precision, in which it is added up.
EXACT_IN_SINGLE = (torch.bfloat16, torch.float16)
# Rows are held until they have so many elements, and are at least so many, before their products are summed: adding to
# a wide Gram costs more than the product of few rows.
HELD_ELEMENTS, HELD_ROWS = 2**20, 1024
# Of a Gram of so many bytes, rows are held as long as they are at most half as many as its columns.
LARGE = 2**27


class Accumulator:
    """Sums ``x - shift`` and its products over all rows x; ``shift`` is the mean of the first rows that are summed.

    Products of float32 rows are float32 and sums over them float64: a mean that is large beside the deviations costs
    no digits. Rows of half precision have digits for no such mean; their products are made without a shift.
    Of the last ``targets`` columns only the squares, and the products with those before, are summed.
    """

    def __init__(self, targets: int = 0) -> None:
        self.n, self.targets = 0, targets
        self.shift: Tensor | None = None
        self.held: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add r new rows, which are the columns of ``rows`` ``(G, d, r)`` and may not change afterwards."""
        self.n += rows.shape[2]
        held = rows.shape[2] + sum(piece.shape[2] for piece in self.held)
        groups, width = rows.shape[:2]
        most = max(HELD_ROWS, HELD_ELEMENTS // (groups * width)) - 1
        if self.shift is None and few_rows_pay(groups, width):
            most = width // 2
        self.held.append(rows)
        if held > most:
            self._sum()

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
        inputs = width - self.targets
        if self.shift is None:
            self.shift = rows.new_zeros((groups, width), dtype=torch.float32) if exact else rows.mean(2)
            self.first = torch.zeros((groups, width), dtype=wide, device=rows.device)
            self.second = torch.zeros((groups, inputs, width), dtype=wide, device=rows.device)
            self.squares = torch.zeros((groups, self.targets), dtype=wide, device=rows.device)
        if not exact:
            rows = rows - self.shift[:, :, None]
        self.first += rows.sum(2, dtype=wide)
        if self.targets:
            self.squares += rows[:, inputs:].float().square().sum(2, dtype=wide)
        turned = rows.transpose(1, 2)
        # only the upper triangle, strip by strip: the product is symmetric
        for strip in _strips(inputs):
            self.second[:, strip, strip.start :].add_(_product(rows[:, strip], turned[:, :, strip.start :]))

    def finish(self) -> Moments:
        """The moments of everything added. Spends the sums, which become the result in place: Grams are large."""
        if self.shift is None and few_rows_pay(*self.held[0].shape[:2]):
            return Spanned(torch.cat(self.held, 2))
        mean, second = self._finished()
        return Moments(self.n, mean, second)

    def finish_paired(self) -> PairedMoments:
        """The moments of everything added, targets apart; spends the sums as :meth:`finish` does."""
        mean, second = self._finished()
        inputs = second.shape[1]
        energy = self.squares.double() / self.n - (self.first.double() / self.n)[:, inputs:].square()
        cov, cross = second[:, :, :inputs], second[:, :, inputs:].mT
        return PairedMoments(self.n, mean[:, :inputs], cov, mean[:, inputs:], energy, cross)

    def _finished(self) -> tuple[Tensor, Tensor]:
        """The mean of all columns ``(G, d)``, and their covariance with the inputs among them ``(G, inputs, d)``."""
        if self.held:
            self._sum()
        assert self.shift is not None
        first, second = self.first.double() / self.n, self.second.double()
        del self.second
        inputs = second.shape[1]
        second.baddbmm_(first[:, :inputs, None], first[:, None, :], beta=1 / self.n, alpha=-1)
        for strip in _strips(inputs):
            if strip.stop < inputs:
                second[:, strip.stop : inputs, strip] = second[:, strip, strip.stop : inputs].transpose(1, 2)
        return first + self.shift.double(), second


def few_rows_pay(groups: int, width: int) -> bool:
    """Whether a Gram is so large that few rows are kept in its place."""
    return groups * width**2 * 8 >= LARGE


def _strips(width: int) -> list[slice]:
    strip = max(1024, width // 4)
    return [slice(start, min(start + strip, width)) for start in range(0, width, strip)]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix products ``left right``, float32; on a GPU those of half precision are made as they are."""
    if left.dtype in EXACT_IN_SINGLE and left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
