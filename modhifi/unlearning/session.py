"""A model while it is edited: its samples, the passes over them, and a record of every edit."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress
from modhifi.structure.operators import absorb_mean, weight_matrix, write_weight
from modhifi.unlearning.batchnorm import settled_names
from modhifi.unlearning.closed_forms import Edit
from modhifi.unlearning.settings import Defaults, UnlearnSettings
from modhifi.unlearning.sites import Site, Sites


@dataclass(frozen=True)
class AppliedEdit:
    """One edit: the operator, the relative change of its weight in the Frobenius norm, the damping used."""

    module: str
    change: float
    damping: float | None


@dataclass
class EditSession:
    """A model that is edited in place, while the original, ``loaded``, stays as it is.

    ``groups`` int64 ``(n,)``: the population of each sample, 0 retained and j the j-th of ``classes``. ``values`` are
    depth, passes and strength that apply. ``left_out``: operators that could not be edited, with the reason. ``runs``
    are the latest passes over the samples.
    """

    loaded: LoadedModel
    model: nn.Module
    sites: Sites
    samples: Samples
    groups: Tensor
    classes: Sequence[int]
    settings: UnlearnSettings
    values: Defaults
    progress: Progress
    records: list[AppliedEdit] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    runs: Passes = field(init=False)

    def __post_init__(self) -> None:
        self.start_passes(())

    def start_passes(self, changed: Sequence[str]) -> Passes:
        """Passes from the first of the operators that will change on, or of the norms that will be settled."""
        changed = [*changed, *settled_names(self.sites, changed)]
        self.runs = Passes(self.loaded, self.model, self.samples, self.settings.batch_size, changed)
        return self.runs

    def wanted(self, module: str) -> bool:
        """Whether an operator's name matches one of the patterns in ``settings.only``."""
        return any(fnmatch.fnmatch(module, pattern) for pattern in self.settings.only)

    def apply(self, site: Site, edits: Sequence[Edit]) -> None:
        """Write an edit of every conv group into the model, and record it."""
        layer: Any = self.model.get_submodule(site.module)
        before = weight_matrix(layer)
        after = torch.stack([e.weight for e in edits]).to(before)
        write_weight(layer, after)
        shifts = [e.shift for e in edits if e.shift is not None]
        if shifts and site.sink is not None:
            absorb_mean(self.model, site.module, site.sink, torch.cat(shifts).to(before))
        change = float((after - before).norm() / before.norm().clamp_min(1e-30))
        dampings = [e.damping for e in edits if e.damping is not None]
        self.records.append(AppliedEdit(site.module, change, max(dampings, default=None)))
