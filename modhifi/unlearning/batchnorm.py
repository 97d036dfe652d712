"""The BatchNorms around a class edit: settle their statistics, or re-estimate them as an attacker would."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.calibration.batchnorm import reestimate_batchnorm
from modhifi.calibration.prefix_cache import Passes
from modhifi.data.samples import Samples
from modhifi.models.hooks import attached, on_input
from modhifi.models.loaded import LoadedModel
from modhifi.unlearning.erasure import Norm, settle_norm


def batch_norms(model: nn.Module) -> list[str]:
    """The BatchNorms with running statistics, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return [name for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None]


@torch.no_grad()
def settle_norms(runs: Passes, names: Sequence[str], kept: Tensor | None = None) -> None:
    """Give the named norms of a model the statistics of its samples, in place, without changing what they compute.

    ``kept`` bool ``(n,)``: the samples that count, None for all.
    """
    model = runs.model
    known = set(batch_norms(model))
    names = [n for n in names if n in known and model.get_submodule(n).weight is not None]
    for name, (mean, variance) in _statistics(runs, names, kept).items():
        norm: Any = model.get_submodule(name)
        old = Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var)
        new = settle_norm(old, mean, variance, norm.eps)
        for place, value in zip(
            (norm.weight, norm.bias, norm.running_mean, norm.running_var),
            (new.gamma, new.beta, new.mean, new.variance),
            strict=True,
        ):
            place.copy_(value.to(place))


@torch.no_grad()
def recall(loaded: LoadedModel, model: nn.Module, samples: Samples, batch_size: int) -> nn.Module | None:
    """A copy of the model with BatchNorms re-estimated on ``samples``, all at once; None for a model without any."""
    if not batch_norms(model):
        return None
    result = copy.deepcopy(model)
    reestimate_batchnorm(result, loaded, samples, batch_size)
    return result


def _statistics(runs: Passes, names: Sequence[str], kept: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance ``(channels,)`` float64 of what the named norms receive."""
    sums: dict[str, list[Any]] = {name: [0, 0.0, 0.0] for name in names}
    first, count = 0, 0

    def add(name: str, x: Tensor) -> None:
        if kept is not None:
            # A norm may see a row for each token: those of one sample stand one after another.
            x = x[kept[first : first + count].repeat_interleave(len(x) // count).to(x.device)]
        rows = x.detach().double().transpose(0, 1).flatten(1)
        entry = sums[name]
        entry[0] += rows.shape[1]
        entry[1] = entry[1] + rows.sum(1)
        entry[2] = entry[2] + rows.square().sum(1)

    with attached([on_input(runs.model.get_submodule(name), partial(add, name)) for name in names]):
        for first, run in runs:
            count = min(runs.batch_size, len(runs.samples) - first)
            run()
    result = {}
    for name, (n, first, second) in sums.items():
        if n > 1:
            mean = first / n
            result[name] = mean, (second / n - mean.square()).clamp_min(0) * (n / (n - 1))
    return result
