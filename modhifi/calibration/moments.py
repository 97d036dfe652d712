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
