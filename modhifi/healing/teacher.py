"""The original as a teacher: its outputs and those of its blocks, kept where they come again and fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.healing.blocks import Match, Watch
from modhifi.healing.kept import Kept, room_for
from modhifi.models.loaded import LoadedModel


class Teacher:
    """The outputs of ``original``, and what those of its ``blocks`` should be in a student, on ``count`` samples.

    With ``keep`` those of a sample are computed once, if all of them fit into memory or on the disk and have one shape;
    of a language model what its head reads is kept in place of the logits, which are a vocabulary wide. ``autocast``
    makes the context in which the original runs: in full precision it would take longer than a student in half. Each of
    the ``processes`` of a run keeps for itself. ``blocks`` loses those without one row for each item.
    """

    def __init__(
        self,
        original: LoadedModel,
        blocks: Mapping[str, Match],
        count: int,
        keep: bool,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        processes: int = 1,
    ) -> None:
        self.original, self.blocks, self.count, self.autocast = original, dict(blocks), count, autocast
        self.processes = processes
        self.keep, self.head = keep, _head(original.model)
        self.kept: Kept | None = None
        self.shape = torch.Size()
        self.known = torch.zeros(count, dtype=torch.bool)

    @torch.no_grad()
    def outputs(self, batch: Tensor, indices: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output on a batch, made of the samples at ``indices``, and those of the blocks, on the model's device."""
        if self.kept is not None and bool(self.known[torch.tensor(indices)].all()):
            try:
                return self._remembered(self.kept, indices)
            except OSError:
                self.keep, self.kept = False, None
        read: list[Tensor] = []
        watched = [] if self.head is None else [self.head.register_forward_pre_hook(lambda _, x: read.extend(x[:1]))]
        try:
            with Watch(self.original.model, tuple(self.blocks)) as watch, self.autocast():
                output = self.original.logits(batch)
                self.drop(watch.let_go(len(batch)))
                seen = zip(self.blocks.values(), watch.take(), strict=True)
                blocks = tuple(self._rounded(match.part_of(whole)) for match, whole in seen)
        finally:
            for hook in watched:
                hook.remove()
        if self.keep:
            self._remember(batch, indices, output, read, blocks)
        return output, blocks

    def drop(self, names: Iterable[str]) -> None:
        """Compares some blocks no more; what was kept with them is computed anew."""
        for name in names:
            del self.blocks[name]
            self.kept, self.known = None, torch.zeros_like(self.known)

    def _remembered(self, kept: Kept, indices: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        device = next(self.original.model.parameters()).device
        first, *others = (tensor.to(device) for tensor in kept.get(indices))
        with self.autocast():
            return first if self.head is None else self.head(first), tuple(others)

    def _remember(
        self, batch: Tensor, indices: Sequence[int], output: Tensor, read: Sequence[Tensor], blocks: Sequence[Tensor]
    ) -> None:
        """Keeps what was put out; nothing from then on where samples have several lengths or there is no room."""
        if self.kept is None:
            self.head = self.head if len(read) == 1 and self._makes(read[0], output) else None
        first = output if self.head is None else read[0]
        if self.kept is None:
            self.kept = room_for(self.count, (first, *blocks), self.processes)
            self.shape = first.shape[1:]
        padded = self.original.real_tokens(batch) is not None
        try:
            if padded or self.kept is None or first.shape[1:] != self.shape:
                raise OSError
            self.kept.put(indices, (first, *blocks))
        except OSError:
            self.keep, self.kept = False, None
        else:
            self.known[torch.tensor(indices)] = True

    def _makes(self, read: Tensor, output: Tensor) -> bool:
        """Whether the head makes the output of what it read; logits may be scaled, capped or cast behind it."""
        with self.autocast():
            made = None if self.head is None else self.head(read)
        return made is not None and made.dtype == output.dtype and torch.equal(made, output)

    def _rounded(self, block: Tensor) -> Tensor:
        """In bfloat16 where products are: a sum of them is no more exact, and half as large."""
        kind = block.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        return block.bfloat16() if half else block


def _head(model: nn.Module) -> nn.Module | None:
    """What makes logits of a language model's last hidden states."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None
