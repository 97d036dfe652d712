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
from modhifi.structure.outputs import difference, named_tensors
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink

FIXED = "the model's code counts on this width: it fails, or computes something else, once a component is cut"


def confirm(model: nn.Module, structure: Structure, run: Callable[[nn.Module], Any]) -> Structure:
    """The structure with those groups refused whose removal the model's own code does not follow.

    ``run(model)`` is one forward pass. All groups at once are cut in a copy, first by one component (of every part),
    then to 60 %; each time every tensor that it returns must agree with the masked full-size model's, and only where
    one does not is every group tried alone. Costs four forward passes and four copies of the model, one at a time,
    where all is well.
    """
    for share in (1.0, 0.6):
        structure = _confirm_at(share, model, structure, run)
    return structure


def _confirm_at(share: float, model: nn.Module, structure: Structure, run: Callable[[nn.Module], Any]) -> Structure:
    groups = structure.prunable
    problem = _problem(model, structure, groups, run, share) if groups else None
    if problem is None:
        return structure
    alone = {g.name: _problem(model, structure, (g,), run, share) for g in groups}
    wrong = {name: reason for name, reason in alone.items() if reason is not None}
    right = tuple(g for g in groups if g.name not in wrong)
    if not wrong or (right and (problem := _problem(model, structure, right, run, share)) is not None):
        wrong = {g.name: wrong.get(g.name, problem) for g in groups}
    return replace(
        structure, groups=tuple(replace(g, refused=wrong[g.name]) if g.name in wrong else g for g in structure.groups)
    )


@torch.no_grad()
def _problem(
    model: nn.Module, structure: Structure, groups: Iterable[Group], run: Callable[[nn.Module], Any], share: float
) -> str | None:
    """Why these groups cannot lose a share of their components, with the output that is wrong; None where they can."""
    plan = Plan({g.name: _last(g, share) for g in groups})
    masked = dict(named_tensors(run(mask_readers(model, structure, plan))))
    try:
        small = dict(named_tensors(run(shrink(clone(model), structure, plan))))
    except Exception:  # any failure of a stranger's code says the same: it cannot live with the new width
        return FIXED
    for name in masked | small:
        if name not in masked or name not in small or not _agree(small[name], masked[name]):
            return f"{FIXED} (output '{name}')" if name else FIXED
    return None


def _agree(small: Tensor, masked: Tensor) -> bool:
    if small.shape != masked.shape:
        return False
    return difference(small, masked) <= (5e-2 if masked.dtype in (torch.float16, torch.bfloat16) else 1e-3)


def _last(group: Group, share: float) -> tuple[int, ...]:
    """The last ``share`` of a group's components, equally many of every part: all but one at most, and at least one."""
    labels = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
    components: list[int] = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        components += members[-max(1, min(len(members) - 1, int(share * len(members)))) :].tolist()
    return tuple(sorted(components))
