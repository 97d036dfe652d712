"""A seeded permutation, which any other selector should beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modhifi.pruning.readers import Reader
from modhifi.pruning.selectors.base import SELECTORS, Selector


def permutation(readers: Sequence[Reader], seed: int) -> Tensor:
    """A uniform permutation of the components that the seed alone decides, int64 ``(n,)``."""
    return torch.randperm(len(readers[0].owner), generator=torch.Generator().manual_seed(seed))


SELECTORS.register(Selector("random", "at random, by the seed", "", permutation, needs_moments=False))
