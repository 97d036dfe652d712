"""Masks on single weights, chosen by a score: what the fidelity methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.unlearning.closed_forms import Edit

# The unit of these methods' strength.
SHARE = "share of the weights"


def mask_weights(
    weight: Tensor, scores: Tensor, blocks: Tensor, share: float, factor: float, mean: Tensor | None
) -> Edit:
    """The ``share`` of the weights with the highest positive scores, multiplied by ``factor``.

    ``weight``: ``(out, d)``; ``scores``: ``(out, n)``; ``blocks``: ``(n, m)`` int64, the columns of each component;
    ``mean``: ``(d,)`` or None, whose lost part becomes a shift. Raises ModhifiError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ModhifiError(f"a share of {share:g} is not between 0 and 1; give 0.05 for 5 % of the weights")
    original = weight.double()
    order = scores.flatten().argsort(descending=True, stable=True)[: round(share * scores.numel())]
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[order] = scores.flatten()[order] > 0
    gain = torch.ones_like(original)
    gain[:, blocks.flatten()] = (
        torch.where(chosen.view_as(scores), factor, 1.0).double().repeat_interleave(blocks.shape[1], 1)
    )
    edited = original * gain
    return Edit(edited, None if mean is None else (original - edited) @ mean.double())
