"""A seeded order, which any other selector should beat."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.pruning.experts.base import EXPERT_SELECTORS, ExpertSelector
from modhifi.pruning.experts.block import Block


def drawn(block: Block, there: Tensor, seed: int) -> Tensor:
    """Uniform numbers that the seed and the block's name decide, ``(E,)``."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(block.mixture.block.encode()))
    return torch.rand(len(there), generator=generator)


EXPERT_SELECTORS.register(ExpertSelector("random", "at random, by the seed", "", drawn))
