"""What selection and compensation need of one reader, as tensors: its weight matrix, its S, its components' columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from modhifi.calibration.low_rank import LowRank, Second
from modhifi.calibration.moments import Moments, Spanned
from modhifi.pruning.fidelity import singleton_fidelity
from modhifi.pruning.linalg import mean_diagonal, shrinkage, shrunk
from modhifi.structure.groups import Group, Structure
from modhifi.structure.operators import norm_scale, reader_columns, weight_matrix
from modhifi.structure.places import operator_at

# The least power of an expert's inputs, as a share of the mean over all experts: one that is never chosen has none.
UNSEEN = 1e-3


@dataclass(frozen=True)
class ReaderPart:
    """One convolution group of a reader, which is all of a plain convolution or linear map.

    ``group`` is its number in the reader; ``weight`` float64 ``(o, d)``; ``second`` float64 ``(d, d)``; ``components``
    int64 ``(k,)``, above none, the numbers of its components in their group; ``columns`` int64 ``(k, m)``.
    """

    group: int
    weight: Tensor
    second: Second
    components: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Reader:
    """One reader as seen by one group.

    ``weight`` float64 ``(G, o, d)``; ``second`` float64 ``(G, d, d)``: the matrix S that applies (covariance where a
    bias or BatchNorm takes the mean, uncentred Gram otherwise); ``owner`` int64 ``(n,)``, the conv group of each
    component; ``columns`` int64 ``(n, m)`` inside it. ``scale`` float64 ``(G, o)``, above 0, is what a BatchNorm behind
    multiplies each output channel by, for an order of removal that counts errors as they leave it; None for 1.
    """

    weight: Tensor
    second: Second
    owner: Tensor
    columns: Tensor
    scale: Tensor | None = None

    @cached_property
    def product(self) -> Tensor:
        """``W S``, float64 ``(G, o, d)``: what energies and fidelities are made of."""
        return torch.bmm(self.weight, self.second) if isinstance(self.second, Tensor) else self.weight @ self.second

    @property
    def scales(self) -> Tensor:
        """``scale`` with ones in place of None."""
        return torch.ones_like(self.weight[:, :, 0]) if self.scale is None else self.scale

    @cached_property
    def parts(self) -> list[ReaderPart]:
        """The convolution groups that have a component, in order."""
        members = ((g, torch.nonzero(self.owner == g).flatten()) for g in range(len(self.weight)))
        return [
            ReaderPart(g, self.weight[g], self.second[g], components, self.columns[components])
            for g, components in members
            if len(components)
        ]


def second_of(moments: Moments, sink: str | None) -> Second:
    """The covariance where a sink takes the mean, else the Gram, ``(G, d, d)``; of few rows as what they span."""
    if isinstance(moments, Spanned):
        rows = moments.rows.double() if sink is None else moments.centred
        return LowRank(rows / moments.n**0.5, rows.new_zeros(len(rows)))
    return moments.cov if sink is not None else moments.gram


def applied_second(moments: Moments, sink: str | None) -> Second:
    """The matrix S to solve with, float64 ``(G, d, d)``: covariance where a sink takes the mean, else the Gram.

    A Gram of fewer rows than columns knows nothing of most directions, and removing them would look free. So S is
    shrunk towards a multiple of the identity by the share that Oracle Approximating Shrinkage (Chen, Wiesel, Eldar,
    Hero, IEEE Transactions on Signal Processing 2010) derives from the number of rows; it vanishes as rows grow. An
    expert that saw too few gets the identity: its neurons go by the norm of their weights.
    """
    second = second_of(moments, sink)
    share, scale = shrinkage(second, moments.counts), mean_diagonal(second)
    if moments.seen is not None and bool(moments.few.any()):
        share = torch.where(moments.few, 1.0, share)
        scale = torch.where(moments.few, scale.clamp_min(UNSEEN * float(scale.mean())), scale)
    return shrunk(second, share, scale)


def reader_of(
    model: nn.Module,
    structure: Structure,
    group: Group,
    module: str,
    moments: Moments | None,
    behind_norms: bool = False,
) -> Reader:
    """Assemble the :class:`Reader` of one group at one of its reader modules; without moments its S is empty.

    It has a scale with ``behind_norms``, where a BatchNorm stands behind it.
    """
    layer = operator_at(model, module)
    piece = next(s for s in group.readers if s.module == module)
    owner, columns = reader_columns(layer, piece.index)
    weight, sink = weight_matrix(layer), structure.operators[module].sink
    scale = (
        None
        if not behind_norms or sink in (None, "bias")
        else norm_scale(model.get_submodule(str(sink))).view(weight.shape[:2])
    )
    second: Second = weight.new_zeros(len(weight), 0, 0) if moments is None else applied_second(moments, sink)
    return Reader(weight, second, owner, columns, scale)


def readers_of(
    model: nn.Module,
    structure: Structure,
    group: Group,
    moments: Mapping[str, Moments] | None,
    behind_norms: bool = False,
) -> list[Reader]:
    """All readers of a group, in order."""
    modules = [s.module for s in group.readers]
    own = [None if moments is None else moments[m] for m in modules]
    return [reader_of(model, structure, group, m, o, behind_norms) for m, o in zip(modules, own, strict=True)]


def best_singletons(readers: Sequence[Reader], n: int) -> Tensor:
    """The largest singleton fidelity of each of a group's n components over its readers' channels, float64 ``(n,)``."""
    best = torch.zeros(n, dtype=torch.float64)
    for reader in readers:
        for part in reader.parts:
            product = reader.product[part.group]
            singletons = singleton_fidelity(part.weight, part.second, part.columns, product)
            best[part.components] = torch.maximum(best[part.components], singletons.amax(0).cpu())
    return best
