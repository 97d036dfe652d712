"""Other methods' edits, for comparison only: each takes the dense model and statistics, and returns an edited copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.calibration.moments import Moments
from modhifi.models.loaded import LoadedModel
from modhifi.structure.groups import Structure


class BlockStatistics:
    """Second moment of every block's input and how little the block turns it, over all tokens seen while open."""

    def __init__(self, count: int) -> None:
        self.second: list[Tensor] = [torch.zeros(())] * count
        self.turned = torch.zeros(count, dtype=torch.float64)

    @contextmanager
    def watching(self, blocks: nn.ModuleList) -> Iterator[None]:
        handles = [b.register_forward_hook(self._see(i)) for i, b in enumerate(blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, i: int) -> Any:
        def see(block: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
            before, after = args[0].flatten(0, 1), (out[0] if isinstance(out, tuple) else out).flatten(0, 1)
            # beside the stream's few huge values, single precision would round the directions that are left out
            self.second[i] = self.second[i] + before.double().T @ before.double()
            self.turned[i] += (1 - torch.cosine_similarity(before, after, dim=-1)).double().sum()

        return see


def flap(loaded: LoadedModel, structure: Structure, moments: Mapping[str, Moments], share: float) -> nn.Module:
    """FLAP (An et al., AAAI 2024), same share in every layer: neurons of least fluctuation times squared weight norm
    go, and a new bias takes over their mean contribution."""
    model = copy.deepcopy(loaded.model)
    for group in structure.prunable:
        name = group.readers[0].module
        reader: Any = model.get_submodule(name)
        found = moments[name]
        score = found.cov[0].diagonal() * reader.weight.double().square().sum(0)
        gone = score.argsort()[: round(share * group.n)]
        bias = reader.weight.double()[:, gone] @ found.mean[0, gone]
        reader.bias = nn.Parameter(bias.to(reader.weight.dtype), requires_grad=False)
        reader.weight.data[:, gone] = 0
    return model


def short_gpt(loaded: LoadedModel, statistics: BlockStatistics, count: int) -> nn.Module:
    """ShortGPT (Men et al. 2024): the ``count`` blocks that turn their input least are left out."""
    model: Any = copy.deepcopy(loaded.model)
    gone = set(statistics.turned.argsort()[:count].tolist())
    model.model.layers = nn.ModuleList(b for i, b in enumerate(model.model.layers) if i not in gone)
    return model


def slice_gpt(loaded: LoadedModel, statistics: BlockStatistics, share: float) -> nn.Module:
    """SliceGPT (Ashkboos et al., ICLR 2024) in dense shapes: what enters a block is projected on the principal
    directions of its input, ``share`` of them left out. The rotations between blocks, which cost parameters, are free
    here, and the residual between attention and FFN is not cut: both favour it."""
    model: Any = copy.deepcopy(loaded.model)
    for block, second in zip(model.model.layers, statistics.second, strict=True):
        width = len(second)
        basis = torch.linalg.eigh(second).eigenvectors[:, round(share * width) :].float()
        projection = basis @ basis.T
        block.register_forward_pre_hook(lambda _, args, p=projection: (args[0] @ p, *args[1:]))
    return model
