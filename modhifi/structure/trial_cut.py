"""Try a structure out: cut a little from every group of a copy and see whether it still computes what it should.

Tracing sees what operations do, not where their sizes come from: ``x.view(-1, 400)`` looks like ``x.flatten(1)``. A
model whose code counts on a width shows it only when that width changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.structure.clone import clone
from modhifi.structure.groups import Group, Structure
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.torch_ops import tensors_in

FIXED = "the model's code counts on this width: it fails, or computes something else, once a component is cut"


def confirm(model: nn.Module, structure: Structure, run: Callable[[nn.Module], Any]) -> Structure:
    """The structure with those groups refused whose removal the model's own code does not follow.

    ``run(model)`` is one forward pass. All groups at once are cut in a copy, first by one component (of every part),
    then to 60 %; each time it must agree with the masked full-size model, and only where it does not is every group
    tried alone. Costs four forward passes and four copies of the model, one at a time, where all is well.
    """
    for share in (1.0, 0.6):
        structure = _confirm_at(share, model, structure, run)
    return structure


def _confirm_at(share: float, model: nn.Module, structure: Structure, run: Callable[[nn.Module], Any]) -> Structure:
    groups = structure.prunable
    if not groups or _agrees(model, structure, groups, run, share):
        return structure
    wrong = {g.name for g in groups if not _agrees(model, structure, (g,), run, share)}
    right = tuple(g for g in groups if g.name not in wrong)
    if not wrong or (right and not _agrees(model, structure, right, run, share)):
        wrong = {g.name for g in groups}
    return replace(
        structure, groups=tuple(replace(g, refused=FIXED) if g.name in wrong else g for g in structure.groups)
    )


@torch.no_grad()
def _agrees(
    model: nn.Module, structure: Structure, groups: Iterable[Group], run: Callable[[nn.Module], Any], share: float
) -> bool:
    plan = Plan({g.name: _last(g, share) for g in groups})
    masked = _output(run(mask_readers(model, structure, plan)))
    try:
        small = _output(run(shrink(clone(model), structure, plan)))
    except Exception:  # any failure of a stranger's code says the same: it cannot live with the new width
        return False
    if small.shape != masked.shape:
        return False
    if not bool(masked.isfinite().all()):
        return True  # a broken model shows nothing here; whoever looks at its numbers will say so
    tolerance = 1e-3 if masked.dtype in (torch.float32, torch.float64) else 5e-2
    small, masked = small.double(), masked.double()
    return bool((small - masked).norm() <= tolerance * masked.norm())


def _output(outputs: Any) -> Tensor:
    nested = outputs if isinstance(outputs, (Tensor, list, tuple, dict)) else vars(outputs)
    return next(tensors_in(nested))


def _last(group: Group, share: float) -> tuple[int, ...]:
    """The last ``share`` of a group's components, equally many of every part: all but one at most, and at least one."""
    labels = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
    components: list[int] = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        components += members[-max(1, min(len(members) - 1, int(share * len(members)))) :].tolist()
    return tuple(sorted(components))
