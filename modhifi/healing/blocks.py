"""The blocks of an original and of its smaller version whose outputs can be compared, channel by channel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from modhifi.models.loaded import LoadedModel
from modhifi.structure.clone import clone
from modhifi.structure.depth import inside, name_after, removed_parts
from modhifi.structure.groups import Structure
from modhifi.structure.operators import outputs_of
from modhifi.structure.outputs import difference, named_tensors
from modhifi.structure.places import operator_at
from modhifi.structure.plan import Plan
from modhifi.structure.recurrent import Gates
from modhifi.structure.stacked import Stacked
from modhifi.structure.surgery import mask_readers, removed_positions, shrink, staying
from modhifi.structure.trial_cut import HALF


@dataclass(frozen=True)
class Cut:
    """What a student lacks of its original.

    ``parts`` are blocks and sublayers, as `structure.depth.removed_parts` gives them. ``outputs`` are, for each
    operator that lost some of its outputs, in order of execution, those that stay: bool ``(outputs,)``. ``plan`` made
    them.
    """

    parts: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    plan: tuple[Structure, Plan] | None = None

    @classmethod
    def of(cls, model: nn.Module, structure: Structure, plan: Plan) -> Cut:
        """What a plan removes of a model."""
        removed = removed_positions(structure, plan)
        outputs = {}
        for name in structure.operators:
            operator = operator_at(model, name)
            if (name, "producer") in removed and not isinstance(operator, Stacked | Gates):
                outputs[name] = staying(outputs_of(operator), removed[name, "producer"])
        return cls(removed_parts(structure, plan), outputs, (structure, plan))

    def positions(self, block: str, output: Tensor, smaller: Tensor) -> tuple[int, Tensor] | None:
        """The axis along which a block's output is ``smaller`` in the student, and the positions that are left there.

        They are those of the last operator in the block that has as many outputs, before and after: what comes behind
        it, an addition or a norm, leaves channels in their places; :meth:`confirmed` tells. None where there is no such
        operator.
        """
        axes = [axis for axis, sizes in enumerate(zip(output.shape, smaller.shape, strict=True)) if len(set(sizes)) > 1]
        if len(axes) != 1:
            return None
        sizes = (output.shape[axes[0]], smaller.shape[axes[0]])
        alike = [
            stays
            for name, stays in self.outputs.items()
            if inside(name, (block,)) and (len(stays), int(stays.sum())) == sizes
        ]
        return (axes[0], alike[-1].nonzero().flatten()) if alike else None

    @torch.no_grad()
    def confirmed(self, original: LoadedModel, narrower: Mapping[str, Match]) -> set[str]:
        """Those of the ``narrower`` blocks whose channels are where they are said to be.

        A block may turn its channels round on the way out. The original with masked readers and the same cut out of it
        compute one function, so that a wrong place shows. Costs a pass of each.
        """
        if self.plan is None or not narrower:
            return set()
        masked = mask_readers(original.model, *self.plan)
        small = shrink(clone(masked), *self.plan)
        most = 5e-2 if any(p.dtype in HALF for p in masked.parameters()) else 1e-3
        names = tuple(match.student for match in narrower.values())
        with Watch(masked, tuple(narrower)) as dense, Watch(small, names) as cut:
            for model in (masked, small):
                original.run(original.example, model)
            seen = zip(narrower.items(), dense.take(), cut.take(), strict=True)
            return {name for (name, match), wanted, got in seen if difference(got, match.part_of(wanted)) <= most}


@dataclass(frozen=True)
class Match:
    """A block by its name in the ``student``, and what its output has left there: ``stays``, int64, along an axis.

    None: all of it.
    """

    student: str
    axis: int = 0
    stays: Tensor | None = None

    def part_of(self, output: Tensor) -> Tensor:
        """What the student's block should put out, of the original's."""
        if self.stays is None:
            return output
        stays = self.stays.to(output.device)
        if output.ndim == 4 and self.axis == 1 and output.is_contiguous(memory_format=torch.channels_last):
            # laid out as the student's block is, which is compared with it
            return output.movedim(1, -1)[..., stays].movedim(-1, 1)
        return output.index_select(self.axis, stays)


class Watch:
    """The outputs of the named modules in the last pass of a model, while the context is open.

    A module that returns several tensors counts with its first one.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.modules = {name: model.get_submodule(name) for name in names}
        self.outputs: dict[str, Tensor] = {}
        self.runs: dict[str, int] = {}
        self.versions: dict[str, int] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Watch:
        for name, module in self.modules.items():
            self.stack.enter_context(module.register_forward_hook(partial(self._see, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _see(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        tensor = next((tensor for _, tensor in named_tensors(output)), None)
        if tensor is not None:
            self.outputs[name] = tensor
            self.runs[name] = self.runs.get(name, 0) + 1
            self.versions[name] = tensor._version

    def let_go(self, rows: int) -> tuple[str, ...]:
        """Watches no more what put out another number of rows in the last pass, or nothing; returns the names."""
        seen = self.outputs
        gone = tuple(name for name in self.modules if name not in seen or len(seen[name]) != rows)
        for name in gone:
            del self.modules[name]
            seen.pop(name, None)
        return gone

    def forget(self) -> None:
        """Lets go of the outputs of a pass that failed, and of the memory that their graphs hold."""
        self.outputs = {}

    def take(self) -> tuple[Tensor, ...]:
        """The outputs in the order of the names; they are forgotten here."""
        outputs, self.outputs = self.outputs, {}
        return tuple(outputs[name] for name in self.modules)


@torch.no_grad()
def matched_blocks(
    original: LoadedModel, student: nn.Module, cut: Cut, batches: Iterable[Tensor] = ()
) -> dict[str, Match]:
    """The blocks that run once and whose outputs can be compared, by name in the original, in order of execution.

    Their outputs have one row for each item of the example and of all ``batches``, as those of routed experts have not.

    They have one shape in both models, or are narrower in the student, and the ``cut`` says which channels are left. A
    block is an entry of a list or sequence that has parts of its own; it is left out where the list has lost others
    than ``cut.parts``. Of several that put out one and the same tensor the innermost counts; one whose output is
    overwritten later in the pass does not.
    """
    names = {}
    for owner, name in _candidates(original.model):
        theirs = name_after(name, cut.parts)
        if theirs is None:
            continue
        if _entries(original.model, owner, cut.parts) == _entries(student, theirs.rpartition(".")[0]):
            names[name] = theirs
    seen: list[dict[str, Tensor]] = []
    for model, places in ((original.model, tuple(names)), (student, tuple(names.values()))):
        with Watch(model, places) as watch:
            original.run(original.example, model)
        once = {name: x for name, x in watch.outputs.items() if watch.runs[name] == 1 and x.ndim > 1}
        seen.append({name: x for name, x in once.items() if x._version == watch.versions[name]})
    ours, others = seen
    ours = {name: ours[name] for name in _by_item(original, ours, batches) if name in names}
    by_memory: dict[int, tuple[str, Match]] = {}
    for name, output in ours.items():
        smaller = others.get(names[name])
        if smaller is None or output.ndim != smaller.ndim:
            continue
        if output.shape == smaller.shape:
            by_memory.setdefault(output.data_ptr(), (name, Match(names[name])))
        elif (left := cut.positions(name, output, smaller)) is not None:
            by_memory.setdefault(output.data_ptr(), (name, Match(names[name], *left)))
    matches = dict(by_memory.values())
    right = cut.confirmed(original, {name: match for name, match in matches.items() if match.stays is not None})
    return {name: match for name, match in matches.items() if match.stays is None or name in right}


def _by_item(original: LoadedModel, names: Iterable[str], batches: Iterable[Tensor]) -> tuple[str, ...]:
    """Those of the modules whose output has one row for each item of the example and of every batch."""
    with Watch(original.model, tuple(names)) as watch:
        for batch in (original.example, *batches):
            if watch.modules:
                original.logits(batch)
                watch.let_go(len(batch))
                watch.forget()
    return tuple(watch.modules)


def has_blocks(model: nn.Module) -> bool:
    """Whether a model has a list or sequence of blocks."""
    return next(_candidates(model), None) is not None


def _entries(model: nn.Module, owner: str, removed: Mapping[str, int] | None = None) -> int | None:
    """How many entries a list has, without those ``removed``; None where there is no such list."""
    try:
        children = dict(model.get_submodule(owner).named_children())
    except AttributeError:
        return None
    return sum((removed or {}).get(f"{owner}.{key}".lstrip("."), 1) > 0 for key in children)


def _candidates(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Every list that holds a block, and the block, by their names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for key, child in module.named_children():
                if next(child.children(), None) is not None and next(child.parameters(), None) is not None:
                    yield name, f"{name}.{key}".lstrip(".")
