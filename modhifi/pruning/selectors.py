"""In which order a group's components go: one score a selector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.pruning.fidelity import energy_score, hifi_size, singleton_fidelity, top_hifi, wanda_score
from modhifi.pruning.readers import Reader


def _summed(readers: list[Reader], score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    total = torch.zeros(len(readers[0].owner), dtype=torch.float64)
    for reader in readers:
        for weight, second, mine, columns in reader.parts():
            if len(mine):
                total[mine] += score(weight, second, columns).cpu()
    return total


def _weight_norm(weight: Tensor, second: Tensor, blocks: Tensor) -> Tensor:
    return weight.square().sum(0)[blocks].sum(1)


def naive_rank(readers: list[Reader]) -> Tensor:
    """For each component the least k at which it enters some output channel's top-k of singleton fidelity, ``(n,)``.

    Ties are broken by the largest singleton fidelity: keeping the components of lowest rank is keeping the union of
    the channels' NAIVE HiFi sets of size k.
    """
    n = len(readers[0].owner)
    best = torch.full((n,), float(n), dtype=torch.float64)
    for reader in readers:
        for weight, second, mine, columns in reader.parts():
            if not len(mine):
                continue
            singles = singleton_fidelity(weight, second, columns).cpu()
            places = singles.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            entry = places.min(0).values + 1 - singles.amax(0).clamp(0, 1) * 0.999
            best[mine] = torch.minimum(best[mine], entry.double())
    return best


def hifi_union(readers: list[Reader], eta: float) -> Tensor:
    """Union over readers and output channels of the smallest NAIVE sets of fidelity ``eta``: bool ``(n,)``."""
    member = torch.zeros(len(readers[0].owner), dtype=torch.bool)
    for reader in readers:
        for weight, second, mine, columns in reader.parts():
            if len(mine):
                singles = singleton_fidelity(weight, second, columns).cpu()
                for channel, size in enumerate(hifi_size(weight, second, columns, eta)):
                    member[mine] |= top_hifi(singles[channel : channel + 1], int(size))
    return member


def removal_order(selector: str, readers: list[Reader], seed: int) -> Tensor | None:
    """Components from first to last to go, int64 ``(n,)``; None for ``obs``, which finds its order while removing."""
    if selector == "obs":
        return None
    n = len(readers[0].owner)
    if selector == "random":
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if selector == "naive":
        return naive_rank(readers).argsort(descending=True, stable=True)
    scores = {"energy": energy_score, "wanda": wanda_score, "cholesky": wanda_score, "magnitude": _weight_norm}
    if selector not in scores:
        known = ", ".join(["obs", "naive", *scores, "random"])
        raise ModhifiError(f"unknown selector '{selector}'; choose one of {known}")
    return _summed(readers, scores[selector]).argsort(stable=True)
