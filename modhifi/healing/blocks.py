"""The blocks of an original and of its smaller version whose outputs can be compared: one place, one shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from modhifi.models.loaded import LoadedModel
from modhifi.structure.depth import name_after
from modhifi.structure.outputs import named_tensors


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

    def forget(self) -> None:
        """Lets go of the outputs of a pass that failed, and of the memory that their graphs hold."""
        self.outputs = {}

    def take(self) -> tuple[Tensor, ...]:
        """The outputs in the order of the names; they are forgotten here."""
        outputs, self.outputs = self.outputs, {}
        return tuple(outputs[name] for name in self.modules)


@torch.no_grad()
def matched_blocks(
    original: LoadedModel, student: nn.Module, removed: Mapping[str, int] = MappingProxyType({})
) -> dict[str, str]:
    """Names of the blocks that run once and whose outputs have one shape in both models, in order of execution.

    Each by its name in the original, with that in the student, which lacks the blocks and sublayers ``removed`` (as
    `structure.depth.removed_parts` gives them). A block is an entry of a list or sequence that has parts of its own; it
    is left out where the list has lost others than these. Of several that put out one and the same tensor the innermost
    counts; one whose output is overwritten later in the pass does not.
    """
    names = {}
    for owner, name in _candidates(original.model):
        theirs = name_after(name, removed)
        if theirs is None:
            continue
        if _entries(original.model, owner, removed) == _entries(student, theirs.rpartition(".")[0]):
            names[name] = theirs
    seen: list[dict[str, Tensor]] = []
    for model, places in ((original.model, tuple(names)), (student, tuple(names.values()))):
        with Watch(model, places) as watch:
            original.run(original.example, model)
        once = {name: x for name, x in watch.outputs.items() if watch.runs[name] == 1 and x.ndim > 1}
        seen.append({name: x for name, x in once.items() if x._version == watch.versions[name]})
    ours, others = seen
    by_memory: dict[int, str] = {}
    for name in ours:
        if names[name] in others and ours[name].shape == others[names[name]].shape:
            by_memory.setdefault(ours[name].data_ptr(), name)
    return {name: names[name] for name in by_memory.values()}


def _entries(model: nn.Module, owner: str, removed: Mapping[str, int] = MappingProxyType({})) -> int | None:
    """How many entries a list has, without those ``removed``; None where there is no such list."""
    try:
        children = dict(model.get_submodule(owner).named_children())
    except AttributeError:
        return None
    return sum(removed.get(f"{owner}.{key}".lstrip("."), 1) > 0 for key in children)


def _candidates(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Every list that holds a block, and the block, by their names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for key, child in module.named_children():
                if next(child.children(), None) is not None and next(child.parameters(), None) is not None:
                    yield name, f"{name}.{key}".lstrip(".")
