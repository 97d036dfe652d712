"""The original as a teacher: its outputs and those of its blocks, kept in memory where they come again and fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from modhifi.calibration.memory import free_bytes
from modhifi.healing.blocks import Match, Watch
from modhifi.models.loaded import LoadedModel

# The share of the free memory that kept outputs may take.
SHARE = 0.25


class Teacher:
    """The outputs of ``original``, and what those of its ``blocks`` should be in a student, on ``count`` samples.

    With ``keep`` those of a sample are computed once, if all of them fit into memory and have one shape. ``autocast``
    makes the context in which the original runs: in full precision it would take longer than a student in half.
    """

    def __init__(
        self,
        original: LoadedModel,
        blocks: Mapping[str, Match],
        count: int,
        keep: bool,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.original, self.blocks, self.count, self.autocast = original, blocks, count, autocast
        self.keep = keep
        self.kept: list[Tensor] = []
        self.known = torch.zeros(count, dtype=torch.bool)

    @torch.no_grad()
    def outputs(self, batch: Tensor, indices: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output on a batch, made of the samples at ``indices``, and those of the blocks, on the model's device."""
        chosen = torch.tensor(indices)
        if self.kept and bool(self.known[chosen].all()):
            device = next(self.original.model.parameters()).device
            first, *others = (tensor[chosen].to(device) for tensor in self.kept)
            return first, tuple(others)
        with Watch(self.original.model, tuple(self.blocks)) as watch, self.autocast():
            output = self.original.logits(batch)
            seen = zip(self.blocks.values(), watch.take(), strict=True)
            outputs = (output, *(match.part_of(whole) for match, whole in seen))
        if self.keep and not self.kept:
            self._make_room(outputs)
        padded = self.original.real_tokens(batch) is not None
        if padded or (self.kept and self.kept[0].shape[1:] != outputs[0].shape[1:]):
            self.keep, self.kept = False, []  # texts of several lengths
        if self.kept:
            for kept, tensor in zip(self.kept, outputs, strict=True):
                kept[chosen] = tensor.to(kept.device)
            self.known[chosen] = True
        return outputs[0], outputs[1:]

    def _make_room(self, outputs: Sequence[Tensor]) -> None:
        needed = sum(self.count * tensor[0].nbytes for tensor in outputs)
        self.keep = needed <= SHARE * free_bytes(torch.device("cpu"))
        if self.keep:
            self.kept = [torch.empty(self.count, *tensor.shape[1:], dtype=tensor.dtype) for tensor in outputs]
