"""Try a structure out: cut a little from every group of a copy and see whether it still computes what it should.

Tracing sees what operations do, not where their sizes come from: ``x.view(-1, 400)`` looks like ``x.flatten(1)``. A
model whose code counts on a width shows it only when that width changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi.errors import is_out_of_memory
from modhifi.structure.clone import clone
from modhifi.structure.groups import Group, Structure
from modhifi.structure.outputs import difference, named_tensors
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink

FIXED = "the model's code counts on this width: it fails, or computes something else, once a component is cut"
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
HALF = (torch.float16, torch.bfloat16)
UNEQUAL = (
    "the model's code counts on one width in several blocks: it fails, or computes something else, once one block has "
    "another"
)
WHOLE = "the model's code counts on these modules: it fails, or computes something else, once some are gone"
# Shares of a group's components that stay in trials, where one at least goes.
ALL_BUT_ONE, MOST = 1.0, 0.6


def confirm(model: nn.Module, structure: Structure, run: Callable[[nn.Module], Any]) -> Structure:
    """The structure with those groups refused whose removal the model's own code does not follow.

    ``run(model)`` is one forward pass. All groups at once are cut in a copy, every second block by one component (of
    every part) and the others to 60 %, as plans give blocks unequal widths; then the other way round. Each time every
    tensor that it returns must agree with the masked full-size model's. Only where one does not, all are cut by one
    component, all to 60 %, and every second block alone, and where that fails every group is tried alone. Groups of
    several blocks that can be cut alike only, as those that share a mask for each head, become one group. Costs four
    forward passes, and four copies of the weights that are cut, one at a time, where all is well; two passes more
    for blocks that may go, and for sublayers.
    """

    run = drawn_alike(run)
    trials: list[tuple[float, Callable[[Sequence[Group]], Sequence[Group]], str]] = [
        (MOST, _blocks, WHOLE),
        (MOST, _sublayers, WHOLE),
    ]
    plans = _unequal(structure.prunable)
    if any(wrong_output(model, structure, plan, run) is not None for plan in plans if plan.kept):
        trials = [(ALL_BUT_ONE, _widths, FIXED), (MOST, _widths, FIXED), (MOST, _every_second, UNEQUAL), *trials]
    for share, chosen, reason in trials:
        before = structure
        structure = _confirm(model, structure, chosen(structure.prunable), run, share, reason)
        if reason == UNEQUAL:
            structure = _tied(model, before, structure, run, share)
    return structure


def drawn_alike(run: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """A pass in which models that draw at random draw the same every time, whatever their widths, and drop nothing."""

    def seeded(model: nn.Module) -> Any:
        with torch.random.fork_rng(devices=[]), _Undropped():
            torch.manual_seed(0)
            return run(model)

    return seeded


class _Undropped(TorchFunctionMode):
    """Dropout gives back what it is given: what it draws for fewer components is no part of what it draws for more."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").rstrip("_") in DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _tied(
    model: nn.Module, before: Structure, after: Structure, run: Callable[[nn.Module], Any], share: float
) -> Structure:
    """The structure, whose groups that were just refused are one group for each role, where cutting that one is right.

    A component of it is one of every block, at the same place.
    """
    alone = {group.name for group in before.prunable} - {group.name for group in after.prunable}
    for members in roles(before.prunable).values():
        if len(members) < 2 or not alone & {g.name for g in members} or not all(_alike(members[0], g) for g in members):
            continue
        first, others = members[0], {g.name for g in members[1:]}
        one = replace(
            first,
            slices=tuple(piece for g in members for piece in g.slices),
            attributes=tuple(count for g in members for count in g.attributes),
            pieces=tuple(count for g in members for count in g.pieces),
        )
        tied = replace(
            after,
            groups=tuple(one if g.name == first.name else g for g in after.groups if g.name not in others),
            work=tuple(
                replace(w, positions={first.name if n in others else n: m for n, m in w.positions.items()})
                for w in after.work
            ),
        )
        plans = [cut(groups, share) for groups in ((one,), _every_second(tied.prunable)) if groups]
        if all(wrong_output(model, tied, plan, run) is None for plan in plans):
            after = tied
    return after


def _alike(group: Group, other: Group) -> bool:
    """Whether a component of one group can go with that at the same place of another."""
    parts, others = group.partition, other.partition
    same = parts is others or (parts is not None and others is not None and torch.equal(parts, others))
    form = (group.n, group.kind, group.queries, group.experts, group.multiple)
    return same and form == (other.n, other.kind, other.queries, other.experts, other.multiple)


def _widths(groups: Sequence[Group]) -> Sequence[Group]:
    return [group for group in groups if not group.parts]


def _blocks(groups: Sequence[Group]) -> Sequence[Group]:
    return [group for group in groups if group.kind == "blocks"]


def _sublayers(groups: Sequence[Group]) -> Sequence[Group]:
    return [group for group in groups if group.kind == "sublayers"]


def _every_second(groups: Sequence[Group]) -> Sequence[Group]:
    """Every second of the groups that have one name but for its numbers, such as those of all blocks.

    Of two such names that follow each other, one begins with its first group and the other with its second.
    """
    repeated = [members for members in roles(groups).values() if len(members) > 1]
    return [group for number, members in enumerate(repeated) for group in members[number % 2 :: 2]]


def roles(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups by their names without numbers."""
    members: dict[str, list[Group]] = {}
    for group in _widths(groups):
        members.setdefault(re.sub(r"\d+", "", group.name), []).append(group)
    return members


def _confirm(
    model: nn.Module,
    structure: Structure,
    chosen: Sequence[Group],
    run: Callable[[nn.Module], Any],
    share: float,
    reason: str,
) -> Structure:
    def problem(groups: Sequence[Group]) -> str | None:
        output = wrong_output(model, structure, cut(groups, share), run)
        return None if output is None else f"{reason} (output '{output}')" if output else reason

    together = problem(chosen) if chosen else None
    if together is None:
        return structure
    groups = chosen if chosen[0].parts else _widths(structure.prunable)
    alone = {g.name: problem((g,)) for g in groups}
    wrong = {name: text for name, text in alone.items() if text is not None}
    right = tuple(g for g in chosen if g.name not in wrong)
    if wrong:
        together = problem(right) if right else None
    if together is not None:
        wrong = {g.name: wrong.get(g.name, together) for g in groups}
    return replace(
        structure, groups=tuple(replace(g, refused=wrong[g.name]) if g.name in wrong else g for g in structure.groups)
    )


@torch.no_grad()
def wrong_output(model: nn.Module, structure: Structure, plan: Plan, run: Callable[[nn.Module], Any]) -> str | None:
    """The output that is wrong once a plan is cut, "" for all; None where none is."""
    masked = dict(named_tensors(run(mask_readers(model, structure, plan, model.parameters()))))
    try:
        small = dict(named_tensors(run(shrink(clone(model, model.parameters()), structure, plan))))
    except Exception as error:  # any failure of a stranger's code says the same: it cannot live with the new width
        if is_out_of_memory(error):
            raise
        return ""
    return first_wrong(masked, small, model, lambda: run(nudged(mask_readers(model, structure, plan))))


def first_wrong(
    expected: dict[str, Tensor], given: dict[str, Tensor], model: nn.Module, nudge: Callable[[], Any]
) -> str | None:
    """The first output that is not as expected, None where all are.

    In half precision it may differ by as much as it does in ``nudge()``, a pass with every weight moved by rounding.
    """
    half, noisy = any(p.dtype in HALF for p in model.parameters()), dict[str, Tensor]()
    for name in expected | given:
        if name not in expected or name not in given or given[name].shape != expected[name].shape:
            return name
        change = difference(given[name], expected[name])
        if change <= (5e-2 if half else 1e-3):
            continue
        if half and not noisy:
            noisy = dict(named_tensors(nudge()))
        if not half or not change <= difference(noisy[name], expected[name]):
            return name
    return None


def nudged(model: nn.Module) -> nn.Module:
    """The model with every weight moved by half of its type's precision, in place: what rounding alone does.

    Through tens of blocks of half precision that is no small change of the output.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            steps = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data.mul_((1 + torch.finfo(parameter.dtype).eps / 2 * steps).to(parameter.dtype))
    return model


def _unequal(groups: Sequence[Group]) -> list[Plan]:
    """Two plans that cut all widths, every second block by one component and the others to 60 %, and vice versa."""
    second = {group.name for group in _every_second(groups)}
    return [
        Plan({g.name: _last(g, MOST if (g.name in second) == often else ALL_BUT_ONE) for g in _widths(groups)})
        for often in (False, True)
    ]


def cut(groups: Iterable[Group], share: float) -> Plan:
    """The plan that keeps a share of the components of these groups."""
    return Plan({g.name: _last(g, share) for g in groups})


def _last(group: Group, share: float) -> tuple[int, ...]:
    """The last ``share`` of a group's components, equally many of every part: one step at least, and not the last."""
    labels = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
    components: list[int] = []
    for label in labels.unique():
        members, step = (labels == label).nonzero().flatten(), group.multiple
        wanted = min(len(members) - step, int(share * len(members)) // step * step)
        stay = max(min(step, group.least), wanted)
        components += members[len(members) - stay :].tolist()
    return tuple(sorted(components))
