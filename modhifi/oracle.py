"""Try a structure out: cut a little from every group of a copy and see whether it still computes what it should.

Tracing sees what operations do, not where their sizes come from: ``x.view(-1, 400)`` looks like ``x.flatten(1)``. A
model whose code counts on a width shows it only when that width changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .groups import Group, Structure
from .operations import tensors_in
from .plan import Plan
from .surgery import mask_readers, shrink

FIXED = "the model's code counts on this width: it fails, or computes something else, once a component is cut"


def confirm(model: nn.Module, structure: Structure, run: Callable[[nn.Module], Any]) -> Structure:
    """The structure with those groups refused whose removal the model's own code does not follow.

    ``run(model)`` is one forward pass. The first component (of every part) of all groups at once is cut from a copy,
    which must agree with the masked full-size model; only where it does not is every group tried alone. Costs two
    forward passes and two copies of the model where all is well.
    """
    groups = structure.prunable
    if not groups or _agrees(model, structure, groups, run):
        return structure
    wrong = {g.name for g in groups if not _agrees(model, structure, (g,), run)}
    right = tuple(g for g in groups if g.name not in wrong)
    if not wrong or (right and not _agrees(model, structure, right, run)):
        wrong = {g.name for g in groups}
    return replace(
        structure, groups=tuple(replace(g, refused=FIXED) if g.name in wrong else g for g in structure.groups)
    )


@torch.no_grad()
def _agrees(
    model: nn.Module, structure: Structure, groups: Iterable[Group], run: Callable[[nn.Module], Any]
) -> bool:
    plan = Plan({g.name: _all_but_first(g) for g in groups})
    masked = _output(run(mask_readers(model, structure, plan)))
    try:
        small = _output(run(shrink(copy.deepcopy(model), structure, plan)))
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


def _all_but_first(group: Group) -> tuple[int, ...]:
    stay = torch.ones(group.n, dtype=torch.bool)
    if group.partition is None:
        stay[0] = False
    else:
        for label in group.partition.unique():
            stay[int((group.partition == label).nonzero()[0])] = False
    return tuple(stay.nonzero().flatten().tolist())
