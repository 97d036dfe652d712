"""Whether the Grams of a run fit into memory, asked before anything is measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from modhifi.calibration.accumulator import few_rows_pay
from modhifi.calibration.sampling import LEAST_ROWS, Sampling
from modhifi.data.samples import Samples, remembered
from modhifi.errors import ModhifiError
from modhifi.structure.groups import Structure
from modhifi.structure.operators import columns_of, operator_modules

# The Gram that is worked on stands beside its damped copy, that one's factor and its inverse.
COPIES = 4
# What two streams of activations remember takes at most this share of what is free: of main memory, of a device's.
REMEMBERED, ON_DEVICE = 1 / 2, 1 / 4
# And so do the items of a data set that is read again and again.
ITEMS = 1 / 8


def gram_bytes(module: nn.Module) -> int:
    """What the float64 Gram of a reader takes."""
    groups, columns = columns_of(module)
    return groups * columns**2 * 8


def rows_seen(module: nn.Module, macs: int, samples: float, sampling: Sampling) -> float:
    """How many rows a reader's moments are of; ``macs`` are its multiply-adds per sample.

    ``samples`` counts samples of the size of the example that the multiply-adds were counted on.
    """
    positions = samples * macs / module.get_parameter("weight").numel()
    if sampling.rows_per_column is None:
        return positions
    return min(positions, max(sampling.rows_per_column * columns_of(module)[1], LEAST_ROWS))


def moment_bytes(module: nn.Module, rows: float) -> int:
    """What the moments of a reader take: a Gram, or that many rows where they stand for it."""
    groups, columns = columns_of(module)
    spanned = few_rows_pay(groups, columns) and rows <= columns // 2
    return int(4 * groups * columns * rows) if spanned else gram_bytes(module)


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on ``device`` can have, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def fitting(sizes: Sequence[int], most: int) -> list[range]:
    """Which of some things that take so many bytes go together, in order: as many as ``most`` bytes hold, or one."""
    parts, start, total = [], 0, 0
    for number, size in enumerate(sizes):
        if number > start and total + size > most:
            parts.append(range(start, number))
            start, total = number, 0
        total += size
    return [*parts, range(start, len(sizes))] if sizes else parts


def room_to_remember(device: torch.device, processes: int = 1) -> float:
    """How many bytes of activations are remembered on a device at most; ``processes`` share main memory."""
    share = REMEMBERED / processes if device.type == "cpu" else ON_DEVICE
    return share * free_bytes(device)


def place_to_remember(device: torch.device, needed: float, processes: int = 1) -> tuple[torch.device | None, float]:
    """Where each of several ``processes`` remembers activations, None for where they are, and how many bytes at most.

    That is the device that computes, as long as ``needed`` bytes fit into their share of its memory, else main memory.
    """
    own, main = room_to_remember(device, processes), torch.device("cpu")
    return (None, own) if device.type == main.type or needed <= own else (main, room_to_remember(main, processes))


def loaded_once(samples: Samples, processes: int = 1) -> Samples:
    """The same samples for passes that read them again and again: each is drawn or decoded once, where memory allows.

    ``processes`` share that memory.
    """
    return remembered(samples, ITEMS * free_bytes(torch.device("cpu")) / processes)


def check_room(
    model: nn.Module, structure: Structure, samples: float, sampling: Sampling, together: bool = True
) -> None:
    """Raise ModhifiError if the moments of all readers, and what is made of one's, are more than what is free.

    ``samples`` as in :func:`rows_seen`. Not ``together``, one reader's moments are in memory at a time. The message
    names the group to leave out, if one alone is too large.
    """
    sizes: dict[torch.device, list[int]] = defaultdict(list)
    for name, module in operator_modules(model, structure.prunable):
        rows = rows_seen(module, structure.operators[name].macs, samples, sampling)
        device = next(module.parameters()).device
        needed, free = moment_bytes(module, rows), free_bytes(device)
        sizes[device].append(needed)
        if COPIES * needed > free:
            group = next(g.name for g in structure.prunable if name in {s.module for s in g.readers})
            raise ModhifiError(
                f"the Gram matrix of {name} ({columns_of(module)[1]:,} input columns) takes {needed / 1e9:.1f} GB, "
                f"four times that to work with, and {free / 1e9:.1f} GB are free; leave its group out with "
                f"--exclude {group}"
            )
    for device, needs in sizes.items() if together else ():
        needed, free = sum(needs) + (COPIES - 1) * max(needs), free_bytes(device)
        if needed > free:
            raise ModhifiError(
                f"the Gram matrices of all {len(needs)} readers together take {needed / 1e9:.1f} GB with what is made "
                f"of them, and {free / 1e9:.1f} GB are free; prune in parts with --only, or leave groups out with "
                "--exclude"
            )
