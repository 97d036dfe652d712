"""Collect the moments of every reader while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from modhifi.calibration.accumulator import Accumulator
from modhifi.calibration.cache import StoredSums
from modhifi.calibration.distributed import ALONE, InStep, Processes
from modhifi.calibration.moments import Moments
from modhifi.calibration.routed import RoutedSums, watched
from modhifi.calibration.sampling import Sampling
from modhifi.models.hooks import attached, batch_statistics, on_input
from modhifi.structure.stacked import Stacked


class MomentCollector:
    """Owns forward hooks on readers and accumulates their moments while the model runs.

    Use as a context manager; call :meth:`start` before each batch with the number of its first sample, of ``samples``
    in all.
    """

    def __init__(
        self, readers: Mapping[str, nn.Module], sampling: Sampling, *, samples: int, team: Processes = ALONE
    ) -> None:
        self.readers, self.sampling, self.samples = readers, sampling, samples
        self.first = 0
        self.keep: Tensor | None = None
        self.sums = {name: Accumulator() for name, module in readers.items() if not isinstance(module, Stacked)}
        self.routed = {
            name: RoutedSums(module.experts) for name, module in readers.items() if isinstance(module, Stacked)
        }
        self.step = InStep(self.sums, samples, sampling.batch_size, team)
        self._hooks = ExitStack()

    def start(self, first: int, keep: Tensor | None = None) -> None:
        """Announce the batch from sample number ``first`` on; ``keep`` as in :meth:`Sampling.rows`."""
        self.first, self.keep = first, keep
        self.step.start(first)

    def __enter__(self) -> MomentCollector:
        hooks = [on_input(self.readers[name], partial(self._add, name)) for name in self.sums]
        stacks = {name: module for name, module in self.readers.items() if isinstance(module, Stacked)}
        routed = (h for name, s in self.routed.items() for h in watched(stacks[name], s.add, partial(self._begin, s)))
        self._hooks.enter_context(attached([*hooks, *routed]))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _add(self, name: str, x: Tensor) -> None:
        rows, sums = self.sampling.rows(self.readers[name], x, self.first, self.samples, self.keep), self.sums[name]
        if sums.expected is None:
            batch = min(self.sampling.batch_size, self.samples - self.first)
            sums.expected = rows.shape[2] * self.samples // batch
        sums.add(rows)

    def _begin(self, sums: RoutedSums, tokens: int) -> None:
        sums.begin(tokens, self.keep)

    def moments(self) -> dict[str, Moments]:
        """The moments of every reader that has run; spends the sums."""
        self.step.agree()
        return {name: sums.finish() for name, sums in (self.sums | self.routed).items() if sums.n}


@torch.no_grad()
def collect(
    model: nn.Module,
    run: Callable[[Tensor], object],
    batches: Iterable[Tensor],
    readers: Mapping[str, nn.Module],
    sampling: Sampling,
    *,
    samples: int,
    numbers: Iterable[int] | None = None,
    real: Callable[[Tensor], Tensor | None] = lambda batch: None,
    use_batch_statistics: bool = False,
    stored: StoredSums | None = None,
    team: Processes = ALONE,
) -> dict[str, Moments]:
    """Moments of every reader over ``batches`` of model-ready inputs, in one forward pass each.

    ``run(batch)`` runs the model; ``numbers`` says the number of each batch's first sample where they are not all of
    them; ``real(batch)`` which of a batch's tokens count, as `LoadedModel.real_tokens` does. Of a ``team`` the moments
    are those of this process's batches. Raises nothing of its own; a reader that was never called is missing from the
    result.
    """
    collector = MomentCollector(readers, sampling, samples=samples, team=team)
    first = 0
    if stored is not None:
        stored.restore(collector.sums, readers)
        first = stored.done
    with collector, batch_statistics(model, use_batch_statistics):
        for batch, number in zip(batches, repeat(None) if numbers is None else numbers, strict=False):
            first = first if number is None else number
            collector.start(first, real(batch))
            run(batch)
            first += len(batch)
            if stored is not None:
                stored.keep(collector.sums, first)
    return collector.moments()
