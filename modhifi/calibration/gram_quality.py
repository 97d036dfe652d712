"""How well a Gram is determined: its rows, its width, its effective rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

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
    return tuple(
        GramQuality(
            name, m.n, m.mean.shape[-1], _rank(m), () if m.seen is None else tuple(m.few.nonzero()[:, 0].tolist())
        )
        for name, m in moments.items()
    )


def _rank(moments: Moments) -> float:
    """The participation ratio of a reader's inputs, the lowest over its groups."""
    if not isinstance(moments, Spanned):
        return _least_participation(moments)
    rows = moments.centred
    # rows and columns of the standardised matrix have the same products' norm
    rows = rows / rows.square().sum(2, keepdim=True).sqrt().clamp_min(1e-300)
    live = (rows.square().sum(2) > 0).sum(1)
    squares = (rows.mT @ rows).square().sum((1, 2))
    return float((live**2 / squares.clamp_min(1e-300)).min())


def _least_participation(moments: Moments) -> float:
    cov = moments.cov if moments.seen is None else moments.cov[~moments.few]
    if not len(cov):
        return float(cov.shape[-1])
    scale = cov.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    scale = torch.where(scale > 1e-12 * scale.amax(1, keepdim=True), 1 / scale, 0.0)
    live = scale.count_nonzero(1)
    squares = torch.linalg.vector_norm(cov * scale[:, :, None] * scale[:, None], dim=(1, 2)).square()
    return float(torch.where(live > 0, live**2 / squares, 0.0).min())


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
