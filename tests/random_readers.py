"""Readers of random positive definite second moments, in the shapes that groups see, and errors solved from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from modhifi.pruning.compensations.lstsq import least_squares
from modhifi.pruning.local_error import local_error
from modhifi.pruning.readers import Reader

TINY = 1e-10  # a ridge that leaves least squares as good as exact


def reader(seed: int, n: int = 6, m: int = 2, out: int = 4, groups: int = 1, spare: int = 0) -> Reader:
    """n components of m columns, dealt out to the convolution groups in blocks, and ``spare`` columns in no block."""
    generator = torch.Generator().manual_seed(seed)
    d = n // groups * m + spare
    second = []
    for _ in range(groups):
        x = torch.randn(4 * d, d, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(d, d, generator=generator, dtype=torch.float64)
        second.append(x.T @ x / len(x))
    weight = torch.randn(groups, out, d, generator=generator, dtype=torch.float64)
    columns = torch.cat([torch.randperm(d, generator=generator)[: n // groups * m].view(-1, m) for _ in range(groups)])
    owner = torch.arange(groups).repeat_interleave(n // groups)
    return Reader(weight, torch.stack(second), owner, columns)


READERS: dict[str, Callable[[int], list[Reader]]] = {
    "one": lambda seed: [reader(seed)],
    "several": lambda seed: [reader(seed, m=1), reader(seed + 1, m=3, out=2)],
    "conv groups": lambda seed: [reader(seed, groups=2)],
    "conv groups beside a plain one": lambda seed: [reader(seed, m=1), reader(seed + 1, groups=3)],
    "part of a concatenation": lambda seed: [reader(seed, spare=5)],
}


def residual(readers: Iterable[Reader], removed: Tensor, ridge: float = TINY) -> float:
    """Squared error of the best readers without some components, each solved from scratch."""
    total = 0.0
    for part in (part for r in readers for part in r.parts):
        kept = torch.ones(len(part.second), dtype=torch.bool)
        kept[part.columns[torch.isin(part.components, removed)].reshape(-1)] = False
        total += local_error(part.weight, least_squares(part.weight, part.second, kept, ridge), part.second)[0]
    return total
