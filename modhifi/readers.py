"""What selection and compensation need of one reader, as tensors: its weight matrix, its S, its components' columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modhifi.fidelity import singleton_fidelity
from modhifi.groups import Group, Structure, conv_groups, reader_columns
from modhifi.moments import Moments


@dataclass(frozen=True)
class Reader:
    """One reader as seen by one group.

    ``weight`` float64 ``(G, o, d)``; ``second`` float64 ``(G, d, d)``: the matrix S that applies (covariance where a
    bias or BatchNorm takes the mean, uncentred Gram otherwise); ``owner`` int64 ``(n,)``, the conv group of each
    component; ``columns`` int64 ``(n, m)`` inside it. ``scale`` float64 ``(G, o)``, above 0, is what a BatchNorm behind
    multiplies each output channel by, for an order of removal that counts errors as they leave it; None for 1.
    """

    weight: Tensor
    second: Tensor
    owner: Tensor
    columns: Tensor
    scale: Tensor | None = None

    @cached_property
    def product(self) -> Tensor:
        """``W S``, float64 ``(G, o, d)``: what energies and fidelities are made of."""
        return self.weight @ self.second

    @property
    def scales(self) -> Tensor:
        """``scale`` with ones in place of None."""
        return torch.ones_like(self.weight[:, :, 0]) if self.scale is None else self.scale

    def parts(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Per conv group: weight ``(o, d)``, S ``(d, d)``, numbers of its components, their columns."""
        result = []
        for g in range(len(self.weight)):
            mine = torch.nonzero(self.owner == g).flatten()
            result.append((self.weight[g], self.second[g], mine, self.columns[mine]))
        return result


def weight_matrix(module: nn.Module) -> Tensor:
    """An operator's weight as float64 ``(G, out / G, d)``, columns in im2col order."""
    weight: Tensor = module.get_parameter("weight").detach().double()
    if isinstance(module, Conv1D):
        return weight.T[None]
    groups = conv_groups(module)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def columns_of(module: nn.Module) -> tuple[int, int]:
    """The number of conv groups of an operator and of columns in each: the shape of its Gram, without making it."""
    weight = module.get_parameter("weight")
    return conv_groups(module), weight.shape[0] if isinstance(module, Conv1D) else weight[0].numel()


def write_weight(module: nn.Module, matrix: Tensor) -> None:
    """Inverse of :func:`weight_matrix`: store ``(G, out / G, d)`` in the module, in the module's dtype."""
    flat, weight = matrix.reshape(-1, matrix.shape[-1]), module.get_parameter("weight")
    weight.data.copy_(flat.T if isinstance(module, Conv1D) else flat.reshape(weight.shape))


def absorb_mean(model: nn.Module, reader: str, sink: str, shift: Tensor) -> None:
    """Give a reader's lost mean output, ``shift`` float64 ``(out,)``, back at its sink, in place.

    ``sink`` is ``"bias"`` (the shift is added to the reader's own) or the name of the BatchNorm behind it (the shift is
    taken from its running mean).
    """
    if sink == "bias":
        bias: Tensor = model.get_submodule(reader).bias.data  # type: ignore[assignment]
        bias.add_(shift.to(bias.dtype))
    else:
        mean: Tensor = model.get_submodule(sink).running_mean.data  # type: ignore[assignment]
        mean.sub_(shift.to(mean.dtype))


def applied_second(moments: Moments, sink: str | None) -> Tensor:
    """The matrix S to solve with, float64 ``(G, d, d)``: covariance where a sink takes the mean, else the Gram.

    A Gram of fewer rows than columns knows nothing of most directions, and removing them would look free. So S is
    shrunk towards a multiple of the identity by the share that Oracle Approximating Shrinkage (Chen, Wiesel, Eldar,
    Hero, IEEE Transactions on Signal Processing 2010) derives from the number of rows; it vanishes as rows grow.
    """
    second = moments.cov if sink is not None else moments.gram
    return shrunk(second, shrinkage(second, moments.n), mean_diagonal(second))


def mean_diagonal(second: Tensor) -> Tensor:
    """``tr S / d``, ``(G,)``."""
    return second.diagonal(dim1=1, dim2=2).mean(1)


def shrinkage(second: Tensor, rows: int) -> Tensor:
    """The share of the identity in :func:`applied_second`, float64 ``(G,)`` in [0, 1]."""
    d = second.shape[-1]
    trace = second.diagonal(dim1=1, dim2=2).sum(1)
    squares = torch.linalg.vector_norm(second, dim=(1, 2)).square()
    gap = (rows + 1 - 2 / d) * (squares - trace.square() / d)
    share = ((1 - 2 / d) * squares + trace.square()) / gap.clamp_min(1e-300)
    return torch.where(gap > 0, share, torch.ones_like(share)).clamp(0.0, 1.0)


def shrunk(second: Tensor, share: Tensor, scale: Tensor) -> Tensor:
    """``(1 − share) S + share · scale · I``; ``second`` ``(G, d, d)``, ``share`` and ``scale`` ``(G,)``."""
    result = second * (1 - share[:, None, None])
    result.diagonal(dim1=1, dim2=2).add_((share * scale)[:, None])
    return result


def reader_of(model: nn.Module, structure: Structure, group: Group, module: str, moments: Moments) -> Reader:
    """Assemble the :class:`Reader` of one group at one of its reader modules."""
    layer = model.get_submodule(module)
    piece = next(s for s in group.readers if s.module == module)
    owner, columns = reader_columns(layer, piece.index)
    weight, sink = weight_matrix(layer), structure.operators[module].sink
    scale = None if sink in (None, "bias") else norm_scale(model.get_submodule(str(sink))).view(weight.shape[:2])
    return Reader(weight, applied_second(moments, sink), owner, columns, scale)


def norm_scale(norm: nn.Module) -> Tensor:
    """``|γ| / √(σ² + ε)`` of a BatchNorm, float64 ``(channels,)``; a millionth of the largest at least."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()  # type: ignore[operator]
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double().abs()  # type: ignore[operator]
    return scale.clamp_min(max(1e-6 * float(scale.max()), 1e-300))


def readers_of(model: nn.Module, structure: Structure, group: Group, moments: Mapping[str, Moments]) -> list[Reader]:
    """All readers of a group, in order."""
    return [reader_of(model, structure, group, s.module, moments[s.module]) for s in group.readers]


def best_singletons(readers: Sequence[Reader], n: int) -> Tensor:
    """The largest singleton fidelity of each of a group's n components over its readers' channels, float64 ``(n,)``."""
    result = torch.zeros(n, dtype=torch.float64)
    for reader in readers:
        for (weight, second, mine, columns), product in zip(reader.parts(), reader.product, strict=True):
            if len(mine):
                singles = singleton_fidelity(weight, second, columns, product)
                result[mine] = torch.maximum(result[mine], singles.amax(0).cpu())
    return result
