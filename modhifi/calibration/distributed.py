"""The processes of one run, as `accelerate launch -m modhifi` starts them: each measures its share of the data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from modhifi.calibration.accumulator import Accumulator, few_rows_pay
from modhifi.calibration.low_rank import as_tensor
from modhifi.calibration.moments import Moments, PairedMoments, Spanned
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError, is_out_of_memory

# So long a process waits for the others, one of which may be solving a large block.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. ``device`` is its own accelerator; None: as without other processes."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def main(self) -> bool:
        """Whether this process goes on, writes and prints; the others measure and stop."""
        return self.index == 0


ALONE = Processes()


def launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes() -> Processes:
    """Join the other processes of this run, if a launcher started several.

    Raises ModhifiError where they cannot be joined: alone, each would do and write the whole.
    """
    if not launched():
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise ModhifiError(
            f"{os.environ['WORLD_SIZE']} processes were started and cannot be joined on {state.device}; "
            "start one, without a launcher"
        )
    return Processes(state.process_index, state.num_processes, state.device)


@contextmanager
def _waiting() -> Iterator[None]:
    """Inside, processes talk to each other; one that is not answered ends with one line."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ModhifiError(
            f"another process of this run has ended, or was silent for {PATIENCE.total_seconds() / 60:g} minutes; "
            "see what it wrote, and start all of them again"
        ) from error


def shared(value: Any, team: Processes) -> Any:
    """What the main process gives, in every process; anything that can be pickled."""
    if team.count == 1:
        return value
    values = [value]
    with _waiting():
        distributed.broadcast_object_list(values, device=team.device)
    return values[0]


# Batches are dealt to the processes, and their rows are multiplied, in runs of at most so many. So many processes all
# have a share, of which none is longer than an even one by more than this.
TOGETHER, SHARES, LONGER = 8, 4, 1 / 3


def batches_together(samples: int, size: int) -> int:
    """The batches of ``size`` in a run, which one process has in a piece: a power of two, which the samples decide."""
    batches, together = len(range(0, samples, size)), TOGETHER
    while together > 1 and not _dealt_well(batches, together):
        together //= 2
    return together


def _dealt_well(batches: int, together: int) -> bool:
    """Whether runs of so many batches give every one of ``SHARES`` processes about as many."""
    runs = -(-batches // together)
    return runs >= SHARES and -(-runs // SHARES) * together <= (1 + LONGER) * -(-batches // SHARES)


def share_of(samples: Samples, size: int, team: Processes, done: int = 0) -> Sequence[int]:
    """The numbers of the first samples of those batches, of ``size``, that this process runs, without those ``done``.

    Raises ModhifiError where there are fewer batches than processes.
    """
    firsts = range(done, len(samples), size)
    if team.count == 1:
        return firsts
    if len(firsts) < team.count:
        raise ModhifiError(f"{len(samples)} samples are fewer than {team.count} batches of {size}; use fewer processes")
    together = batches_together(len(samples), size)
    while -(-len(firsts) // together) < team.count:
        together //= 2
    return [first for number, first in enumerate(firsts) if number // together % team.count == team.index]


def batches_at(samples: Samples, size: int, numbers: Sequence[int]) -> Iterator[Tensor]:
    """The batches that begin at some ``numbers``."""
    for number in numbers:
        yield from samples.subset(range(number, min(number + size, len(samples)))).batches(size)


class InStep:
    """Keeps sums in step: but for the order of addition those of one process, however many share the batches.

    All processes subtract the shifts of the main one's first batch, and multiply the rows of the same batches together.
    They agree once, behind their first batch, or in it where it has too many rows to hold.
    """

    def __init__(self, sums: Mapping[str, Accumulator], samples: int, size: int, team: Processes = ALONE) -> None:
        self.sums, self.size, self.team = sums, size, team
        self.together = batches_together(samples, size)
        self.begun, self.agreed = False, team.count == 1
        if not team.main:
            for own in sums.values():
                own.wait = self.agree

    def start(self, first: int) -> None:
        """Announce the batch from sample number ``first`` on."""
        if self.begun:
            self.agree()
        self.begun = True
        if first // self.size % self.together == 0:
            for sums in self.sums.values():
                sums.settle()

    def agree(self) -> None:
        """Takes over the main process's shifts and numbers of rows, once; called behind the last batch too."""
        if self.agreed:
            return
        self.agreed = True
        known = {n: (own.shift.cpu(), own.expected) for n, own in self.sums.items() if own.shift is not None}
        known = shared(known, self.team)
        if not self.team.main:
            for name, own in self.sums.items():
                own.begin(*known.get(name, (None, None)))


def merged(moments: Mapping[str, Moments], team: Processes) -> dict[str, Moments]:
    """Moments over the shares of all processes, exact up to rounding; every process gets them.

    Raises ModhifiError, in every process, where one of them has not seen all readers.
    """
    if team.count == 1:
        return dict(moments)
    shares: list[dict[str, tuple[int, bool]]] = [{} for _ in range(team.count)]
    with _waiting():
        distributed.all_gather_object(shares, {name: (m.n, isinstance(m, Spanned)) for name, m in moments.items()})
        if any(share.keys() != shares[0].keys() for share in shares):
            partial = sorted(set().union(*shares) - set(shares[0]).intersection(*shares))
            raise ModhifiError(f"the layer '{partial[0]}' was not run in every process; use fewer processes")
        return {name: _merged(moments[name], [share[name] for share in shares], team) for name in shares[0]}


def _merged(own: Moments, shares: list[tuple[int, bool]], team: Processes) -> Moments:
    """The moments of the union, held as one process holds as many rows."""
    counts, device = [n for n, _ in shares], own.mean.device
    if isinstance(own, Spanned) and all(spanned for _, spanned in shares):
        if few_rows_pay(*own.mean.shape) and sum(counts) <= own.mean.shape[1] // 2:
            return Spanned(_gathered(own.rows, counts, team))
    mean, cov, _ = _union(own.n / sum(counts), own.mean, own.cov, team)
    seen = None if own.seen is None else _sum(own.seen, team)
    return Moments(sum(counts), mean.to(device), cov.to(device), seen)


def merged_pairs(own: PairedMoments, team: Processes) -> PairedMoments:
    """What :func:`merged` is, for one reader's inputs with their targets; the covariance is a matrix."""
    if team.count == 1:
        return own
    with _waiting():
        n = int(_sum(torch.tensor(own.n), team))
        share = own.n / n
        mean, cov, gap = _union(share, own.mean, as_tensor(own.cov), team)
        target = _sum(own.target * share, team)
        away = own.target - target
        energy = _sum((own.energy + away.square()) * share, team)
        cross = _sum((own.cross + away[:, :, None] * gap[:, None]) * share, team)
    return PairedMoments(n, mean, cov, target, energy, cross)


def gathered(rows: Tensor, team: Processes) -> Tensor:
    """The rows ``(G, d, n)`` of all processes, in which n differs."""
    if team.count == 1:
        return rows
    counts = [0] * team.count
    with _waiting():
        distributed.all_gather_object(counts, rows.shape[2])
        return _gathered(rows, counts, team)


def _union(share: float, mean: Tensor, cov: Tensor, team: Processes) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and covariance of all rows, this process having a ``share`` of them, and how far its own mean lies away."""
    middle = _sum(mean * share, team)
    gap = mean - middle
    return middle, _sum(torch.baddbmm(cov, gap[:, :, None], gap[:, None]) * share, team), gap


def _sum(own: Tensor, team: Processes) -> Tensor:
    """The sum over all processes, where ``own`` lies."""
    total = own.to(team.device or own.device, copy=True, memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total.to(own.device)


def _gathered(rows: Tensor, counts: list[int], team: Processes) -> Tensor:
    padded = torch.nn.functional.pad(rows, (0, max(counts) - rows.shape[2])).to(team.device or rows.device).contiguous()
    pieces = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(pieces, padded)
    parts = [piece[:, :, :count] for piece, count in zip(pieces, counts, strict=True)]
    return torch.cat(parts, 2).to(rows.device)
