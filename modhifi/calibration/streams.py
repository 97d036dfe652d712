"""What removed branches added to the stream, beside what the writer before them reads: moments of both together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from modhifi.calibration.accumulator import Accumulator
from modhifi.calibration.moments import Moments
from modhifi.calibration.sampling import Sampling
from modhifi.data.samples import Samples
from modhifi.models.hooks import attached, batch_statistics, on_input
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.structure.depth import Span
from modhifi.structure.operators import outputs_of
from modhifi.structure.tracing.branches import Additions


class SpanRows:
    """Takes the rows of one span from every batch that runs, and adds up their products in ``sums``."""

    def __init__(self, model: nn.Module, span: Span, sampling: Sampling, samples: int) -> None:
        self.writer, self.place = model.get_submodule(span.keeper.writer), span.keeper.place
        self.sampling, self.samples = sampling, samples
        self.sums = Accumulator()
        self.first = 0
        self.keep: Tensor | None = None

    def start(self, first: int, keep: Tensor | None) -> None:
        """Announce the batch from sample number ``first`` on; ``keep`` as in :meth:`Sampling.rows`."""
        self.first, self.keep = first, keep

    def read(self, x: Tensor) -> None:
        """What the writer reads."""
        self.input = x
        with torch._C.DisableTorchFunction():  # what is added up here is none of the model's additions
            self.rows = self.sampling.rows(self.writer, x, self.first, self.samples, self.keep).float().clone()

    def begin(self, stream: Tensor) -> None:
        """The stream behind the writer."""
        self.before = self._of_stream(stream)

    def end(self, stream: Tensor) -> None:
        """The stream behind the span."""
        self.sums.add(torch.cat([self.rows, self._of_stream(stream) - self.before], 1))
        del self.input, self.rows, self.before

    def _of_stream(self, stream: Tensor) -> Tensor:
        """The rows ``(1, o, r)`` of a stream at the positions of the input's rows, float32."""
        batch, outputs = len(stream), outputs_of(self.writer)
        if self.place is not None:
            rows = stream.reshape(batch, -1)[:, self.place.to(stream.device)]
        elif hasattr(self.writer, "kernel_size"):
            rows = stream.flatten(2).mT
        else:
            rows = stream.reshape(batch, -1, outputs)
        if self.keep is not None and self.keep.numel() == batch * rows.shape[1]:
            rows = rows.reshape(-1, outputs)[self.keep.reshape(-1).to(stream.device)]
        else:
            chosen = self.sampling.positions(self.writer, self.input, rows.shape[1], self.first, self.samples)
            if chosen is not None:
                rows = rows[torch.arange(batch, device=stream.device)[:, None], chosen]
        return rows.reshape(1, -1, outputs).mT.float().clone()


@torch.no_grad()
def span_moments(
    loaded: LoadedModel, spans: Iterable[Span], samples: Samples, sampling: Sampling, progress: Progress = silent
) -> dict[tuple[str, str], Moments]:
    """For each span the moments of rows ``[x, Δ]``, ``(1, d + o, d + o)``, in one pass per sample for all of them.

    ``x`` is what the writer before the span reads, d columns, and ``Δ`` what the span adds to the stream where that
    writer writes, o channels. They go by the spans' names, and lie where the writer's weights lie.
    """
    spans = list({span.name: span for span in spans}.values())
    if not spans:
        return {}
    model, callbacks = loaded.model, defaultdict[tuple[str, int], list[Callable[[Tensor], None]]](list)
    watched = [SpanRows(model, span, sampling, len(samples)) for span in spans]
    for span, rows in zip(spans, watched, strict=True):
        last = span.removed[-1]
        callbacks[span.keeper.where, span.keeper.number].append(rows.begin)
        callbacks[last.where, last.number].append(rows.end)

    def call(own: Sequence[Callable[[Tensor], None]], stream: Tensor) -> None:
        for callback in own:
            callback(stream)

    hooks = [on_input(rows.writer, rows.read) for rows in watched]
    additions = Additions(model, {at: partial(call, own) for at, own in callbacks.items()})
    first, total = 0, len(samples)
    with attached(hooks), additions, batch_statistics(model, samples.adapted):
        for batch in samples.batches(sampling.batch_size):
            progress("measuring depth", first, total)
            for rows in watched:
                rows.start(first, loaded.real_tokens(batch))
            loaded.run(batch)
            first += len(batch)
    progress("measuring depth", total, total)
    return {
        span.name: rows.sums.finish().to(next(rows.writer.parameters()).device)
        for span, rows in zip(spans, watched, strict=True)
    }
