"""REAP: how much an expert adds to the tokens that it is chosen for."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.pruning.experts.base import EXPERT_SELECTORS, ExpertSelector
from modhifi.pruning.experts.block import Block


def saliency(block: Block, there: Tensor, seed: int) -> Tensor:
    """``S_e``, the mean of ``g_e(x) ‖f_e(x)‖`` over the tokens x of expert e, ``(E,)``; 0 for one without tokens."""
    routed = block.routed
    norms = routed.products.double().norm(dim=1)
    if routed.gates is not None:
        norms = norms * routed.gates.double().abs().flatten()
    sums = torch.zeros(len(there), dtype=torch.float64, device=norms.device).index_add_(0, routed.experts, norms)
    return (sums / torch.bincount(routed.experts, minlength=len(there)).clamp_min(1)).cpu()


EXPERT_SELECTORS.register(
    ExpertSelector(
        "reap",
        "the least mean of gate times output norm over its tokens",
        "Lasby et al. 2025 (arXiv 2510.13999)",
        saliency,
    )
)
