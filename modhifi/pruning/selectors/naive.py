"""The paper's NAIVE rule: every output channel keeps its components of highest singleton fidelity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modhifi.pruning.fidelity import hifi_size, singleton_fidelity, top_hifi
from modhifi.pruning.readers import Reader
from modhifi.pruning.selectors.base import SELECTORS, Selector


def naive_rank(readers: Sequence[Reader]) -> Tensor:
    """The least k at which each component enters some output channel's top-k of singleton fidelity, float64 ``(n,)``.

    Ties are broken by the largest singleton fidelity: keeping the components of lowest rank is keeping the union of
    the channels' NAIVE HiFi sets of size k. Source: arXiv 2511.19566.
    """
    n = len(readers[0].owner)
    rank = torch.full((n,), float(n), dtype=torch.float64)
    for part in (part for reader in readers for part in reader.parts):
        singletons = singleton_fidelity(part.weight, part.second, part.columns).cpu()
        places = singletons.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        entry = places.min(0).values + 1 - singletons.amax(0).clamp(0, 1) * 0.999
        rank[part.components] = torch.minimum(rank[part.components], entry.double())
    return rank


def hifi_union(readers: Sequence[Reader], eta: float) -> Tensor:
    """The union over readers and output channels of the smallest NAIVE sets of fidelity ``eta``, bool ``(n,)``."""
    member = torch.zeros(len(readers[0].owner), dtype=torch.bool)
    for part in (part for reader in readers for part in reader.parts):
        singletons = singleton_fidelity(part.weight, part.second, part.columns).cpu()
        for channel, size in enumerate(hifi_size(part.weight, part.second, part.columns, eta)):
            member[part.components] |= top_hifi(singletons[channel : channel + 1], int(size))
    return member


SELECTORS.register(
    Selector(
        "naive",
        "the last to enter any output channel's best singletons",
        "arXiv 2511.19566, the NAIVE rule",
        lambda readers, seed: naive_rank(readers).argsort(descending=True, stable=True),
    )
)
