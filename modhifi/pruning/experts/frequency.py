"""How many tokens an expert is chosen for."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.pruning.experts.base import EXPERT_SELECTORS, ExpertSelector
from modhifi.pruning.experts.block import Block


def tokens(block: Block, there: Tensor, seed: int) -> Tensor:
    """The number of tokens that the router sends to each expert, ``(E,)``."""
    return torch.bincount(block.routed.experts.cpu(), minlength=len(there)).double()


EXPERT_SELECTORS.register(
    ExpertSelector(
        "frequency", "the fewest tokens", "Muzio et al. 2024 (arXiv 2404.05089), without their merging", tokens
    )
)
