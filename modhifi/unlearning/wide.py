"""Writers with more input columns than a Gram can have: their samples stand for the space they span."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi.calibration.moments import Moments
from modhifi.calibration.prefix_cache import Passes
from modhifi.pruning.linalg import factorise
from modhifi.unlearning.moments import ClassMeans, Joint, joint_rows
from modhifi.unlearning.sites import MOST_COLUMNS, Writer

# Added to the samples' products, in units of their mean diagonal: single precision makes them this inexact.
INEXACT = 1e-6


@dataclass(frozen=True)
class Spanned:
    """``joint`` moments of the rows ``[c, s]``: ``s`` the stream, and ``c`` the coordinates ``(n,)`` of a writer's
    input in an orthonormal basis of what ``n`` inputs span.

    Ridge regression on ``c`` and on the input itself give the same map, for that lies in the span.
    """

    joint: Joint
    inputs: Tensor
    factor: Tensor

    def lift(self, change: Tensor) -> Tensor:
        """What a map of the coordinates ``(out, n)`` is as a map of the input, float64 ``(out, d)``."""
        on_samples: Tensor = torch.linalg.solve_triangular(self.factor, change.double(), upper=False, left=False)
        return (on_samples.to(self.inputs) @ self.inputs).double()


def spanned(inputs: Tensor, streams: Tensor, groups: Tensor, classes: Tensor) -> Spanned:
    """See :class:`Spanned`: ``inputs`` ``(n, d)``, ``streams`` ``(n, out)``, ``groups`` and ``classes`` int64 ``(n,)``.

    Raises ModhifiError where the products of the inputs cannot be factorised.
    """
    factor, _ = factorise((inputs @ inputs.T).double(), INEXACT)
    rows = torch.cat([factor, streams.double()], 1)
    means = ClassMeans(groups, classes)
    means.add(0, rows.T[:, :, None])
    moments = [_moments(rows[groups == j]) for j in range(int(groups.max()) + 1)]
    return Spanned(Joint(moments, *means.finish()), inputs, factor)


def spanned_moments(runs: Passes, groups: Tensor, classes: Tensor, writer: Writer, focus: Tensor | None) -> Spanned:
    """One pass over samples of populations ``groups`` (-1: not used) and ``classes``; see :func:`spanned`.

    Looks at so many of the positions, or of the samples, that their products are no larger than a Gram may be.
    """
    most, total = MOST_COLUMNS - writer.rows.shape[1], int((groups >= 0).sum())
    taken = torch.zeros(len(groups), dtype=torch.bool)
    for j in range(int(groups.max()) + 1):
        taken[torch.nonzero(groups == j).flatten()[:: math.ceil(total / most)]] = True
    parts: list[tuple[Tensor, ...]] = []

    def choose(first: int, count: int, positions: int) -> Tensor:
        return torch.arange(0, positions, math.ceil(positions / max(1, most // total))).expand(count, -1)

    def take(first: int, x: Tensor, s: Tensor) -> None:
        here = slice(first, first + x.shape[1])
        used = taken[here]
        numbers = [part[here][used].repeat_interleave(x.shape[2]) for part in (groups, classes)]
        parts.append((x[:, used].flatten(1).T.cpu(), s[:, used].flatten(1).T.cpu(), *numbers))

    joint_rows(runs, writer, focus, choose, take)
    return spanned(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _moments(rows: Tensor) -> Moments:
    return Moments(len(rows), rows.mean(0)[None], torch.cov(rows.T, correction=0)[None])
