"""The memory of a pass by the widths of a model, and that of what a plan leaves of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from modhifi.models.loaded import LoadedModel
from modhifi.pruning.layouts.base import Rounding
from modhifi.runs.measure import stored_bytes
from modhifi.runs.timing.memory import bytes_by_writer, peak_bytes
from modhifi.runs.timing.runtimes import RUNTIMES
from modhifi.runs.timing.runtimes.base import Run
from modhifi.runs.timing.subjects import Subject
from modhifi.structure.clone import clone
from modhifi.structure.footprint import Footprint
from modhifi.structure.groups import Structure
from modhifi.structure.places import operator_at
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import shrink


@dataclass(frozen=True)
class MemoryMeter:
    """Counts what eager torch holds at once, weights included, on one batch; ``window`` is the tokens of a text.

    On a GPU the allocator says it. See :class:`modhifi.pruning.metered.Meter`.
    """

    batch: int
    window: int | None = None

    def gauge(self, loaded: LoadedModel, structure: Structure, rounding: Rounding) -> Footprint:
        """What stands in memory at every instant of the dense model's pass, by the operator that wrote it."""
        model, sizes, inputs = loaded.model, sizes_of(loaded.model, structure), self._inputs(loaded)
        operators = {t.module: t for t in sizes.terms if t.module in structure.operators}
        modules = {name: operator_at(model, name) for name in operators}
        instants = bytes_by_writer(self._run(loaded.of_one_batch(model), inputs), modules)
        table = np.array([[held.get(name, 0) for name in (*operators, "")] for held in instants], dtype=float)
        each = stored_bytes(model) / max(1.0, sizes.parameters({}))
        return Footprint(sizes, each, tuple(operators.values()), table)

    def ratio(self, loaded: LoadedModel, structure: Structure, plan: Plan) -> tuple[float, float]:
        """The bytes of what a plan leaves over the model's; they are counted, so that nothing spreads."""
        inputs = self._inputs(loaded)
        small = shrink(clone(loaded.model), structure, plan) if plan.kept else loaded.model
        peaks = [self._peak(loaded.of_one_batch(model), inputs) for model in (small, loaded.model)]
        return peaks[0] / peaks[1], 0.0

    def by_operator(self, loaded: LoadedModel, structure: Structure, plan: Plan) -> Mapping[str, tuple[float, float]]:
        """Nothing: the bytes are no sum over operators."""
        return {}

    def _inputs(self, loaded: LoadedModel) -> Tensor:
        return Subject(loaded.source, loaded.source, loaded, loaded.example).batch(self.batch, self.window)

    def _run(self, model: nn.Module, inputs: Tensor) -> Run:
        return RUNTIMES["eager"].load(model, inputs)(inputs, torch.get_num_threads())

    def _peak(self, model: nn.Module, inputs: Tensor) -> int:
        peak = peak_bytes(model, self._run(model, inputs), eager=True)
        assert peak is not None
        return peak
