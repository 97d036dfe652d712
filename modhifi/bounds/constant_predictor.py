"""The constant predictor, which ignores its input: its error is the scale against which a bound is informative."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi.models.loaded import PADDING

# Rows of logits that are processed at once, times classes: bounds the copies of them to some 100 MB.
CHUNK_ELEMENTS = 4_000_000
# Sequences that are kept: enough to estimate the error of one constant output.
CONSTANT_SEQUENCES = 16


def single(logits: Tensor) -> Tensor:
    """Logits in their own precision, or in single where that is less."""
    return logits if logits.dtype == torch.float64 else logits.float()


def rows_at_once(classes: int) -> int:
    """The number of rows of logits that are processed at once."""
    return max(1, CHUNK_ELEMENTS // classes)


@dataclass(frozen=True)
class Constant:
    """The error of the best constant predictor of the original's outputs.

    ``flips``: share of positions whose top-1 is not the most frequent class. ``total_variation``: mean distance from
    the mean softmax. ``errors``: Euclidean distance of each output from the mean output, float64 ``(m,)``. ``nll``:
    by how many nats the mean softmax predicts the next tokens worse than the original; NaN without next tokens.
    """

    flips: float
    total_variation: float
    errors: Tensor
    nll: float = math.nan

    @property
    def error(self) -> float:
        """The root mean square error of the mean output."""
        return float(self.errors.square().mean().sqrt())


class OriginalOutputs:
    """The outputs of the original that determine the best constant predictor: all of images, few of sequences."""

    def __init__(self) -> None:
        # Rows (positions, classes) as they are, the token that follows each, and how many rows each unit has.
        self.rows: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.counts: list[int] = []

    def add(self, outputs: Tensor, real: Tensor, targets: Tensor) -> None:
        """Adds the outputs (b, ..., classes) of a batch.

        ``real``, bool (b, p), marks the positions that are no padding; ``targets``, int64 (b, p), is the token that
        follows each.
        """
        few = len(outputs) if outputs.ndim == 2 else CONSTANT_SEQUENCES - len(self.counts)
        if few > 0:
            real = real[:few]
            self.rows.append(outputs[:few].reshape(*real.shape, -1)[real])
            self.targets.append(targets[:few][real])
            self.counts += real.sum(1).tolist()

    def constant(self, nll: Tensor) -> Constant:
        """The error of the best constant predictor; ``nll`` is the original's mean loss in nats, float64 (n,)."""
        classes = self.rows[0].shape[-1]
        chunks = [chunk for rows in self.rows for chunk in rows.split(rows_at_once(classes))]
        count = sum(self.counts)
        top = torch.cat([chunk.argmax(-1) for chunk in chunks])
        wide = torch.float64
        mean = torch.stack([single(c).softmax(-1).sum(0, dtype=wide) for c in chunks]).sum(0) / count
        centre = torch.stack([c.sum(0, dtype=wide) for c in chunks]).sum(0) / count
        gaps = [(single(c).softmax(-1) - mean.to(single(c).dtype)).abs().sum(-1, dtype=wide) for c in chunks]
        variation = (torch.cat(gaps) / 2).clamp(0, 1)
        squared = torch.cat([(single(c) - centre.to(single(c).dtype)).square().sum(-1, dtype=wide) for c in chunks])
        targets = torch.cat(self.targets)
        has_next = targets != PADDING
        losses = torch.where(has_next, -mean.log()[targets.clamp(min=0)], 0.0)
        constant_nll = self._by_unit(losses) / self._by_unit(has_next.double())
        return Constant(
            1 - int(top.bincount().max()) / count,
            float((self._by_unit(variation) / torch.tensor(self.counts)).mean()),
            self._by_unit(squared).sqrt(),
            float((constant_nll - nll[: len(self.counts)]).nanmean()),
        )

    def _by_unit(self, values: Tensor) -> Tensor:
        units = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        return torch.zeros(len(self.counts), dtype=torch.float64).index_add(0, units, values.cpu())
