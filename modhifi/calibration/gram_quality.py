"""How well a Gram is determined: its rows, its width, its effective rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi.calibration.moments import Moments, Spanned


@dataclass(frozen=True)
class GramQuality:
    """The ``rows`` that went into a reader's Gram, its ``width`` in columns, and the effective ``rank`` of its inputs.

    The rank is the participation ratio ``(tr C)² / ‖C‖²`` of the correlations C of those columns that vary: their
    number for independent ones, 1 where all move together. Correlations, as a few channels of a language model can be
    so large that they alone would decide. ``few`` are the experts that saw too few rows (`Moments.few`).
    """

    reader: str
    rows: int
    width: int
    rank: float
    few: tuple[int, ...] = ()


def gram_quality(moments: Mapping[str, Moments]) -> tuple[GramQuality, ...]:
    """The quality of every reader's Gram; of a grouped conv's, the lowest."""
    if not moments:
        return ()
    ranks = [_rank(m) for m in moments.values()]
    values: list[float] = torch.stack([rank.to(ranks[0].device) for rank in ranks]).tolist()
    few = [() if m.seen is None else tuple(m.few.nonzero()[:, 0].tolist()) for m in moments.values()]
    return tuple(
        GramQuality(name, m.n, m.mean.shape[-1], rank, own)
        for (name, m), rank, own in zip(moments.items(), values, few, strict=True)
    )


def _rank(moments: Moments) -> Tensor:
    """The participation ratio of a reader's inputs, the lowest over its groups, float64 ``()``."""
    if isinstance(moments, Spanned):
        rows = moments.centred
        variances = rows.square().sum(2)
        scale = _inverse_roots(variances)
        rows = rows * scale[:, :, None]
        # rows and columns of the standardised matrix have the same products' norm
        squares = torch.bmm(rows.mT, rows).square().sum((1, 2))
    else:
        cov = moments.cov if moments.seen is None else moments.cov[~moments.few]
        if not len(cov):
            return cov.new_tensor(cov.shape[-1])
        scale = _inverse_roots(cov.diagonal(dim1=1, dim2=2))
        squares = torch.linalg.vector_norm(cov * scale[:, :, None] * scale[:, None], dim=(1, 2)).square()
    return (scale.count_nonzero(1).square() / squares.clamp_min(1e-300)).min()


def _inverse_roots(variances: Tensor) -> Tensor:
    """``1 / √v`` of variances ``(G, d)``, 0 where one is nothing but rounding beside the largest of its group."""
    return torch.where(variances > 1e-24 * variances.amax(1, keepdim=True), variances.rsqrt(), 0.0)


def gram_warnings(grams: tuple[GramQuality, ...], samples: int) -> list[str]:
    """A sentence where Grams have fewer rows than columns, and one where the inputs of readers do not vary.

    ``samples`` is how many were looked at; the first sentence says how many would do.
    """
    warnings = []
    short = [q for q in grams if q.rows < q.width]
    if short:
        worst = max(short, key=lambda q: q.width / q.rows)
        enough = math.ceil(samples * worst.width / worst.rows)
        warnings.append(
            f"{len(short)} of {len(grams)} layers saw fewer rows than they have columns, so their new weights are "
            f"damped (worst: {worst.reader}, {worst.rows} rows for {worst.width} columns); none would with "
            f"--samples {enough}"
        )
    still = [q.reader for q in grams if q.rank < 1.5 and q.width > 8]
    if still:
        warnings.append(
            f"the inputs of {len(still)} of {len(grams)} layers vary along one direction only (first: {still[0]}); "
            "use more varied calibration data"
        )
    for reader, few in ((q.reader, q.few) for q in grams if q.few):
        warnings.append(
            f"{len(few)} experts of {reader} saw too few tokens for a Gram ({', '.join(map(str, few))}): their neurons "
            "went by the norm of their weights, without compensation; use more calibration data"
        )
    return warnings
