"""Ranks: components of an attention's values that a change of basis inside every head makes.

An attention adds up values, whatever the basis they are written in: with R of every head on the rows that make its
values and R⁻¹ on the columns that read them, the model computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.structure.clone import clone
from modhifi.structure.groups import Group, Structure
from modhifi.structure.operators import conv_groups, kernel_size, weight_matrix, write_weight
from modhifi.structure.outputs import named_tensors
from modhifi.structure.places import operator_at
from modhifi.structure.plan import Plan
from modhifi.structure.recurrent import Gates
from modhifi.structure.stacked import Stacked
from modhifi.structure.trial_cut import FIXED, MOST, cut, drawn_alike, first_wrong, nudged, roles, wrong_output

FORM = "these values are not written by one linear map for another to read"
# How far, relative to their norm, values may be from a linear map of others that they are taken for.
SINGLE = 1e-5
BETWEEN = "something other than a weighted sum stands between these values and what reads them"


@dataclass(frozen=True)
class Ends:
    """Where a group of ranks stands: ``rows`` int64 ``(H, n)`` of what ``writer`` makes, by key-value head, and
    ``columns`` int64 ``(H Q, n)`` of what ``reader`` takes, Q query heads in a row for each.
    """

    writer: nn.Module
    reader: nn.Module
    rows: Tensor
    columns: Tensor

    @property
    def queries(self) -> int:
        """Q, the query heads of one key-value head."""
        return len(self.columns) // len(self.rows)


def ends_of(model: nn.Module, group: Group) -> Ends | None:
    """The two ends of a group of ranks; None where there are others, or something for each channel in between."""
    if len(group.producers) != 1 or len(group.readers) != 1 or len(group.slices) > 2 or group.partition is not None:
        return None
    made, read = group.producers[0], group.readers[0]
    ends = Ends(operator_at(model, made.module), operator_at(model, read.module), made.index.T, read.index.T)
    for module in (ends.writer, ends.reader):
        if isinstance(module, Stacked | Gates) or conv_groups(module) > 1 or kernel_size(module) > 1:
            return None
    return ends if len(ends.columns) % len(ends.rows) == 0 else None


def turned(values: Tensor, dim: int, places: Tensor, turns: Tensor) -> Tensor:
    """A tensor of which the slices along ``dim`` at each head's ``places`` are multiplied by that head's matrix.

    ``places`` int64 ``(H, n)``; ``turns`` ``(H, n, n)`` of the dtype of ``values``.
    """
    result, places = values.movedim(dim, 0).clone(), places.to(values.device)
    result[places] = torch.einsum("hij,hj...->hi...", turns, result[places])
    return result.movedim(0, dim)


def turn(ends: Ends, turns: Tensor, back: Tensor) -> None:
    """Write the values of every head in another basis, in place: ``turns`` float64 ``(H, n, n)`` and their inverses."""
    write_weight(ends.writer, turned(weight_matrix(ends.writer), 1, ends.rows, turns))
    if (bias := getattr(ends.writer, "bias", None)) is not None:
        bias.data.copy_(turned(bias.data.double(), 0, ends.rows, turns))
    back = back.mT.repeat_interleave(ends.queries, 0)
    write_weight(ends.reader, turned(weight_matrix(ends.reader), 2, ends.columns, back))


def clone_to_turn(model: nn.Module, groups: Sequence[Group]) -> nn.Module:
    """A copy of the model that shares all weights with it but those that :func:`turn` writes for some groups."""
    touched = {piece.module for group in groups for piece in group.slices}
    own = {id(p) for name in touched for p in operator_at(model, name).parameters()}
    return clone(model, (p for p in model.parameters() if id(p) not in own))


def confirm_ranks(
    model: nn.Module, structure: Structure, groups: tuple[Group, ...], run: Callable[[nn.Module], Any]
) -> Structure:
    """The structure with these groups of ranks, those refused that cannot be turned or whose cut is not followed.

    ``run(model)`` is one forward pass. Layers of one role are tried together: three passes for each role.
    """
    known = tuple(g if g.refused or ends_of(model, g) is not None else replace(g, refused=FORM) for g in groups)
    run = drawn_alike(run)
    structure, reasons = replace(structure, groups=(*structure.groups, *known)), dict[str, str]()
    for members in roles([group for group in known if not group.refused]).values():
        reason = None
        if wrong_output(model, structure, cut(members, MOST), run) is not None:
            reason = FIXED
        elif not _turns(model, members, run):
            reason = BETWEEN
        reasons |= {group.name: reason for group in members if reason is not None}
    return structure.leave(reasons)


@torch.no_grad()
def _turns(model: nn.Module, groups: list[Group], run: Callable[[nn.Module], Any]) -> bool:
    """Whether the model computes the same once the values of every head are turned at random."""
    copied, generator = clone_to_turn(model, groups), torch.Generator().manual_seed(0)
    for group in groups:
        ends = ends_of(copied, group)
        assert ends is not None
        heads, n = ends.rows.shape
        turns = torch.linalg.qr(torch.randn(heads, n, n, dtype=torch.float64, generator=generator)).Q
        turns = turns.to(ends.writer.get_parameter("weight").device)
        turn(ends, turns, turns.mT)
    expected, given = dict(named_tensors(run(model))), dict(named_tensors(run(copied)))
    return first_wrong(expected, given, model, lambda: run(nudged(clone(model)))) is None


def in_dense_basis(twin: nn.Module, dense: nn.Module, structure: Structure, plan: Plan) -> None:
    """Let a cut model in the shapes of its original have the values of the original, and readers to match, in place.

    What stays of the values is a linear map of the original's, which least squares finds from the weights. Where there
    is none to single precision, as after training, the twin stays as it is.
    """
    for group in structure.groups:
        if group.kind != "ranks" or group.name not in plan.kept:
            continue
        ends, own = ends_of(twin, group), ends_of(dense, group)
        assert ends is not None and own is not None
        kept = torch.tensor(plan.kept[group.name])
        values, basis = _values(ends)[ends.rows[:, kept]], _values(own)[ends.rows]
        turns = torch.linalg.lstsq(basis.mT, values.mT, driver="gelsd").solution.mT
        if torch.dist(turns @ basis, values) > SINGLE * values.norm():
            continue
        turns = turns.repeat_interleave(ends.queries, 0)
        weight, columns = weight_matrix(ends.reader), ends.columns
        weight[0][:, columns] = torch.einsum("ohk,hkn->ohn", weight[0][:, columns[:, kept]], turns)
        write_weight(ends.reader, weight)
        for name, value in own.writer.named_parameters(recurse=False):
            ends.writer.get_parameter(name).data.copy_(value)


def _values(ends: Ends) -> Tensor:
    """The rows that make the values, each with its bias behind it, float64 ``(out, in + 1)``, on the CPU."""
    weight, bias = weight_matrix(ends.writer)[0], getattr(ends.writer, "bias", None)
    column = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    return torch.cat([weight, column[:, None]], 1).cpu()
