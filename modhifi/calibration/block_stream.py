"""Run a model block by block: what leaves a block is all that is kept, and one block's Grams all that is measured.

The blocks are a list of modules of one class that a forward pass runs once each, in order: a transformer's layers. The
model's own code calls every block, so each gets the masks and positions it gets in a whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from modhifi.calibration.collect import MomentCollector
from modhifi.calibration.moments import Moments
from modhifi.models.hooks import standing_in
from modhifi.models.loaded import real_tokens
from modhifi.models.offload import staying


class _Reached(Exception):
    """Ends a pass behind the block that was to run: what follows is not needed."""


def find_blocks(model: nn.Module, run: Callable[[], object]) -> tuple[str, ...]:
    """Names of the blocks, the longest such list that ``run()`` runs once each and in order; empty if there is none."""
    lists = [
        [f"{name}.{i}".lstrip(".") for i in range(len(module))]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(m) for m in module}) == 1
    ]
    calls: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: calls.append(name))
        for names in lists
        for name in names
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    best: list[str] = []
    for names in lists:
        if len(names) > len(best) and [c for c in calls if c in set(names)] == names:
            best = names
    return tuple(best)


class Stream:
    """One pass over all batches that has come as far as some block: ``outputs`` has what it put out, on the CPU."""

    def __init__(self, model: nn.Module, blocks: tuple[str, ...], run: Callable[[Tensor], object]) -> None:
        self.blocks = [model.get_submodule(name) for name in blocks]
        self.run = run
        self.device = next(model.parameters()).device  # offloaded blocks are elsewhere
        self.at = 0
        self.outputs: list[Any] = []

    @torch.no_grad()
    def advance(self, batches: Iterable[Tensor], before: Callable[[Tensor], None] = lambda batch: None) -> None:
        """Run the next block on every batch; ``batches`` are the same each time. ``before(batch)`` is called first."""
        block = self.blocks[self.at]
        with staying([block], self.device):
            self._through(block, batches, before)
        self.at += 1

    def _through(self, block: nn.Module, batches: Iterable[Tensor], before: Callable[[Tensor], None]) -> None:
        for number, batch in enumerate(batches):
            before(batch)
            previous = self.outputs[number] if self.at else None
            with _giving(self.blocks[: self.at], previous), _stopping_behind(block) as found:
                try:
                    self.run(batch)
                except _Reached:
                    pass
            output = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, found[0])
            if self.at:
                self.outputs[number] = output
            else:
                self.outputs.append(output)


def _giving(blocks: list[nn.Module], value: Any) -> AbstractContextManager[None]:
    """Inside, the blocks give ``value`` and compute nothing; only the last one's matters."""

    def give(*args: Any, **kwargs: Any) -> Any:
        near = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        return tree_map(lambda v: v.to(near.device) if isinstance(v, Tensor) and near is not None else v, value)

    return standing_in(dict.fromkeys(blocks, give))


@contextmanager
def _stopping_behind(block: nn.Module) -> Iterator[list[Any]]:
    found: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)
        raise _Reached

    handle = block.register_forward_hook(stop)
    try:
        yield found
    finally:
        handle.remove()


def moments_by_block(
    model: nn.Module,
    blocks: tuple[str, ...],
    run: Callable[[Tensor], object],
    batches: Callable[[], Iterable[Tensor]],
    readers: dict[str, nn.Module],
    *,
    samples: int,
    rows_per_column: int | None,
    seed: int,
) -> Iterator[dict[str, Moments]]:
    """Moments of the readers inside one block after the other, in one pass in all.

    ``batches()`` starts over at every block. Memory: one block's Grams and what one block puts out for all batches.
    Edits of a block that has been yielded do not reach the next one: the pass is the one of the model as it was.
    """
    stream = Stream(model, blocks, run)
    for name in blocks:
        inside = {reader: m for reader, m in readers.items() if reader.startswith(f"{name}.")}
        collector = MomentCollector(inside, samples=samples, rows_per_column=rows_per_column, seed=seed)
        first = 0

        def start(batch: Tensor, collector: MomentCollector = collector) -> None:
            nonlocal first
            collector.start(first, real_tokens(batch))
            first += len(batch)

        with collector:
            stream.advance(batches(), start)
        yield collector.moments()
