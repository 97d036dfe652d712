"""Compensate one reader after the other, each on the inputs that the already pruned prefix produces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from modhifi.calibration.accumulator import Accumulator
from modhifi.calibration.distributed import ALONE, InStep, Processes, batches_at, gathered, merged_pairs, share_of
from modhifi.calibration.memory import loaded_once, place_to_remember
from modhifi.calibration.moments import Moments, PairedMoments, Spanned, combined_pairs
from modhifi.calibration.prefix_cache import PrefixCache
from modhifi.calibration.sampling import Sampling
from modhifi.calibration.timeline import Timeline
from modhifi.data.samples import Samples, examples_in
from modhifi.errors import IndefiniteError
from modhifi.models.hooks import Statistics, batch_statistics, on_input, shared_statistics, stop_before, stop_behind
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.compensations.lstsq import regression
from modhifi.pruning.editing import LayerError, edit_reader
from modhifi.pruning.linalg import mean_diagonal, shrinkage, shrunk
from modhifi.pruning.readers import second_of
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.groups import Structure
from modhifi.structure.operators import absorb_mean, columns_of, kernel_size, weight_matrix, write_weight
from modhifi.structure.places import operator_at
from modhifi.structure.recurrent import Gates
from modhifi.structure.stacked import Stacked


def written_modules(structure: Structure, readers: Iterable[str]) -> list[str]:
    """The modules that compensating some readers writes to: they themselves and the BatchNorms that take their mean."""
    names = []
    for reader in readers:
        sink = structure.operators[reader].sink
        names += [reader] if sink in (None, "bias") else [reader, str(sink)]
    return names


class PairedPasses:
    """The dense model and its ``edited`` copy run on the same batches side by side, each module once in each.

    Both stop at one of the ``readers`` after the other. What comes before is remembered, in ``most_bytes`` for both (a
    share of what is free); batches for which that is too little run again from the last point that is. Without
    ``dense`` the target of a reader is what it puts out itself on the edited prefix, and the edited copy runs alone. On
    synthetic samples both normalise by the batch statistics of the dense model
    (:func:`modhifi.models.hooks.shared_statistics`). Each process of a ``team`` runs its share of the batches.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        edited: nn.Module,
        readers: Iterable[str],
        samples: Samples,
        sampling: Sampling,
        dense: bool = True,
        most_bytes: float | None = None,
        team: Processes = ALONE,
    ) -> None:
        self.loaded, self.model, self.team = loaded, edited, team
        self.samples, self.sampling = loaded_once(samples, team.count), sampling
        timeline = Timeline(loaded.model, lambda: loaded.run(loaded.example))
        device = next(loaded.model.parameters()).device
        streams = 1 + dense
        needed = (
            streams * timeline.most_before(readers) * examples_in(samples, loaded) / len(loaded.example) / team.count
        )
        home, room = place_to_remember(device, needed, team.count)

        def cache(model: nn.Module) -> PrefixCache:
            run = partial(loaded.run, model=model)
            return PrefixCache(
                model, run, timeline, home=home, most_bytes=(room if most_bytes is None else most_bytes) / streams
            )

        self.seen: Statistics = {}
        self.edited, self.dense = cache(edited), cache(loaded.model) if dense else None

    def advance(self, written: Iterable[str], later: Iterable[str]) -> None:
        """Say that the modules ``written`` are still to be edited, and ``later`` all but those of the next reader."""
        self.edited.advance(written)
        if self.dense is not None and (later := list(later)):
            self.dense.advance(later)  # as far as the next reader: its output is seen on the way

    @torch.no_grad()
    def moments(self, reader: str, columns: Tensor, few_rows: bool = False) -> PairedMoments:
        """Moments of some ``columns`` int64 ``(G, k)`` of a reader's input in the edited model, and of its target.

        They lie where the reader's weights lie; with ``few_rows`` the covariance stands in the span of the rows.
        """
        module = self.model.get_submodule(reader)
        parts, first = list[tuple[float, PairedMoments]](), 0
        for share, source in self.samples.by_source():
            pairs = self._rows(reader, columns, source, first)
            first += len(source)
            if few_rows:
                rows, targets = (gathered(torch.cat(pieces, 2), self.team) for pieces in zip(*pairs, strict=True))
                paired = PairedMoments.of_rows(rows.double(), targets.double())
            else:
                sums = Accumulator(targets=len(weight_matrix(module)[0]))
                step = InStep({reader: sums}, len(source), self.sampling.batch_size, self.team)
                for number, (rows, targets) in zip(self._numbers(source), pairs, strict=True):
                    step.start(number)
                    sums.add(torch.cat([rows, targets], 1))
                step.agree()
                paired = merged_pairs(sums.finish_paired(), self.team)
            parts.append((share, paired))
        return combined_pairs(parts).to(next(module.parameters()).device)

    def _numbers(self, samples: Samples) -> Sequence[int]:
        """The numbers of the first samples of this process's batches."""
        return share_of(samples, self.sampling.batch_size, self.team)

    def _rows(self, reader: str, columns: Tensor, samples: Samples, before: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch by batch the rows that the moments are of, ``(G, k, r)``, and their targets, ``(G, out / G, r)``.

        They are those of one source, in front of which others have ``before`` samples.
        """
        numbers = self._numbers(samples)
        for first, batch in zip(numbers, batches_at(samples, self.sampling.batch_size, numbers), strict=True):
            with self._statistics(samples.adapted, before + first):
                rows, targets = self._pair(reader, samples, first, before, batch)
            groups = torch.arange(len(rows), device=rows.device)[:, None]
            yield rows[groups, columns.to(rows.device)], targets

    def _statistics(self, adapted: bool, first: int) -> AbstractContextManager[None]:
        """Where BatchNorm normalises by the batch from sample ``first`` on: both models do so by the dense one's."""
        if self.dense is None or not adapted:
            return batch_statistics(self.model, adapted)
        return shared_statistics(self.loaded.model, self.model, self.seen, first)

    def _pair(self, reader: str, samples: Samples, first: int, before: int, batch: Tensor) -> tuple[Tensor, Tensor]:
        """A batch's rows of a reader in the edited model, ``(G, d, r)``, and their targets, ``(G, out / G, r)``."""
        module, total, real = self.model.get_submodule(reader), len(samples), self.loaded.real_tokens(batch)
        rows: list[Tensor] = []
        targets: list[Tensor] = []

        def read(x: Tensor) -> None:
            rows.append(self.sampling.rows(module, x, first, total, real))

        def put_out(_: nn.Module, args: object, y: Tensor) -> None:
            targets.append(self.sampling.output_rows(module, y, first, total, real))

        source = self.edited if self.dense is None else self.dense
        goal = source.model.get_submodule(reader)
        with on_input(module, read), goal.register_forward_hook(put_out):
            source.fill(before + first, batch)
            if not targets:  # it is not part of what comes before the next one
                with stop_behind(goal):
                    source.run(before + first, batch)
            if not rows:
                with stop_before(module):
                    self.edited.run(before + first, batch)
        return rows[0], targets[0]


def edit_sequentially(
    loaded: LoadedModel,
    edited: nn.Module,
    structure: Structure,
    removed: Mapping[str, Tensor],
    samples: Samples,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    progress: Progress = silent,
    team: Processes = ALONE,
) -> tuple[LayerError, ...]:
    """Compensate readers in order of execution, in place, in a copy of the model that keeps its shapes.

    ``removed`` has the input channels that each of them loses. ``moments`` are those of the dense model.
    ``settings.sequential`` is ``own``: the layer's dense weights applied to the pruned prefix; or ``dense``: the dense
    model's output (docs/method.md, sequential). The matrices of experts and of recurrent layers are compensated on what
    they read in the dense model. Every process of a ``team`` runs its share of the batches and solves the same systems.
    """
    readers = [name for name in structure.operators if name in removed]
    passes = PairedPasses(
        loaded, edited, readers, samples, settings.sampling, dense=settings.sequential == "dense", team=team
    )
    errors = []
    for number, reader in enumerate(readers):
        progress("compensating", number, len(readers))
        passes.advance(*(written_modules(structure, readers[at:]) for at in (number, number + 1)))
        try:
            if isinstance(operator_at(edited, reader), Stacked | Gates):  # whose outputs no hook sees
                errors.append(edit_reader(edited, structure, reader, removed[reader], moments[reader], settings))
                continue
            errors.append(compensate(passes, structure, reader, removed[reader], moments[reader], settings))
        except IndefiniteError:
            raise IndefiniteError(structure.read_by(reader)) from None
    progress("compensating", len(readers), len(readers))
    return tuple(errors)


def compensate(
    passes: PairedPasses,
    structure: Structure,
    reader: str,
    removed: Tensor,
    dense: Moments,
    settings: PruneSettings,
) -> LayerError:
    """Write a reader's new weights for the loss of the input channels ``removed`` into the edited model.

    The moments of its input in the ``dense`` model, of as many rows, say how much the solved matrix is shrunk and in
    what units it is damped.
    """
    module, sink = passes.model.get_submodule(reader), structure.operators[reader].sink
    columns = _kept_columns(module, removed)
    second = second_of(dense, sink)
    share, scale = shrinkage(second, dense.n), mean_diagonal(second)
    whole = weight_matrix(module)
    places = columns[:, None].expand(-1, whole.shape[1], -1)
    weight = whole.gather(2, places)
    paired = passes.moments(reader, columns, isinstance(dense, Spanned))
    solved = paired.uncentred if sink is None else paired
    target = solved.cross * (1 - share[:, None, None]) + weight * (share * scale)[:, None, None]
    damped = shrunk(solved.cov, share, scale)
    parts = [
        regression(weight[g], target[g], damped[g], unit or 1.0, settings.ridge)
        for g, unit in enumerate(scale.tolist())
    ]
    result = torch.stack(parts)
    write_weight(module, torch.zeros_like(whole).scatter_(2, places, result))
    if sink is not None:
        shift = (paired.target - (result @ paired.mean[:, :, None])[:, :, 0]).reshape(-1)
        if getattr(module, "bias", None) is not None:
            shift -= module.get_parameter("bias")
        absorb_mean(passes.model, reader, sink, shift)
    stored = weight_matrix(module).gather(2, places)  # rounded to the model's type
    energy = float(solved.energy.sum())
    error = energy + float(((stored @ solved.cov - 2 * solved.cross) * stored).sum())
    return LayerError(reader, max(0.0, error), energy)


def _kept_columns(module: nn.Module, removed: Tensor) -> Tensor:
    """The columns of a reader's matrix that stay without the input channels ``removed``, int64 ``(G, k)``."""
    groups, width = columns_of(module)
    kernel = kernel_size(module)
    stays = torch.ones(groups * width // kernel, dtype=torch.bool)
    stays[removed] = False
    columns = stays.view(groups, -1).repeat_interleave(kernel, 1).nonzero()[:, 1].view(groups, -1)
    return columns.to(module.get_parameter("weight").device)
