"""Whole blocks and sublayers: which of them a plan removes, and a model without them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from torch import Tensor, nn

from modhifi.structure.groups import Branch, Structure
from modhifi.structure.plan import Plan

# What modules that know their place in a list call it.
PLACE = re.compile(r"(^|_)(layer|block)_(idx|index|id|number)$")


class NoBranch(nn.Module):
    """Stands in for a sublayer that was removed: what it adds to the stream is zero.

    It returns a single zero, followed by as many None as the sublayer returned further values.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        zero = given.new_zeros(())
        return zero if self.outputs == 1 else (zero, *[None] * (self.outputs - 1))


@dataclass(frozen=True)
class Span:
    """Neighbouring branches of one stream that go, and the branch before them, which stays: ``keeper``."""

    keeper: Branch
    removed: tuple[Branch, ...]

    @property
    def name(self) -> tuple[str, str]:
        """The writer before the span and the last one in it, which tell it from every other."""
        return self.keeper.writer, self.removed[-1].writer


def removed_parts(structure: Structure, plan: Plan) -> dict[str, int]:
    """The modules that a plan removes whole; for sublayers the number of values that they return, for blocks 0."""
    outputs = {branch.part: branch.outputs for branch in structure.branches if branch.part is not None}
    removed: dict[str, int] = {}
    for group in structure.groups:
        if group.parts and group.name in plan.kept:
            gone = [part for part, stays in zip(group.parts, plan.mask(group).tolist(), strict=True) if not stays]
            removed |= {part: outputs[part] if group.kind == "sublayers" else 0 for part in gone}
    blocks = [part for part, n in removed.items() if n == 0]
    return {part: n for part, n in removed.items() if n == 0 or not inside(part, blocks)}


def inside(name: str, parts: Iterable[str]) -> bool:
    """Whether a module, or a parameter, is one of ``parts`` or lies in one."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def spans(structure: Structure, parts: Iterable[str]) -> list[Span]:
    """The runs of neighbouring branches that lie in ``parts``, each with the branch before it."""
    parts = tuple(parts)
    result: list[Span] = []
    keepers: dict[str, Branch] = {}
    for branch in structure.branches:
        if not inside(branch.writer, parts):
            keepers[branch.stream] = branch
        elif result and result[-1].keeper is keepers[branch.stream]:
            result[-1] = Span(result[-1].keeper, (*result[-1].removed, branch))
        else:
            result.append(Span(keepers[branch.stream], (branch,)))
    return result


def silenced(model: nn.Module, structure: Structure, parts: Iterable[str]) -> list[nn.Parameter]:
    """The parameters that are zero where the branches in ``parts`` add nothing: their writers' and their norms'."""
    parts = tuple(parts)
    names = [
        name
        for branch in structure.branches
        if inside(branch.writer, parts)
        for name in (branch.writer, branch.norm)
        if name is not None
    ]
    return [parameter for name in names for parameter in model.get_submodule(name).parameters(recurse=False)]


def silence(model: nn.Module, structure: Structure, parts: Iterable[str]) -> None:
    """Let the branches in ``parts`` add nothing, in place, all shapes kept: what a model without them computes."""
    for parameter in silenced(model, structure, parts):
        parameter.data.zero_()


def drop(model: nn.Module, parts: Mapping[str, int]) -> nn.Module:
    """The model without ``parts`` (as :func:`removed_parts` gives them), in place.

    Elements of a list of modules are taken out of it, and those behind move up; in the place of another module stands
    a :class:`NoBranch`.
    """
    elements: dict[str, set[str]] = defaultdict(set)
    for name, outputs in parts.items():
        owner, _, leaf = name.rpartition(".")
        if outputs:
            setattr(model.get_submodule(owner), leaf, NoBranch(outputs).train(model.training))
        else:
            elements[owner].add(leaf)
    for owner, leaves in elements.items():
        container = model.get_submodule(owner)
        stay = [(leaf, module) for leaf, module in container.named_children() if leaf not in leaves]
        numbered = all(leaf.isdigit() for leaf, _ in container.named_children())
        container._modules.clear()
        for number, (leaf, module) in enumerate(stay):
            if numbered:
                _move(module, int(leaf), number)
            container.add_module(str(number) if numbered else leaf, module)
    return model


def _move(block: nn.Module, before: int, after: int) -> None:
    """Tell a block, and what is in it, its new place in the list: caches of keys and values go by it."""
    for module in block.modules():
        for name, value in list(vars(module).items()):
            if PLACE.search(name) and type(value) is int and value == before:
                setattr(module, name, after)


def name_after(name: str, parts: Mapping[str, int]) -> str | None:
    """What a module or tensor of the whole model is called in the model without ``parts``, None for what is gone."""
    if inside(name, parts):
        return None
    before: list[str] = []
    after: list[str] = []
    for leaf in name.split("."):
        owner, number = ".".join(before), leaf
        if leaf.isdigit():
            gone = [part.rpartition(".") for part, outputs in parts.items() if not outputs]
            number = str(int(leaf) - sum(o == owner and le.isdigit() and int(le) < int(leaf) for o, _, le in gone))
        before.append(leaf)
        after.append(number)
    return ".".join(after)


def name_before(name: str, parts: Mapping[str, int]) -> str:
    """The inverse of :func:`name_after`: what a module of the model without ``parts`` is called in the whole one."""
    before: list[str] = []
    for leaf in name.split("."):
        number, owner = leaf, ".".join(before)
        if leaf.isdigit():
            here = {
                p.rpartition(".")[2] for p, outputs in parts.items() if not outputs and p.rpartition(".")[0] == owner
            }
            stay = (str(n) for n in count() if str(n) not in here)
            number = next(islice(stay, int(leaf), None))
        before.append(number)
    return ".".join(before)


def both_removed(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """What two removals, one after the other, take from the whole model; ``second`` names modules as they are then."""
    later = {name_before(name, first): outputs for name, outputs in second.items()}
    blocks = [name for name, outputs in later.items() if not outputs]
    return {name: outputs for name, outputs in first.items() if not inside(name, blocks)} | later
