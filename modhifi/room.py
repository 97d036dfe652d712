"""Whether the Grams of a run fit into memory, asked before anything is measured."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from .errors import ModhifiError
from .groups import Structure, operator_modules
from .readers import columns_of

# The Gram that is worked on stands beside its damped copy, that one's factor and its inverse.
COPIES = 4


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on ``device`` can have, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_room(model: nn.Module, structure: Structure) -> None:
    """Raise ModhifiError if the widest reader's Gram, and what is made of it, is more than what is free.

    The message names the group to leave out.
    """
    widest, bytes_ = "", 0
    for name, module in operator_modules(model, structure.prunable):
        groups, columns = columns_of(module)
        if groups * columns**2 * 8 > bytes_:
            widest, bytes_ = name, groups * columns**2 * 8
    if not widest:
        return
    module = model.get_submodule(widest)
    free = free_bytes(next(module.parameters()).device)
    if COPIES * bytes_ > free:
        group = next(g.name for g in structure.prunable if widest in {s.module for s in g.readers})
        raise ModhifiError(
            f"the Gram matrix of {widest} ({columns_of(module)[1]:,} input columns) takes {bytes_ / 1e9:.1f} GB, four "
            f"times that to work with, and {free / 1e9:.1f} GB are free: leave its group out with --exclude {group}"
        )
