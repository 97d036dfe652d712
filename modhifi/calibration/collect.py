"""Collect the moments of every reader while a model runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modhifi.calibration.im2col import reader_rows, spread_positions
from modhifi.calibration.moments import LEAST_ROWS, Accumulator, Moments
from modhifi.models.hooks import batch_statistics, only_input
from modhifi.models.loaded import real_tokens

if TYPE_CHECKING:
    from modhifi.calibration.cache import StoredSums


class MomentCollector:
    """Owns forward hooks on readers and accumulates their moments while the model runs.

    Use as a context manager; call :meth:`start` before each batch with the number of its first sample. With
    ``rows_per_column`` r and ``samples`` in all, a reader of d columns looks at ``ceil(max(r d, 4096) / samples)``
    positions per sample (all of them where the sample has fewer): a Gram of d columns needs a small multiple of d
    rows, not every position of every image.
    """

    def __init__(
        self, readers: dict[str, nn.Module], *, samples: int, rows_per_column: int | None = None, seed: int = 0
    ) -> None:
        self.readers = readers
        self.samples = samples
        self.rows_per_column = rows_per_column
        self.seed = seed
        self.first = 0
        self.keep: Tensor | None = None
        self.sums = {name: Accumulator() for name in readers}
        self.handles: list[Any] = []

    def start(self, first: int, keep: Tensor | None = None) -> None:
        self.first, self.keep = first, keep

    def __enter__(self) -> MomentCollector:
        for name, module in self.readers.items():
            see = partial(self._see, name)
            self.handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, named, see=see: see(m, only_input(args, named)), with_kwargs=True
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def positions(self, module: nn.Module, x: Tensor, total: int) -> Tensor | None:
        """Which of an input's ``total`` rows per sample to look at, int64 ``(batch, p)``; None for all."""
        if self.rows_per_column is None:
            return None
        columns = module.get_parameter("weight")[0].numel() if hasattr(module, "kernel_size") else x.shape[-1]
        wanted = math.ceil(max(self.rows_per_column * columns, LEAST_ROWS) / self.samples)
        return None if wanted >= total else spread_positions(total, wanted, self.first, len(x), self.seed)

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        x = x.detach()
        rows = reader_rows(module, x, lambda total: self.positions(module, x, total), self.keep)
        self.sums[name].add(rows)

    def moments(self) -> dict[str, Moments]:
        return {name: sums.finish() for name, sums in self.sums.items() if sums.n}


@torch.no_grad()
def collect(
    model: nn.Module,
    run: Any,
    batches: Iterable[Tensor],
    readers: dict[str, nn.Module],
    *,
    numbers: Iterable[int] | None = None,
    samples: int,
    rows_per_column: int | None = None,
    use_batch_statistics: bool = False,
    seed: int = 0,
    stored: StoredSums | None = None,
) -> dict[str, Moments]:
    """Moments of every reader over ``batches`` of model-ready inputs, in one forward pass each.

    ``run(batch)`` runs the model; ``numbers`` says the number of each batch's first sample where they are not all of
    them. Raises nothing of its own; a reader that was never called is missing from the result.
    """
    collector = MomentCollector(readers, samples=samples, rows_per_column=rows_per_column, seed=seed)
    first = 0
    if stored is not None:
        stored.restore(collector.sums, readers)
        first = stored.done
    with collector, batch_statistics(model, use_batch_statistics):
        for batch, number in zip(batches, repeat(None) if numbers is None else numbers, strict=False):
            first = first if number is None else number
            collector.start(first, real_tokens(batch))
            run(batch)
            first += len(batch)
            if stored is not None:
                stored.keep(collector.sums, first)
    return collector.moments()
