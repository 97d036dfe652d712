"""Compensate one reader after the other, each on the inputs that the already pruned prefix produces."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from modhifi.calibration.moments import Accumulator, Moments
from modhifi.calibration.prefix_cache import MOST_BYTES, PrefixCache
from modhifi.calibration.sampling import Sampling
from modhifi.calibration.timeline import Timeline
from modhifi.data.samples import Samples
from modhifi.errors import IndefiniteError
from modhifi.models.hooks import batch_statistics, stop_before
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.compensations.lstsq import least_squares_towards
from modhifi.pruning.editing import LayerError
from modhifi.pruning.linalg import mean_diagonal, shrinkage, shrunk
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.clone import clone
from modhifi.structure.groups import Structure
from modhifi.structure.operators import absorb_mean, kernel_size, weight_matrix, write_weight
from modhifi.structure.plan import Plan
from modhifi.structure.recurrent import operator_at
from modhifi.structure.surgery import removed_positions


def written_modules(structure: Structure, readers: Iterable[str]) -> list[str]:
    """The modules that compensating some readers writes to: they themselves and the BatchNorms that take their mean."""
    names = []
    for reader in readers:
        sink = structure.operators[reader].sink
        names += [reader] if sink in (None, "bias") else [reader, str(sink)]
    return names


class PairedPasses:
    """The dense model and its ``edited`` copy run on the same batches, from the first reader on that is still to edit.

    What comes before is remembered for each of them, in ``most_bytes`` for both; :meth:`advance` moves on.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        edited: nn.Module,
        samples: Samples,
        sampling: Sampling,
        most_bytes: float = MOST_BYTES,
    ) -> None:
        self.loaded, self.dense, self.edited = loaded, loaded.model, edited
        self.samples, self.sampling = samples, sampling
        timeline = Timeline(loaded.model, lambda: loaded.logits(loaded.example))
        self.caches = [
            PrefixCache(model, partial(loaded.logits, model=model), timeline, most_bytes=most_bytes / 2)
            for model in (self.dense, edited)
        ]

    def advance(self, written: Iterable[str]) -> None:
        """Say that only the modules ``written`` are still to be edited."""
        written = list(written)
        for cache in self.caches:
            cache.advance(written)

    @torch.no_grad()
    def moments(self, reader: str) -> Moments:
        """Moments of a reader's inputs in both models side by side: columns ``[x_dense, x_edited]``, ``(G, 2d, 2d)``.

        They lie where the reader's weights lie.
        """
        sums, first, adapted = Accumulator(), 0, self.samples.adapted
        with batch_statistics(self.dense, adapted), batch_statistics(self.edited, adapted):
            for batch in self.samples.batches(self.sampling.batch_size):
                rows = [self._rows(cache, reader, first, batch) for cache in self.caches]
                sums.add(torch.cat(rows, 1))
                first += len(batch)
        return sums.finish().to(next(operator_at(self.edited, reader).parameters()).device)

    def _rows(self, cache: PrefixCache, reader: str, first: int, batch: Tensor) -> Tensor:
        module = operator_at(cache.model, reader)
        with stop_before(module) as inputs:
            cache.run(first, batch)
        return self.sampling.rows(module, inputs[0], first, len(self.samples), self.loaded.real_tokens(batch))


def edit_sequentially(
    loaded: LoadedModel,
    structure: Structure,
    plan: Plan,
    samples: Samples,
    settings: PruneSettings,
    progress: Progress = silent,
) -> tuple[nn.Module, tuple[LayerError, ...]]:
    """A copy of the model in its own shapes with every touched reader compensated in order of execution.

    ``settings.sequential`` is ``own``: the layer's dense weights applied to the pruned prefix; or ``dense``: the dense
    model's output (docs/method.md, sequential).
    """
    edited = clone(loaded.model)
    removed = {name: at for (name, role), at in removed_positions(structure, plan).items() if role == "reader"}
    readers = [name for name in structure.operators if name in removed]
    passes = PairedPasses(loaded, edited, samples, settings.sampling)
    errors = []
    for number, reader in enumerate(readers):
        progress("compensating", number, len(readers))
        passes.advance(written_modules(structure, readers[number:]))
        both = passes.moments(reader)
        try:
            errors.append(_compensate(edited, structure, reader, removed[reader], both, settings))
        except IndefiniteError:
            raise IndefiniteError(structure.read_by(reader)) from None
    progress("compensating", len(readers), len(readers))
    return edited, tuple(errors)


def _compensate(
    edited: nn.Module, structure: Structure, reader: str, removed: Tensor, both: Moments, settings: PruneSettings
) -> LayerError:
    """Write a reader's new weights for the loss of the input channels ``removed``, from the moments of both models."""
    module, sink = operator_at(edited, reader), structure.operators[reader].sink
    weight = weight_matrix(module)
    groups, _, d = weight.shape
    kernel = kernel_size(module)
    channels = torch.ones(groups * d // kernel, dtype=torch.bool)
    channels[removed] = False
    kept = channels.view(groups, -1).repeat_interleave(kernel, 1).to(weight.device)
    joint = both.cov if sink is not None else both.gram
    # which input the layer should answer to: the dense model's, or the pruned prefix's own
    want, own = slice(0, d) if settings.sequential == "dense" else slice(d, 2 * d), slice(d, 2 * d)
    share, scale = shrinkage(joint[:, own, own], both.n), mean_diagonal(joint[:, own, own])
    solved_cross, solved_own = shrunk(joint[:, want, own], share, scale), shrunk(joint[:, own, own], share, scale)
    parts = zip(weight, solved_cross, solved_own, kept, strict=True)
    result = torch.stack([least_squares_towards(*part, settings.ridge) for part in parts])
    write_weight(module, result)
    stored, error, energy = weight_matrix(module), 0.0, 0.0  # rounded to the model's type
    for g in range(groups):
        cross, second, goal = joint[g, want, own], joint[g, own, own], joint[g, want, want]
        gain = float(((weight[g] @ goal) * weight[g]).sum())
        error += gain + float(((stored[g] @ second - 2 * weight[g] @ cross) * stored[g]).sum())
        energy += gain
    if sink is not None:
        shift = (weight @ both.mean[:, want, None] - result @ both.mean[:, own, None]).reshape(-1)
        absorb_mean(edited, reader, sink, shift)
    return LayerError(reader, max(0.0, error), energy)
