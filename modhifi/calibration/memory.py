"""Whether the Grams of a run fit into memory, asked before anything is measured."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from modhifi.errors import ModhifiError
from modhifi.structure.groups import Structure
from modhifi.structure.operators import columns_of, operator_modules

# The Gram that is worked on stands beside its damped copy, that one's factor and its inverse.
COPIES = 4


def gram_bytes(module: nn.Module) -> int:
    """What the float64 Gram of a reader takes."""
    groups, columns = columns_of(module)
    return groups * columns**2 * 8


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on ``device`` can have, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_room(model: nn.Module, structure: Structure) -> None:
    """Raise ModhifiError if one reader's Gram, and what is made of it, is more than what is free.

    The message names the group to leave out.
    """
    for name, module in operator_modules(model, structure.prunable):
        needed, free = gram_bytes(module), free_bytes(next(module.parameters()).device)
        if COPIES * needed > free:
            group = next(g.name for g in structure.prunable if name in {s.module for s in g.readers})
            raise ModhifiError(
                f"the Gram matrix of {name} ({columns_of(module)[1]:,} input columns) takes {needed / 1e9:.1f} GB, "
                f"four times that to work with, and {free / 1e9:.1f} GB are free; leave its group out with "
                f"--exclude {group}"
            )
