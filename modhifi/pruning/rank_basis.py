"""The basis in which the values of an attention lose ranks: dropping the last k loses least of what a head puts out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from modhifi.calibration.low_rank import LowRank, Second
from modhifi.calibration.moments import Moments, Spanned
from modhifi.errors import IndefiniteError
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.linalg import mean_diagonal
from modhifi.pruning.readers import applied_second
from modhifi.structure.groups import Structure
from modhifi.structure.operators import weight_matrix
from modhifi.structure.ranks import Ends, clone_to_turn, ends_of, turn, turned


def leading_basis(weight: Tensor, second: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """The basis R of each head's values in which the first r are the best r, and its inverse, float64 ``(H, n, n)``.

    With ``second`` ``(H, n, n)`` that of a head's values y and ``weight`` ``(H, o, n)`` what reads them, no matrix P of
    rank r leaves less of ``E‖W (y − P y)‖²`` than keeping the first r of R y does: the sum of the squares of the last
    n − r singular values of ``W L``, where ``second + λI = L Lᵀ`` (Eckart, Young 1936; damping λ is ``ridge`` times the
    mean diagonal). R is ``Uᵀ L⁻¹`` for the right singular vectors U of ``W L``, so that R y has the identity for a
    second moment. Raises :class:`IndefiniteError` for a matrix that has no factor.
    """
    damped = second.clone()
    unit = mean_diagonal(second)[:, None]
    damped.diagonal(dim1=1, dim2=2).add_(ridge * torch.where(unit == 0, 1.0, unit))
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        raise IndefiniteError
    read = weight @ factor
    vectors = torch.linalg.eigh(read.mT @ read).eigenvectors.flip(2)
    turns = torch.linalg.solve_triangular(factor.mT, vectors, upper=True).mT
    return turns, factor @ vectors


def in_leading_basis(
    loaded: LoadedModel, structure: Structure, moments: Mapping[str, Moments], ridge: float
) -> tuple[LoadedModel, Mapping[str, Moments]]:
    """The same function with the values of every prunable group of ranks in their leading basis, and its moments.

    Query heads that share a key-value head share its basis: their weights are stacked, and their second moments added.
    Raises :class:`IndefiniteError` with the groups for which there is none.
    """
    groups = [group for group in structure.prunable if group.kind == "ranks"]
    if not groups:
        return loaded, moments
    model, moments = clone_to_turn(loaded.model, groups), dict(moments)
    for group in groups:
        ends, name = ends_of(model, group), group.readers[0].module
        assert ends is not None
        second = applied_second(moments[name], structure.operators[name].sink)
        try:
            turns, back = leading_basis(*by_head(ends, second[0]), ridge)
        except IndefiniteError:
            raise IndefiniteError((group.name,)) from None
        turn(ends, turns, back)
        moments[name] = _turned(moments[name], ends, turns)
    return replace(loaded, model=model), moments


def by_head(ends: Ends, second: Second) -> tuple[Tensor, Tensor]:
    """What reads the values of each key-value head, ``(H, Q o, n)``, and their second moment, ``(H, n, n)``."""
    weight, columns = weight_matrix(ends.reader)[0], ends.columns
    columns = columns.to(weight.device)
    blocks = second.blocks(columns) if isinstance(second, LowRank) else second[columns[:, :, None], columns[:, None]]
    weight = weight[:, columns].movedim(0, 1)
    return weight.unflatten(0, (len(ends.rows), -1)).flatten(1, 2), blocks.unflatten(0, (len(ends.rows), -1)).sum(1)


def _turned(moments: Moments, ends: Ends, turns: Tensor) -> Moments:
    """The moments of what the reader takes once it takes it in another basis."""
    turns = turns.repeat_interleave(ends.queries, 0)
    if isinstance(moments, Spanned):
        return Spanned(turned(moments.rows.double(), 1, ends.columns, turns))
    cov = turned(turned(moments.cov, 1, ends.columns, turns), 2, ends.columns, turns)
    return replace(moments, mean=turned(moments.mean, 1, ends.columns, turns), cov=cov)
