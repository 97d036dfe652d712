"""Make a classifier forget classes: collect moments, edit an operator, collect again; forward passes only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.structure.clone import clone
from modhifi.unlearning.batchnorm import settle_norms, settled_names
from modhifi.unlearning.methods import METHODS
from modhifi.unlearning.session import AppliedEdit, EditSession
from modhifi.unlearning.settings import Defaults, UnlearnSettings
from modhifi.unlearning.sites import Sites


@dataclass(frozen=True)
class Forgotten:
    """``model`` has forgotten; ``plain`` is the same function before its norms were settled; ``left_out``: operators
    that could not be edited, with the reason; ``values``: depth, passes and strength that applied."""

    model: nn.Module
    plain: nn.Module
    records: tuple[AppliedEdit, ...]
    left_out: tuple[tuple[str, str], ...]
    values: Defaults


@torch.no_grad()
def forget(
    loaded: LoadedModel,
    sites: Sites,
    samples: Samples,
    groups: Tensor,
    settings: UnlearnSettings,
    classes: Sequence[int],
    progress: Progress = silent,
) -> Forgotten:
    """A copy of the model without the classes; ``groups`` int64 ``(n,)`` is 0 for retained samples and j for the j-th
    of ``classes`` (-1: not used). The samples have labels.

    Raises ModhifiError for an unknown method, where no operator can be edited and for patterns that match none.
    """
    method, edited = METHODS[settings.method], clone(loaded.model)
    values = settings.filled(method.defaults(sites.straight))
    session = EditSession(loaded, edited, sites, samples, groups, classes, settings, values, progress)
    method.run(session)
    plain = clone(edited)
    norms = settled_names(sites, [record.module for record in session.records])
    if settings.settle and norms:
        settle_norms(session.runs, norms, groups == 0)
    return Forgotten(edited, plain, tuple(session.records), tuple(session.left_out), values)


def blend(original: nn.Module, edited: nn.Module, strength: float) -> nn.Module:
    """The model ``strength`` of the way from ``original`` to ``edited``, in every weight and statistic."""
    result = clone(edited)
    start, end = original.state_dict(), edited.state_dict()
    mixed = {k: start[k] + strength * (v - start[k]) if v.is_floating_point() else v for k, v in end.items()}
    result.load_state_dict(mixed)
    return result


def fit_strength(loss: Callable[[float], float], budget: float, steps: int = 6) -> tuple[float, float]:
    """The largest strength in [0, 1] found by bisection whose retain loss is within ``budget``, and that loss.

    Takes the loss to grow with the strength between the points tried.
    """
    full = loss(1.0)
    if full <= budget:
        return 1.0, full
    low, high, best = 0.0, 1.0, loss(0.0)
    for _ in range(steps):
        middle = (low + high) / 2
        value = loss(middle)
        if value <= budget:
            low, best = middle, value
        else:
            high = middle
    return low, best
