"""R4: how much of the output's change each modified layer causes, measured with hybrid networks.

Hybrid k has the first k modified layers undone. Neighbours differ in one layer, fed with clean activations and followed
by the modified tail (form B), and the differences telescope exactly to the whole change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerShare:
    """One modified layer. Root mean squares over the samples, in units of the layer's and of the network's output.

    ``local`` is e_k, ``change`` is t_k, ``amplification`` t_k / e_k, ``constant`` the global bound of that ratio (R1).
    ``parameters`` are those that the edit changed there.
    """

    where: str
    parameters: tuple[str, ...]
    local: float
    change: float
    amplification: float
    constant: float


@torch.no_grad()
def hybrid_changes(
    dense: nn.Module,
    edited: nn.Module,
    layers: Sequence[tuple[str, ...]],
    run: Callable[[Tensor, nn.Module], Tensor],
    batch: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The change (n, ...) that each layer (names of its parameters, in order of execution) causes, one pass each.

    Returns the changes, the outputs of the original and those of the modified network; the changes add up to the
    difference of the two. Both models have the same shapes and stay as they are.
    """
    work = copy.deepcopy(edited)
    ours = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    theirs = {**dict(work.named_parameters()), **dict(work.named_buffers())}
    start = run(batch, work)
    before, changes = start, []
    for names in layers:
        for name in names:
            theirs[name].data.copy_(ours[name])
        after = run(batch, work)
        changes.append(after - before)
        before = after
    return changes, before, start
