"""The scores of every component of a model, and their files."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from modhifi.data.in_memory import Data
from modhifi.data.sources import load_samples
from modhifi.errors import IndefiniteError
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import try_pass
from modhifi.progress import Progress, silent
from modhifi.pruning.fidelity import energy_score
from modhifi.pruning.left_alone import UNSOLVED, leave, unmeasured
from modhifi.pruning.readers import readers_of
from modhifi.pruning.selectors.base import summed
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import choose_groups, find_structure, measure_moments, removal_curves
from modhifi.runs.defaults import amounts


@dataclass(frozen=True)
class GroupScores:
    """The scores of a group's n components, ``(n,)`` each: float64, ``rank`` int64.

    ``singleton``: largest singleton fidelity over the readers' output channels; ``energy``: energy score summed over
    readers; ``cost``: cumulative squared local error at the component's removal; ``rank``: its place in the order of
    removal (0 first, n for components that are never removed). ``total`` is the readers' output energy.
    """

    group: str
    singleton: Tensor
    energy: Tensor
    cost: Tensor
    rank: Tensor
    total: float

    def free(self) -> int:
        """The number of components whose joint removal costs at most a millionth of the output energy."""
        return int((self.cost <= 1e-6 * self.total).sum())

    def half_cost(self) -> float:
        """The share of the readers' output energy that the removal of half of the components costs."""
        removed = self.cost[self.rank < len(self.rank) // 2]
        return float(removed.max()) / self.total if len(removed) and self.total > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The scores as JSON-able data; costs may be infinite."""
        return {
            "group": self.group,
            "output_energy": self.total,
            **{k: getattr(self, k).tolist() for k in ("singleton", "energy", "cost", "rank")},
        }


class Scores(list[GroupScores]):
    """The scores of every group that has some; ``left`` has the others, each with the reason."""

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, str] = {}


def score_model(
    loaded: LoadedModel,
    data: Data,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    window: int | None = None,
) -> Scores:
    """Scores every prunable group of a model on one data source, in one forward pass a sample.

    Groups that cannot be measured or solved are left out. Raises ModhifiError where the data cannot be had, and where
    no group is left.
    """
    usual = amounts(loaded, next(loaded.model.parameters()).device)
    settings = PruneSettings(seed=seed, floor=1e-9, batch_size=usual.batch_size)
    structure = choose_groups(find_structure(loaded), settings)
    calibration = load_samples(data, loaded, n=samples or usual.samples, seed=seed, window=window, progress=progress)
    try_pass(loaded, calibration.first())
    moments = measure_moments(loaded, structure, calibration, settings.sampling, progress)
    result = Scores()
    result.left |= unmeasured(loaded, structure, moments, calibration, settings.batch_size)
    structure = leave(structure, result.left, strict=False)
    try:
        curves = removal_curves(loaded.model, structure, moments, settings, progress)
    except IndefiniteError as error:
        unsolved = dict.fromkeys(error.groups, UNSOLVED)
        result.left |= unsolved
        structure = leave(structure, unsolved, strict=False)
        curves = removal_curves(loaded.model, structure, moments, settings, progress)
    for group in structure.prunable:
        readers = readers_of(loaded.model, structure, group, moments)
        curve = curves[group.name]
        assert curve.fidelity is not None
        cost = torch.full((group.n,), float("inf"), dtype=torch.float64)
        rank = torch.full((group.n,), group.n, dtype=torch.int64)
        cost[curve.order], rank[curve.order] = curve.cost[1:], torch.arange(len(curve.order))
        result.append(GroupScores(group.name, curve.fidelity, summed(readers, energy_score), cost, rank, curve.energy))
    return result


def write_scores(scores: list[GroupScores], path: Path) -> None:
    """Writes the scores as ``.json``, ``.csv`` or ``.safetensors``, through a temporary file beside it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        if path.suffix == ".json":
            finite = [{k: _finite(v) for k, v in s.to_json().items()} for s in scores]
            Path(temporary).write_text(json.dumps(finite, indent=1), "utf-8")
        elif path.suffix == ".csv":
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(["group", "component", "singleton", "energy", "cost", "rank"])
                for s in scores:
                    rows = zip(s.singleton.tolist(), s.energy.tolist(), s.cost.tolist(), s.rank.tolist(), strict=True)
                    table.writerows([s.group, i, *row] for i, row in enumerate(rows))
        else:
            fields = ("singleton", "energy", "cost", "rank")
            save_file({f"{s.group}.{k}": getattr(s, k).contiguous() for s in scores for k in fields}, temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    return [None if v == float("inf") else v for v in value] if isinstance(value, list) else value
