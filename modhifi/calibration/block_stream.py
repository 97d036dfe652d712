"""Run a model block by block, with one block's outputs in memory and one block's Grams.

The blocks are a list of modules of one class that a forward pass runs once each, in order: a transformer's layers. The
model's own code calls every block, so each gets the masks and positions that it gets in a whole pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from modhifi.calibration.collect import MomentCollector
from modhifi.calibration.distributed import ALONE, Processes
from modhifi.calibration.moments import Moments
from modhifi.calibration.prefix_cache import PrefixCache
from modhifi.calibration.sampling import Sampling
from modhifi.calibration.timeline import Timeline
from modhifi.models.hooks import stop_behind
from modhifi.models.loaded import real_tokens
from modhifi.models.offload import staying


def find_blocks(timeline: Timeline) -> tuple[str, ...]:
    """Names of the blocks, the longest such list that ran once each and in order; empty if there is none."""
    longest: list[str] = []
    for name, module in timeline.model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(m) for m in module}) == 1:
            blocks = [f"{name}.{i}".lstrip(".") for i in range(len(module))]
            spans = [timeline.spans.get(block) for block in blocks]
            begins = [span.begin for span in spans if span is not None and span.times == 1]
            if len(blocks) > len(longest) and len(begins) == len(blocks) and begins == sorted(begins):
                longest = blocks
    return tuple(longest)


class Stream:
    """One pass over all batches, block by block: the outputs of the block that it has come to are on the CPU."""

    def __init__(
        self, model: nn.Module, blocks: tuple[str, ...], run: Callable[[Tensor], object], timeline: Timeline
    ) -> None:
        self.model, self.blocks = model, blocks
        self.cache = PrefixCache(model, run, timeline, among=blocks, home=torch.device("cpu"), most_bytes=math.inf)
        self.at = 0

    def advance(self, batches: Iterable[Tensor], before: Callable[[Tensor], None] = lambda batch: None) -> None:
        """Run the next block on every batch; ``batches`` are the same each time. ``before(batch)`` is called first."""
        block = self.model.get_submodule(self.blocks[self.at])
        self.at += 1
        self.cache.advance(self.blocks[self.at :])
        with staying([block], self.cache.device):
            for number, batch in enumerate(batches):
                before(batch)
                with stop_behind(block):
                    self.cache.run(number, batch)


def moments_by_block(
    stream: Stream,
    batches: Sequence[Tensor],
    readers: Mapping[str, nn.Module],
    sampling: Sampling,
    *,
    samples: int,
    numbers: Sequence[int] | None = None,
    team: Processes = ALONE,
) -> Iterator[dict[str, Moments]]:
    """Moments of the readers inside one block after the other, in one pass in all.

    ``numbers`` and ``team`` as in :func:`modhifi.calibration.collect.collect`.
    Memory: one block's Grams and what one block puts out for all batches.
    Edits of a block that has been yielded do not reach the next one: the pass is the one of the model as it was.
    """
    if numbers is None:
        numbers = [0, *accumulate(map(len, batches))][:-1]
    for name in stream.blocks:
        inside = {reader: m for reader, m in readers.items() if reader.startswith(f"{name}.")}
        collector, firsts = MomentCollector(inside, sampling, samples=samples, team=team), iter(numbers)

        def start(batch: Tensor, collector: MomentCollector = collector, firsts: Iterator[int] = firsts) -> None:
            collector.start(next(firsts), real_tokens(batch))

        with collector:
            stream.advance(batches, start)
        yield collector.moments()
