"""The moments of retained and of forgotten samples, apart, from one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modhifi.calibration.accumulator import Accumulator
from modhifi.calibration.im2col import reader_rows, spread_positions
from modhifi.calibration.moments import Moments
from modhifi.calibration.prefix_cache import Passes
from modhifi.models.hooks import StopForward, attached, on_input
from modhifi.structure.operators import columns_of, conv_groups
from modhifi.structure.tracing.branches import Calls
from modhifi.unlearning.sites import Writer

# A Gram of d columns looks at about this many rows per column in every population.
ROWS_PER_COLUMN = 8
# Rows that are held before their products are summed: adding to a wide Gram costs more than the product of few rows.
HELD_ROWS = 1024


class Populations:
    """Sums the moments of every population: 0 the retained samples, j the j-th forgotten class; -1 is left out."""

    def __init__(self, groups: Tensor, seed: int = 0) -> None:
        self.groups = groups
        self.seed = seed
        self.counts = [int((groups == j).sum()) for j in range(int(groups.max()) + 1)]
        self.sums = [Accumulator() for _ in self.counts]
        self.held: list[list[Tensor]] = [[] for _ in self.counts]

    def positions(self, first: int, batch: int, total: int, columns: int) -> Tensor:
        """Which of ``total`` positions to look at in every sample of a batch, int64 ``(batch, p)``."""
        wanted = min(total, math.ceil(ROWS_PER_COLUMN * columns / max(1, min(self.counts))))
        return spread_positions(total, wanted, first, batch, self.seed)

    def add(self, first: int, rows: Tensor) -> None:
        """``rows`` ``(G, d, batch, p)``; a large population looks at fewer of the ``p`` positions of each sample."""
        groups = self.groups[first : first + rows.shape[2]].to(rows.device)
        for j, count in enumerate(self.counts):
            wanted = math.ceil(ROWS_PER_COLUMN * rows.shape[1] / max(1, count))
            members = rows[:, :, groups == j, :wanted]
            if members.shape[2]:
                self.held[j].append(members.flatten(2))
            if sum(piece.shape[2] for piece in self.held[j]) >= HELD_ROWS:
                self.sum_held(j)

    def sum_held(self, j: int) -> None:
        if self.held[j]:
            self.sums[j].add(torch.cat(self.held[j], 2))
            self.held[j].clear()

    def moments(self) -> list[Moments]:
        for j in range(len(self.counts)):
            self.sum_held(j)
        return [sums.finish().to(torch.device("cpu")) for sums in self.sums]


@torch.no_grad()
def reader_moments(runs: Passes, groups: Tensor, modules: list[str]) -> dict[str, list[Moments]]:
    """The moments of what the named operators read, one for each population of ``groups`` int64 ``(n,)``."""
    populations = {name: Populations(groups) for name in modules}
    first, count = 0, 0

    def add(name: str, x: Tensor) -> None:
        own, layer = populations[name], runs.model.get_submodule(name)
        own.add(first, _input_rows(layer, x.detach(), count, lambda t, d: own.positions(first, count, t, d)))

    with attached([on_input(runs.model.get_submodule(name), partial(add, name)) for name in modules]):
        for first, run in runs:
            count = min(runs.batch_size, len(groups) - first)
            run()
    return {name: own.moments() for name, own in populations.items()}


@dataclass(frozen=True)
class Joint:
    """The moments of the rows ``[x, s]`` of a writer's input and its stream, one for each population.

    ``class_means`` ``(k, d + out)`` and ``shares`` ``(k,)``, float64, are those of the retained samples' classes.
    """

    moments: list[Moments]
    class_means: Tensor
    shares: Tensor


def joint_moments(runs: Passes, groups: Tensor, classes: Tensor, writer: Writer, focus: Tensor | None) -> Joint:
    """The joint moments of a writer's input and its stream, from one pass over the samples.

    ``groups`` and ``classes`` are the samples' populations and classes, both int64 ``(n,)``. Only positions that reach
    the stream count, and only those of ``focus`` where the stream has them.
    """
    populations, means = Populations(groups), ClassMeans(groups, classes)
    columns = columns_of(runs.model.get_submodule(writer.site.module))[1] + writer.rows.shape[1]

    def take(first: int, x: Tensor, s: Tensor) -> None:
        rows = torch.cat([x, s])
        populations.add(first, rows[None])
        means.add(first, rows)

    joint_rows(
        runs, writer, focus, lambda first, count, total: populations.positions(first, count, total, columns), take
    )
    return Joint(populations.moments(), *means.finish())


class ClassMeans:
    """The mean rows of the retained samples, those of ``groups`` 0, class by class."""

    def __init__(self, groups: Tensor, classes: Tensor) -> None:
        self.classes, counts = classes[groups == 0].unique(return_counts=True)
        self.counts = counts.double()
        # Everything else goes into a place behind the last class.
        self.place = torch.where(groups == 0, torch.searchsorted(self.classes, classes), len(self.classes))
        self.sums: Tensor | None = None

    def add(self, first: int, rows: Tensor) -> None:
        """``rows`` ``(d, batch, p)`` of the samples from number ``first`` on."""
        if self.sums is None:
            self.sums = torch.zeros(len(self.classes) + 1, len(rows), dtype=torch.float64)
        place = self.place[first : first + rows.shape[1]]
        self.sums.index_add_(0, place, rows.mean(2).T.double().cpu())

    def finish(self) -> tuple[Tensor, Tensor]:
        """Means ``(k, d)`` and shares ``(k,)``, float64."""
        assert self.sums is not None
        return self.sums[:-1] / self.counts[:, None], self.counts / self.counts.sum()


@torch.no_grad()
def joint_rows(
    runs: Passes,
    writer: Writer,
    focus: Tensor | None,
    choose: Callable[[int, int, int], Tensor],
    take: Callable[[int, Tensor, Tensor], None],
) -> None:
    """One pass that hands ``take(first, x, s)`` a writer's input and its stream at the same chosen positions.

    ``x`` ``(d, batch, p)`` and ``s`` ``(out, batch, p)``, float32, of the samples from number ``first`` on.
    ``choose(first, batch, total)`` says which of the ``total`` positions, int64 ``(batch, p)``.
    """
    layer: Any = runs.model.get_submodule(writer.site.module)
    open_positions = torch.nonzero(writer.rows[:, 0] >= 0).flatten()
    if focus is not None and writer.joined and int(focus.max()) < len(writer.rows):
        open_positions = focus
    held: dict[str, Tensor] = {}
    first, count = 0, 0

    def hold(x: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            held["positions"] = open_positions[choose(first, count, len(open_positions))]
            held["x"] = _input_rows(layer, x.detach(), count, lambda *_: held["positions"])[0]

    def join(stream: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            flat = stream.detach().reshape(count, -1)
            columns = writer.rows[held["positions"]].to(flat.device)
            s = flat.gather(1, columns.flatten(1)).view(columns.shape).permute(2, 0, 1).float()
            take(first, held["x"], s)
        raise StopForward

    with on_input(layer, hold):
        for first, run in runs:
            count = min(runs.batch_size, len(runs.samples) - first)
            with suppress(StopForward), Calls({writer.call: join}) as calls:
                run(calls)


def _input_rows(layer: Any, x: Tensor, count: int, choose: Callable[[int, int], Tensor]) -> Tensor:
    """An operator's input rows at chosen positions of ``count`` samples, ``(G, d, count, p)``."""
    if not hasattr(layer, "kernel_size"):
        # Windows of one sample stand one after another on the first axis.
        rows = x.reshape(count, -1, x.shape[-1])
        at = choose(rows.shape[1], x.shape[-1]).to(x.device)
        return rows.gather(1, at[:, :, None].expand(-1, -1, x.shape[-1])).permute(2, 0, 1).float()[None]
    columns = columns_of(layer)[1]
    chosen: list[Tensor] = []

    def positions(total: int) -> Tensor:
        chosen.append(choose(total, columns))
        return chosen[0]

    rows = reader_rows(layer, x, positions)
    return rows.float().reshape(conv_groups(layer), rows.shape[1], count, -1)
