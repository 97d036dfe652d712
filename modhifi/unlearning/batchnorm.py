"""The BatchNorms around a class edit: settle their statistics, or re-estimate them as an attacker would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.calibration.batchnorm import reestimate_batchnorm
from modhifi.calibration.prefix_cache import Passes
from modhifi.data.samples import Samples
from modhifi.models.hooks import attached, on_input
from modhifi.models.loaded import LoadedModel
from modhifi.structure.clone import clone
from modhifi.unlearning.sites import Sites


@dataclass(frozen=True)
class Norm:
    """The four vectors ``(channels,)`` float64 of a BatchNorm in eval mode."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor


def settle_norm(norm: Norm, mean: Tensor, variance: Tensor, eps: float) -> Norm:
    """The same function written with other statistics: ``mean`` and ``variance`` ``(channels,)`` of its input now.

    Behind an edited operator the stored statistics are those of the original; whoever re-estimates them on retain data
    rescales the edit and may bring the class back. Settled on the edited network's own retain statistics, the output
    is unchanged and such a re-estimation finds what is stored. ``gamma' = gamma sqrt((variance + eps) / (old + eps))``,
    ``beta' = beta + gamma (mean - old) / sqrt(old variance + eps)``. Limits: it closes this one way back, it erases
    nothing. Source: ours.
    """
    gain = norm.gamma.double() / torch.sqrt(norm.variance.double() + eps)
    mean, variance = mean.double(), variance.double()
    beta = norm.beta.double() + gain * (mean - norm.mean.double())
    return Norm(gain * torch.sqrt(variance + eps), beta, mean, variance)


def batch_norms(model: nn.Module) -> list[str]:
    """The BatchNorms with running statistics, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return [name for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None]


def settled_names(sites: Sites, edited: Sequence[str]) -> list[str]:
    """The norms of the blocks from the first edited operator on, and all behind the last block."""
    blocks = list(dict.fromkeys([s.block for s in sites.readers] + [block for _, block in sites.norms]))
    order = {s.module: s.block for s in sites.readers}
    first = min((blocks.index(order[name]) for name in edited), default=len(blocks))
    return [name for name, block in sites.norms if blocks.index(block) >= first]


@torch.no_grad()
def settle_norms(runs: Passes, names: Sequence[str], counted: Tensor | None = None) -> None:
    """Give the named norms of a model the statistics of its samples, in place, without changing what they compute.

    ``counted`` bool ``(n,)``: the samples that count, None for all.
    """
    model = runs.model
    known = set(batch_norms(model))
    names = [n for n in names if n in known and model.get_submodule(n).weight is not None]
    for name, (mean, variance) in _statistics(runs, names, counted).items():
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
    result = clone(model)
    reestimate_batchnorm(result, loaded, samples, batch_size)
    return result


def _statistics(runs: Passes, names: Sequence[str], counted: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance ``(channels,)`` float64 of what the named norms receive."""
    sums: dict[str, list[Any]] = {name: [0, 0.0, 0.0] for name in names}
    first, count = 0, 0

    def add(name: str, x: Tensor) -> None:
        if counted is not None:
            # A norm may see a row for each token: those of one sample stand one after another.
            x = x[counted[first : first + count].repeat_interleave(len(x) // count).to(x.device)]
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
