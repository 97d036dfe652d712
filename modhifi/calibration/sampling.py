"""Which samples and positions moments are taken from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from modhifi.calibration.im2col import output_rows, reader_rows, spread_positions
from modhifi.structure.operators import columns_of

# Narrow readers see at least this many rows in all: pixels are far from Gaussian, and a few hundred of them overfit.
LEAST_ROWS = 4096


@dataclass(frozen=True)
class Sampling:
    """How calibration samples are run and looked at.

    With ``rows_per_column`` r a reader of d columns looks at ``ceil(max(r d, 4096) / samples)`` positions of each
    sample: a Gram of d columns needs a small multiple of d rows, not every position of every image. None looks at all
    of them. ``batch_size`` samples run at a time, and ``seed`` decides which positions are looked at.
    """

    rows_per_column: int | None = 2
    batch_size: int = 32
    seed: int = 0

    def rows(self, module: nn.Module, x: Tensor, first: int, samples: int, keep: Tensor | None = None) -> Tensor:
        """The rows ``(G, d, r)`` of a reader's input ``x`` that are looked at, for the batch from sample ``first`` on.

        ``samples`` in all; ``keep`` as in :func:`reader_rows`.
        """
        x = x.detach() if x.requires_grad else x
        return reader_rows(module, x, lambda total: self.positions(module, x, total, first, samples), keep)

    def output_rows(self, module: nn.Module, y: Tensor, first: int, samples: int, keep: Tensor | None = None) -> Tensor:
        """What a reader puts out for the rows that :meth:`rows` takes, ``(G, out / G, r)``; ``y`` is its output."""
        y = y.detach() if y.requires_grad else y
        return output_rows(module, y, lambda total: self.positions(module, y, total, first, samples), keep)

    def positions(self, module: nn.Module, x: Tensor, total: int, first: int, samples: int) -> Tensor | None:
        """Which of the ``total`` rows of each sample to look at, int64 ``(batch, p)``; None for all.

        ``x`` is the input, or the output, of a reader ``module`` for the batch from sample number ``first`` on, of
        ``samples`` in all.
        """
        if self.rows_per_column is None:
            return None
        wanted = math.ceil(max(self.rows_per_column * columns_of(module)[1], LEAST_ROWS) / samples)
        return None if wanted >= total else spread_positions(total, wanted, first, len(x), self.seed, x.device)
