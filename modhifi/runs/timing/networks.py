"""Whole networks timed beside their original: what a plan leaves of a model, and the model's time by its widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.layouts.base import Rounding
from modhifi.runs.measure import device_of
from modhifi.runs.timing.decoding import decoding
from modhifi.runs.timing.layers import seconds_by_operator
from modhifi.runs.timing.operators import measure_operators
from modhifi.runs.timing.runtimes import RUNTIMES
from modhifi.runs.timing.runtimes.base import Run
from modhifi.runs.timing.subjects import Subject
from modhifi.runs.timing.turns import Spread, Turns, time_in_turns
from modhifi.structure.clone import clone
from modhifi.structure.groups import Group, Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import shrink
from modhifi.structure.times import Times

# Rounds of timing whole networks, and the shares of all widths of those that bring the prediction to scale.
ROUNDS = 11
SHARES = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Timer:
    """Times networks in one runtime, at one batch size and number of threads; operators' times are kept in ``cache``.

    ``window`` is the tokens of an input of text, of which ``decode`` times the last one alone. See
    :class:`modhifi.pruning.metered.Meter`.
    """

    runtime: str
    batch: int
    threads: int
    window: int | None = None
    decode: bool = False
    cache: Path | None = None
    progress: Progress = silent

    def gauge(self, loaded: LoadedModel, structure: Structure, rounding: Rounding) -> Times:
        """Operators alone on a grid of widths, then whole networks, which give the coefficients."""
        batch = self._inputs(loaded)
        one_pass = batch[:, -1:] if self.decode else batch
        operators = measure_operators(
            loaded, structure, one_pass, self.runtime, self.threads, self.cache, self.progress
        )
        sizes = sizes_of(loaded.model, structure)
        times = Times(operators, sizes.full, depth=sizes.depth)
        widths: list[dict[str, int]] = [{}]
        for share in SHARES:
            widths.append({g.name: _width(g, share, rounding) for g in structure.prunable})
        turns = self._turns(loaded, structure, {str(n): plan_of(structure, w) for n, w in enumerate(widths)}, batch)
        dense = Spread.of(turns.seconds["0"]).median
        return times.fitted([(w, dense * turns.ratio(str(n), "0").median) for n, w in enumerate(widths)])

    def ratio(self, loaded: LoadedModel, structure: Structure, plan: Plan) -> tuple[float, float]:
        """The time of what a plan leaves over the model's, in turns, and the interquartile range of that ratio."""
        turns = self._turns(loaded, structure, {"dense": Plan({}), "pruned": plan}, self._inputs(loaded))
        spread = turns.ratio("pruned", "dense")
        return spread.median, spread.iqr

    def by_operator(self, loaded: LoadedModel, structure: Structure, plan: Plan) -> Mapping[str, tuple[float, float]]:
        """The seconds of every operator inside the model and inside what a plan leaves; empty but in eager mode."""
        if self.runtime != "eager":
            return {}
        batch, names = self._inputs(loaded), [name for name in structure.operators if _is_layer(loaded.model, name)]
        small = shrink(clone(loaded.model), structure, plan)
        networks = [
            (self._run(loaded.of_one_batch(m), batch), {n: m.get_submodule(n) for n in names if _is_layer(m, n)})
            for m in (loaded.model, small)
        ]
        before, after = seconds_by_operator(networks, self.threads, device_of(loaded.model))
        return {name: (seconds, after.get(name, 0.0)) for name, seconds in before.items()}

    def _inputs(self, loaded: LoadedModel) -> Tensor:
        return Subject(loaded.source, loaded.source, loaded, loaded.example).batch(self.batch, self.window)

    def _turns(self, loaded: LoadedModel, structure: Structure, plans: Mapping[str, Plan], batch: Tensor) -> Turns:
        """Weights are those of the model, uncompensated: the time does not depend on them."""
        runs = {}
        for number, (name, plan) in enumerate(plans.items()):
            self.progress("timing networks", number, len(plans))
            model = shrink(clone(loaded.model), structure, plan) if plan.kept else loaded.model
            runs[name] = self._run(loaded.of_one_batch(model), batch)
        turns = time_in_turns(runs, self.threads, device_of(loaded.model).type != "cpu", rounds=ROUNDS)
        self.progress("timing networks", len(plans), len(plans))
        return turns

    def _run(self, model: nn.Module, batch: Tensor) -> Run:
        return decoding(model, batch) if self.decode else RUNTIMES[self.runtime].load(model, batch)(batch, self.threads)


def _is_layer(model: nn.Module, name: str) -> bool:
    """Whether a module of that name is there: some operators are parameters, and sublayers may have gone."""
    try:
        return type(model.get_submodule(name)).forward is not nn.Module.forward
    except AttributeError:
        return False


def plan_of(structure: Structure, widths: Mapping[str, int]) -> Plan:
    """A plan of given widths, whichever components they are: of each part of a group the last ones go.

    Blocks and sublayers go from the first on, as they do where nothing else is said of their order.
    """
    kept = {}
    for group in structure.prunable:
        if group.parts and widths.get(group.name, group.n) < group.n:
            kept[group.name] = tuple(range(group.n - widths[group.name], group.n))
        elif widths.get(group.name, group.n) < group.n:
            part = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
            each = widths[group.name] // group.step
            kept[group.name] = tuple(
                sorted(i for label in part.unique() for i in torch.nonzero(part == label).flatten()[:each].tolist())
            )
    return Plan(kept)


def _width(group: Group, share: float, rounding: Rounding) -> int:
    """The width nearest to a share of a group that rounding lets be."""
    step = replace(rounding, less=True).step(group)
    return min(group.n, max(min(1, group.least), round(share * group.n / step)) * step)
