"""One batch of clean activations through the original network, with bounds of where the edit takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from modhifi.bounds.propagation.affine import ErrorSource, Norms
from modhifi.bounds.propagation.interval import Bound, total
from modhifi.bounds.propagation.newton import ROUNDS, radius_of
from modhifi.bounds.propagation.walker import LOST, Walker


@dataclass(frozen=True)
class Walk:
    """One batch of clean activations, walked. ``missing`` names the first operation without a rule, for each rung."""

    output: Tensor
    bound: Bound
    # R2, and how much of it is not the prediction itself: float64 (b,).
    local: Tensor
    remainder: Tensor
    sources: tuple[ErrorSource, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def constants(self) -> tuple[float, ...]:
        """R1: the global constant of the modified tail behind each source; infinite once anything is lost."""
        least = self.bound.reach.get(LOST, 0.0)
        return tuple(max(least, self.bound.reach.get(k, 0.0)) for k in range(len(self.sources)))

    @property
    def lost(self) -> bool:
        """Whether a modified value went through an operation without a rule: no global constant holds."""
        return self.bound.reach.get(LOST, 0.0) > 0


def walk(
    dense: nn.Module,
    edited: nn.Module,
    run: Callable[[Tensor, nn.Module], Tensor],
    batch: Tensor,
    norms: Norms,
    rounds: int = ROUNDS,
) -> Walk:
    """Walk one batch through ``dense`` beside the parameters of ``edited``, a model of the same shapes.

    Both models are float64, in eval mode, on the CPU; ``run`` is one forward pass. Axis 0 is the batch. ``rounds`` of
    Newton's method predict the modified network's values; with 0, R2 is the radius around the clean ones.
    """
    walker = Walker(dense, edited, batch, norms, rounds)
    with torch.no_grad(), walker.following(), walker:
        output = run(batch, dense)
    bound = walker.bound(output)
    if walker.tainted:
        unknown = torch.full([1] * output.ndim, torch.inf, dtype=torch.float64)
        bound = replace(bound, radius=unknown)
    if walker.tainted or walker.branching:
        bound = replace(bound, reach=dict.fromkeys((LOST, *range(len(walker.sources))), torch.inf))
    local = remainder = total(bound.radius).expand(len(output))
    path = walker.newton.paths.get(id(output))
    if path is not None and not walker.tainted:
        near, rest = radius_of(path, output)
        local, remainder = torch.minimum(local, near), torch.where(near < local, rest, local)
    return Walk(output, bound, local, remainder, tuple(walker.sources), dict(walker.missing))
