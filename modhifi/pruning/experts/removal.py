"""What a block's output loses without an expert, after compensation."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.pruning.experts.base import EXPERT_SELECTORS, ExpertSelector
from modhifi.pruning.experts.block import Block

# So many experts, those whose loss costs least before compensation, are tried with it.
SHORTLIST = 4


def removal(block: Block, there: Tensor, seed: int) -> Tensor:
    """``E‖y(x) − ŷ(x)‖²`` without each expert that is still there, ``(E,)``; infinite for those not on the shortlist.

    ``ŷ`` is the block's output where the router chooses among the others and their matrices are fitted anew: all of the
    effect is measured, that on tokens for which the router now chooses another expert and that on its other gates.
    """
    costs = torch.full((len(there),), torch.inf, dtype=torch.float64)
    for expert in there.nonzero().flatten().tolist():
        costs[expert] = block.error(block.without(there, expert))
    shortlist = costs.topk(min(SHORTLIST, int(there.sum())), largest=False).indices
    fitted = torch.full_like(costs, torch.inf)
    for expert in shortlist.tolist():
        module = block.without(there, expert)
        block.fit(module)
        fitted[expert] = block.error(module)
    return fitted


EXPERT_SELECTORS.register(
    ExpertSelector("removal", "the least error of the block without it, after compensation", "ours", removal, anew=True)
)
