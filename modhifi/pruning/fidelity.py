"""Subset Fidelity and what is derived from it, from one second-moment matrix per reader. Pure: tensors in, tensors out.

Conventions: ``weight`` float64 ``(out, d)``; ``second`` float64 ``(d, d)``, the covariance of the reader's input where
a bias or a BatchNorm can take the mean, the uncentred Gram where nothing can; ``blocks`` int64 ``(n, m)``, the m
columns of each of n components. Where the blocks do not cover every column (a reader of a concatenation), ``Y_c`` is
the part of the output that the blocks make: the rest stays as it is. Source: arXiv 2511.19566; docs/method.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.calibration.low_rank import LowRank, Second, as_tensor
from modhifi.pruning.linalg import factorise

# The damping of a similarity matrix of unit diagonal: far above rounding, and far below any fidelity that is printed.
JITTER = 1e-10
# The numbers of similarity matrices that are held at once.
NUMBERS = 2**25


def _ordered(weight: Tensor, second: Second, blocks: Tensor) -> tuple[Tensor, Second]:
    """The columns of the blocks alone, block after block: weight ``(out, n m)`` and second moment ``(n m, n m)``."""
    columns = blocks.reshape(-1)
    if len(columns) == len(second) and bool((columns == torch.arange(len(columns), device=columns.device)).all()):
        return weight, second
    inside = second.restricted(columns) if isinstance(second, LowRank) else second[columns][:, columns]
    return weight[:, columns], inside


def _made(weight: Tensor, second: Second, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`_ordered` returns, with all entries of the second moment."""
    weight, ordered = _ordered(weight, second, blocks)
    return weight, as_tensor(ordered)


def _energies(
    weight: Tensor, second: Second, blocks: Tensor, product: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``⟨Y_c, A_ci⟩`` and ``E‖A_ci‖²``, both ``(out, n)``, and ``E‖Y_c‖²``, ``(out,)``."""
    n, m = blocks.shape
    if isinstance(second, LowRank):
        inside = second.blocks(blocks)
    else:
        inside = second[blocks[:, :, None], blocks[:, None, :]]
    weight, ordered = _ordered(weight, second, blocks)
    if product is None or ordered is not second:
        product = weight @ ordered
    inner = (weight * product).view(-1, n, m).sum(2)
    pieces = weight.view(-1, n, m)
    return inner, torch.einsum("cim,imk,cik->ci", pieces, inside, pieces), inner.sum(1)


def _ratio(numerator: Tensor, denominator: Tensor, scale: Tensor) -> Tensor:
    """Quotient that is 0 where the denominator is nothing but rounding beside ``scale``."""
    return torch.where(denominator > scale.abs() * 1e-14, numerator / denominator, 0.0)


def singleton_fidelity(weight: Tensor, second: Second, blocks: Tensor, product: Tensor | None = None) -> Tensor:
    """Fidelity of each component alone, ``s_ci = ⟨Y_c,A_ci⟩² / (E‖A_ci‖² E‖Y_c‖²)``, ``(out, n)`` in [0, 1].

    0 where a contribution or the whole channel has no energy. ``product`` is ``weight @ second`` where it is known.
    """
    inner, own, energy = _energies(weight, second, blocks, product)
    alone = _ratio(inner.square(), own, own.amax(1, keepdim=True))
    return _ratio(alone, energy[:, None].expand_as(own), own.sum(1, keepdim=True)).clamp(0.0, 1.0)


def similarity(row: Tensor, second: Tensor, n: int) -> Tensor:
    """The paper's component-similarity matrix ``Q_c[i,j] = W_ciᵀ S_ij W_cj`` of one output channel, ``(n, n)``.

    ``row`` ``(d,)`` is the channel's weight; the columns of each of the n components stand side by side.
    """
    half = (second * row).view(len(row), n, -1).sum(2)
    return (half * row[:, None]).view(n, -1, n).sum(1)


def subset_fidelity(weight: Tensor, second: Second, blocks: Tensor, kept: Tensor) -> Tensor:
    """Share of each output channel's energy that the kept components explain with the best scalars, ``(out,)``.

    ``FS_c(C) = max_δ 1 − E‖Y_c − Σ_{i∈C} δ_i A_ci‖² / E‖Y_c‖²``; 1 for a channel without energy. Computed with a
    pseudo-inverse: a ridge would break monotonicity. ``kept`` int64 ``(k,)``.
    """
    result = torch.ones(len(weight), dtype=weight.dtype, device=weight.device)
    weight, second = _made(weight, second, blocks)
    for channel, row in enumerate(weight):
        q = similarity(row, second, len(blocks))
        energy = q.sum()
        if energy <= q.diagonal().sum() * 1e-14:
            continue
        target = q.sum(1)[kept]
        explained = target @ torch.linalg.pinv(q[kept][:, kept], hermitian=True) @ target
        result[channel] = (explained / energy).clamp(0.0, 1.0)
    return result


def prefix_fidelity(weight: Tensor, second: Second, blocks: Tensor, order: Tensor) -> Tensor:
    """Subset Fidelity of the first k components of an order, for every k and output channel, ``(out, n + 1)``.

    ``order`` int64 ``(out, n)``, or ``(n,)`` for all channels. With ``Q_c = LLᵀ`` in that order and ``y = L⁻¹ Q_c 1``,
    ``FS_c`` of the first k is ``Σ_{i≤k} y_i² / E‖Y_c‖²``: one factorisation for all k. 1 for a channel without energy.
    """
    n, device = len(blocks), weight.device
    result = torch.ones(len(weight), n + 1, dtype=weight.dtype, device=device)
    weight, second = _made(weight, second, blocks)
    orders = order.to(device).expand(len(weight), n)
    every = torch.vmap(lambda row: similarity(row, second, n))
    for channels in torch.arange(len(weight), device=device).split(max(1, NUMBERS // second.numel())):
        q = every(weight[channels])
        unit = q.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        energy = q.sum((1, 2))
        alive = energy > unit.square().sum(1) * 1e-14
        inverse = torch.where(unit > 0, 1 / unit, 0.0)
        q = q * inverse[:, :, None] * inverse[:, None, :]
        place = orders[channels]
        target = torch.einsum("cij,cj->ci", q, unit).gather(1, place)
        q = q.gather(1, place[:, :, None].expand_as(q)).gather(2, place[:, None, :].expand_as(q))
        factor = torch.linalg.cholesky(q + JITTER * torch.eye(n, dtype=q.dtype, device=device))
        solved = torch.linalg.solve_triangular(factor, target[:, :, None], upper=False)[:, :, 0]
        explained = solved.square().cumsum(1) / torch.where(alive, energy, 1.0)[:, None]
        curve = torch.cat([torch.zeros_like(explained[:, :1]), explained.clamp(0.0, 1.0)], 1)
        result[channels] = torch.where(alive[:, None], curve, result[channels])
    return result


def channel_energy(weight: Tensor, second: Second, blocks: Tensor) -> Tensor:
    """``E‖Y_c‖²`` of every output channel, ``(out,)``."""
    return _energies(weight, second, blocks)[2]


def summed_similarity(weight: Tensor, second: Second, blocks: Tensor) -> Tensor:
    """The similarity matrices of all output channels added up, ``Σ_c Q_c``, ``(n, n)``."""
    n, m = blocks.shape
    weight, second = _made(weight, second, blocks)
    return ((weight.T @ weight) * second).view(n, m, n, m).sum((1, 3))


def optimal_scalars(weight: Tensor, second: Second, blocks: Tensor, kept: Tensor, ridge: float = 1e-4) -> Tensor:
    """The paper's scalars ``δ*_C = 1 + Q_CC⁻¹ Q_CC̄ 1`` of the kept components, ``(out, k)``.

    ``ridge`` is in units of the mean diagonal of ``Q_CC``; 0 uses the pseudo-inverse. Raises
    :class:`modhifi.errors.IndefiniteError` where no damping makes ``Q_CC`` positive definite.
    """
    rest = torch.ones(len(blocks), dtype=torch.bool, device=weight.device)
    rest[kept] = False
    scales = torch.ones(len(weight), len(kept), dtype=weight.dtype, device=weight.device)
    weight, second = _made(weight, second, blocks)
    for channel, row in enumerate(weight):
        q = similarity(row, second, len(blocks))
        own, gap = q[kept][:, kept], q[kept][:, rest].sum(1)
        if len(kept) and ridge * own.diagonal().mean() > 0:
            scales[channel] += torch.cholesky_solve(gap[:, None], factorise(own, ridge)[0])[:, 0]
        else:
            scales[channel] += torch.linalg.pinv(own, hermitian=True) @ gap
    return scales


def energy_score(weight: Tensor, second: Second, blocks: Tensor) -> Tensor:
    """How much of the reader's output energy each component explains alone, ``Σ_c E‖Y_c‖² s_ci``, ``(n,)``."""
    _, _, energy = _energies(weight, second, blocks)
    return (singleton_fidelity(weight, second, blocks) * energy[:, None]).sum(0)


def wanda_score(weight: Tensor, second: Second, blocks: Tensor) -> Tensor:
    """Energy of each contribution summed over channels, ``Σ_c E‖A_ci‖²``, ``(n,)``.

    For one column per component this is weight norm² times activation norm² (structured Wanda), and the squared row
    norms of the Cholesky factor of the summed similarity (the paper's shortcut for language models).
    """
    return _energies(weight, second, blocks)[1].sum(0)


def top_hifi(singletons: Tensor, k: int) -> Tensor:
    """Union over output channels of the k components of highest singleton fidelity, bool ``(n,)`` (paper's NAIVE)."""
    member = torch.zeros(singletons.shape[1], dtype=torch.bool)
    if k > 0:
        member[singletons.topk(min(k, singletons.shape[1]), dim=1).indices.reshape(-1)] = True
    return member


def hifi_size(weight: Tensor, second: Second, blocks: Tensor, eta: float) -> Tensor:
    """Size of the smallest NAIVE set of fidelity at least ``eta`` per output channel, int64 ``(out,)``.

    Components are taken in order of singleton fidelity; the set's fidelity is exact (bisection, as it is monotone).
    """
    singles = singleton_fidelity(weight, second, blocks)
    order = singles.argsort(dim=1, descending=True, stable=True)
    sizes = torch.zeros(len(weight), dtype=torch.int64)
    for channel in range(len(weight)):
        if not bool(singles[channel].any()):
            continue
        low, high = 1, len(blocks)
        while low < high:
            middle = (low + high) // 2
            fidelity = subset_fidelity(weight[channel : channel + 1], second, blocks, order[channel, :middle])
            low, high = (low, middle) if fidelity[0] >= eta else (middle + 1, high)
        sizes[channel] = low
    return sizes
