"""Find the residual branches of a model, and the blocks and sublayers that can go: the stream runs on without them.

A block is an element of a list of modules (``ModuleList``, ``Sequential``) that adds one branch or several to the
stream that came in; a sublayer is a module inside whose output is one of several branches. A branch must come before
them in that list: its writer takes over what they added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.structure.groups import Branch, Group, Structure
from modhifi.structure.operators import conv_groups
from modhifi.structure.tracing.branches import Addition, BranchWatcher, stream_places, watch

# Why a block must stay.
NORMED = "a norm stands on the stream itself, and would norm twice without the branch behind it"
JOINED = "no operator alone writes what is added to the stream"
FIRST = "no branch before it can take over what it adds to the stream"


def with_depth(model: nn.Module, structure: Structure, example: Tensor, run: Callable[[Tensor], Any]) -> Structure:
    """The structure with the model's residual branches and the groups of blocks and sublayers that they make up.

    ``run(example)`` is one forward pass on two samples.
    """
    outputs: dict[str, int] = {}

    def count(name: str, output: Any) -> None:
        several = isinstance(output, tuple) and len(output) > 0 and isinstance(output[0], Tensor)
        outputs[name] = len(output) if several else int(isinstance(output, Tensor))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_hook(lambda _, args, out, name=name: count(name, out)))
        watcher, _ = watch(model, example, run)
    lists: dict[str, dict[str, list[Addition]]] = defaultdict(dict)
    for addition in watcher.additions:
        if (element := _element(model, addition.where)) is not None:
            lists[element.rpartition(".")[0]].setdefault(element, []).append(addition)
    branches: list[Branch] = []
    groups: list[Group] = []
    for name, elements in lists.items():
        found, own = _of_list(model, watcher, outputs, name, elements)
        branches += found
        groups += own
    return replace(structure, groups=(*structure.groups, *groups), branches=tuple(branches))


def _element(model: nn.Module, where: str) -> str | None:
    """The innermost module around a place that is an element of a list of modules."""
    while where:
        owner = where.rpartition(".")[0]
        if isinstance(model.get_submodule(owner), nn.ModuleList | nn.Sequential):
            return where
        where = owner
    return None


def _of_list(
    model: nn.Module,
    watcher: BranchWatcher,
    outputs: dict[str, int],
    name: str,
    elements: dict[str, list[Addition]],
) -> tuple[list[Branch], list[Group]]:
    """The branches of the elements of one list, and the groups of those elements and of their parts that can go."""
    branches: list[Branch] = []
    blocks: list[str] = []
    parts: dict[str, list[str]] = defaultdict(list)
    reasons: dict[str, None] = {}
    before: Addition | None = None
    for element, made in elements.items():
        additions = _on_stream(made)
        own = [_branch(model, watcher, outputs, element, a, additions) for a in additions]
        follows = []
        for addition in additions:
            follows.append(_obstacle(before, addition))
            before = addition
        written = [branch for branch in own if branch is not None]
        if len(written) < len(own):
            reasons[JOINED] = None
            before = None  # nothing behind it can be folded into it
            continue
        branches += written
        if obstacles := [reason for reason in follows if reason is not None]:
            reasons |= dict.fromkeys(obstacles)
        else:
            blocks.append(element)
        for branch, reason in zip(written, follows, strict=True):
            if reason is None and branch.part is not None and len(written) > 1:
                parts[branch.part.removeprefix(f"{element}.")].append(branch.part)
    if not blocks:
        refused = "; ".join(reasons)
        return branches, [Group(name, len(elements), (), refused=refused, kind="blocks", parts=tuple(elements))]
    groups = [Group(name, len(blocks), (), kind="blocks", parts=tuple(blocks))]
    groups += [Group(f"{name}.{leaf}", len(own), (), kind="sublayers", parts=tuple(own)) for leaf, own in parts.items()]
    return branches, groups


def _on_stream(additions: list[Addition]) -> list[Addition]:
    """Of the additions inside one block those that its stream runs through: the last, and by their skips the others."""
    by_time = {a.time: a for a in additions}
    chain = [additions[-1]]
    while (skip := chain[0].skip) is not None and skip.module is None and skip.addition in by_time:
        chain.insert(0, by_time[skip.addition])
    return chain


def _obstacle(before: Addition | None, addition: Addition) -> str | None:
    """Why what is added here cannot be folded into the branch before; None where it can."""
    skip = addition.skip
    if before is None or skip is None or skip.module is not None or skip.addition != before.time:
        return FIRST
    if skip.normed:
        return NORMED
    return None if addition.size == before.size else FIRST


def _branch(
    model: nn.Module,
    watcher: BranchWatcher,
    outputs: dict[str, int],
    block: str,
    addition: Addition,
    others: list[Addition],
) -> Branch | None:
    """The branch that is added to a stream; None where no operator of the block alone writes it."""
    trail = addition.trail
    if trail is None or trail.module is None or not trail.module.startswith(f"{block}."):
        return None
    writer = trail.module
    norm = None if trail.norm is None else model.get_submodule(trail.norm)
    if conv_groups(model.get_submodule(writer)) > 1 or (norm is not None and norm.weight is None):
        return None
    part = f"{block}.{writer.removeprefix(f'{block}.').partition('.')[0]}"
    whole = all(not f"{a.where}.".startswith(f"{part}.") for a in others)
    whole = whole and sum(a.trail is not None and f"{a.trail.module}.".startswith(f"{part}.") for a in others) == 1
    place = stream_places(model, watcher, writer, trail, addition.size)
    if hasattr(model.get_submodule(writer), "kernel_size"):
        natural = torch.arange(addition.size).view(place.shape[1], -1).T
    else:
        natural = torch.arange(addition.size).view(-1, place.shape[1])
    return Branch(
        writer,
        block,
        part if whole and part != writer and outputs.get(part, 0) else None,
        outputs.get(part, 0),
        addition.where,
        addition.number,
        trail.norm,
        trail.gains,
        None if torch.equal(place, natural) else place,
    )
