"""A closer look at one group: fidelity output channel by output channel, and how alike its components are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modhifi.pruning.fidelity import channel_energy, prefix_fidelity, singleton_fidelity, summed_similarity
from modhifi.pruning.readers import Reader


@dataclass(frozen=True)
class ChannelFidelity:
    """The fidelities at the output channels of one reader, or of one convolution group of it.

    ``energy`` float64 ``(out,)``: E‖Y_c‖²; ``components`` int64 ``(k,)``: the numbers of the components that are read;
    ``singleton`` float64 ``(out, k)``: the fidelity of each alone; ``hifi`` by η int64 ``(out,)``: the size of the
    smallest NAIVE set, in the paper's scalars, whose Subset Fidelity reaches η.
    """

    reader: str
    energy: Tensor
    components: Tensor
    singleton: Tensor
    hifi: Mapping[float, Tensor]

    def to_json(self) -> dict[str, Any]:
        """The fidelities as JSON-able data."""
        return {
            "reader": self.reader,
            "components": self.components.tolist(),
            "energy": self.energy.tolist(),
            "singleton": self.singleton.tolist(),
            "hifi_size": {f"{eta:g}": sizes.tolist() for eta, sizes in self.hifi.items()},
        }


def channel_fidelities(names: Sequence[str], readers: Sequence[Reader], etas: Sequence[float]) -> list[ChannelFidelity]:
    """The fidelities at every output channel of a group's readers, whose names are given in the same order."""
    result = []
    for name, reader in zip(names, readers, strict=True):
        for part in reader.parts:
            arguments = part.weight, part.second, part.columns
            singleton = singleton_fidelity(*arguments)
            order = singleton.argsort(dim=1, descending=True, stable=True)
            sizes = hifi_sizes(prefix_fidelity(*arguments, order), etas)
            result.append(
                ChannelFidelity(name, channel_energy(*arguments).cpu(), part.components.cpu(), singleton.cpu(), sizes)
            )
    return result


def hifi_sizes(curves: Tensor, etas: Sequence[float]) -> dict[float, Tensor]:
    """For each η the least k at which a curve ``(..., n + 1)`` of Subset Fidelity against k reaches it, int64.

    n where a curve stays below; NaN counts as not reached.
    """
    n = curves.shape[-1] - 1
    return {eta: n + 1 - (curves >= eta).sum(-1).clamp_min(1).cpu() for eta in etas}


def cosine_similarity(readers: Sequence[Reader]) -> Tensor:
    """How alike the contributions of a group's n components are, float64 ``(n, n)`` in [-1, 1].

    The paper's matrices ``Q_c`` added up over all output channels of all readers and scaled to unit diagonal; 0 where a
    component contributes nothing, or where two have no reader in common.
    """
    n = len(readers[0].owner)
    total = torch.zeros(n, n, dtype=torch.float64)
    for part in (part for reader in readers for part in reader.parts):
        inside = part.components.cpu()
        total[inside[:, None], inside] += summed_similarity(part.weight, part.second, part.columns).cpu()
    norm = total.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    return (total * inverse[:, None] * inverse).clamp(-1.0, 1.0)
