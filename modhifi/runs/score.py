"""The scores of every component of a model, and their files."""

from __future__ import annotations

import csv
import fnmatch
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from modhifi.data.in_memory import Data, source_name
from modhifi.data.mixture import Mixture, mixed
from modhifi.data.sources import load_samples
from modhifi.errors import IndefiniteError, ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import try_pass
from modhifi.progress import Progress, silent
from modhifi.pruning.channel_fidelity import ChannelFidelity, channel_fidelities, cosine_similarity, hifi_sizes
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.fidelity import energy_score
from modhifi.pruning.left_alone import UNSOLVED, leave, unmeasured
from modhifi.pruning.readers import readers_of
from modhifi.pruning.selectors.base import summed
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import choose_groups, find_structure, measure_moments
from modhifi.runs.defaults import amounts
from modhifi.runs.measure import device_of
from modhifi.runs.steady_memory import steady_memory
from modhifi.structure.groups import Structure

# The fidelities that a HiFi set is asked to reach, as in arXiv 2511.19566.
ETAS = (0.5, 0.8, 0.9)
FIELDS = ("singleton", "energy", "cost", "rank")
# The share of the components that the paper finds to be enough for most of a layer.
FEW = 0.2


@dataclass(frozen=True)
class GroupScores:
    """The scores of a group's n components, ``(n,)`` each: float64, ``rank`` int64.

    ``singleton``: largest singleton fidelity over the readers' output channels; ``energy``: energy score summed over
    readers; ``cost``: cumulative squared local error at the component's removal; ``rank``: its place in the order of
    removal (0 first, n for components that are never removed). ``total`` is the readers' output energy. ``channels``
    and ``similarity`` (float64 ``(n, n)``, see :func:`modhifi.pruning.channel_fidelity.cosine_similarity`) are there
    for the groups that were looked into.
    """

    group: str
    kind: str
    singleton: Tensor
    energy: Tensor
    cost: Tensor
    rank: Tensor
    total: float
    channels: tuple[ChannelFidelity, ...] = ()
    similarity: Tensor | None = field(default=None, repr=False)

    def subset_fidelity(self) -> Tensor:
        """Subset Fidelity of the k components that go last, against k, float64 ``(n + 1,)``.

        The share of the readers' output energy that is left after least squares over everything that stays; NaN for
        fewer components than can stay. For one column a component this is the paper's, with a scalar a weight block.
        """
        n = len(self.rank)
        curve = torch.full((n + 1,), float("nan"), dtype=torch.float64)
        left = self.rank < n
        lost = self.cost[left] / self.total if self.total > 0 else torch.zeros_like(self.cost[left])
        curve[n - 1 - self.rank[left]] = (1 - lost).clamp(0.0, 1.0)
        curve[0], curve[n] = 0.0, 1.0
        return curve

    def hifi_size(self, eta: float) -> int:
        """The number of components in the HiFi set: the fewest that go last and reach Subset Fidelity ``eta``."""
        return int(hifi_sizes(self.subset_fidelity(), [eta])[eta])

    def hifi_share(self, eta: float) -> float:
        """The share of the components that the HiFi set of fidelity ``eta`` takes."""
        return self.hifi_size(eta) / len(self.rank)

    def free(self) -> int:
        """The number of components whose joint removal costs at most a millionth of the output energy."""
        return int((self.cost <= 1e-6 * self.total).sum())

    def tensors(self) -> dict[str, Tensor]:
        """The scores as named tensors, those of output channels under the names of their readers."""
        own = {f"{self.group}.{k}": getattr(self, k) for k in FIELDS}
        own[f"{self.group}.subset_fidelity"] = self.subset_fidelity()
        for number, channel in enumerate(self.channels):
            name = f"{self.group}.channels.{number}.{channel.reader}"
            own |= {f"{name}.{k}": getattr(channel, k) for k in ("energy", "components", "singleton")}
            own |= {f"{name}.hifi_size.{eta:g}": sizes for eta, sizes in channel.hifi.items()}
        if self.similarity is not None:
            own[f"{self.group}.similarity"] = self.similarity
        return own

    def to_json(self) -> dict[str, Any]:
        """The scores as JSON-able data; costs may be infinite, and Subset Fidelity unknown (NaN)."""
        return {
            "group": self.group,
            "kind": self.kind,
            "output_energy": self.total,
            **{k: getattr(self, k).tolist() for k in FIELDS},
            "subset_fidelity": self.subset_fidelity().tolist(),
            "hifi_share": {f"{eta:g}": self.hifi_share(eta) for eta in ETAS},
            **({"channels": [c.to_json() for c in self.channels]} if self.channels else {}),
        }


class Scores(list[GroupScores]):
    """The scores of every group that has some; ``left`` has the others, each with the reason."""

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, str] = {}


@steady_memory()
def score_model(
    loaded: LoadedModel,
    data: Data,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    window: int | None = None,
    selector: str = "obs",
    layers: Sequence[str] = (),
    picture: bool = False,
) -> Scores:
    """Scores every prunable group of a model on data, in one forward pass a sample.

    ``selector`` finds the order of removal; the groups that a pattern of ``layers`` matches are looked into, output
    channel by output channel; a ``picture`` needs the similarities of one group, where none is looked into. Groups
    that cannot be measured or solved are left out. Raises ModhifiError where the data cannot be had, for a pattern that
    matches nothing and where no group is left.
    """
    usual = amounts(loaded, device_of(loaded.model))
    settings = PruneSettings(selector=selector, seed=seed, floor=1e-9, batch_size=usual.batch_size)
    structure = choose_groups(find_structure(loaded), settings)
    looked_into = matching(structure, layers)
    n = samples or usual.samples
    calibration = mixed(
        [
            (
                str(source_name(source)),
                share,
                load_samples(source, loaded, n=n, seed=seed, window=window, progress=progress),
            )
            for source, share in Mixture.of(data)
        ]
    )
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
    drawn = middle(structure) if picture and not looked_into else None
    for group in structure.prunable:
        readers = readers_of(loaded.model, structure, group, moments)
        curve = curves[group.name]
        assert curve.fidelity is not None
        cost = torch.full((group.n,), float("inf"), dtype=torch.float64)
        rank = torch.full((group.n,), group.n, dtype=torch.int64)
        cost[curve.order], rank[curve.order] = curve.cost[1:], torch.arange(len(curve.order))
        energy = summed(readers, energy_score)
        scores = GroupScores(group.name, group.kind, curve.fidelity, energy, cost, rank, curve.energy)
        if group.name in looked_into:
            channels = channel_fidelities([piece.module for piece in group.readers], readers, ETAS)
            scores = replace(scores, channels=tuple(channels))
        if group.name in looked_into or group.name == drawn:
            scores = replace(scores, similarity=cosine_similarity(readers))
        result.append(scores)
    return result


def matching(structure: Structure, patterns: Sequence[str]) -> set[str]:
    """The names of the prunable groups that a shell pattern matches; raises ModhifiError for one that matches none."""
    names: set[str] = set()
    for pattern in patterns:
        matched = {g.name for g in structure.prunable if fnmatch.fnmatch(g.name, pattern)}
        if not matched:
            raise ModhifiError(f"the pattern '{pattern}' matches no prunable group; `modhifi check` lists them")
        names |= matched
    return names


def middle(structure: Structure) -> str:
    """The name of the middle group of the kind that has the most components."""
    total: dict[str, int] = {}
    for group in structure.prunable:
        total[group.kind] = total.get(group.kind, 0) + group.n
    names = [group.name for group in structure.prunable if group.kind == max(total, key=lambda kind: total[kind])]
    return names[len(names) // 2]


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
            save_file({name: tensor.contiguous() for s in scores for name, tensor in s.tensors().items()}, temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """A list of numbers with None in place of those that JSON does not have; anything else as it is."""
    if not isinstance(value, list):
        return value
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in value]
