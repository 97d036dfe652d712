"""Run a model again after a change in one place, without computing the blocks before it a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from modhifi.models.hooks import standing_in


class Replay:
    """Remembers what every block put out in one forward pass; later passes start behind the unchanged ones.

    A block is an element of an ``nn.Sequential`` or ``nn.ModuleList`` that has children and holds no other block.
    Memory: one output per block.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs: dict[str, Any] = {}
        self.started: dict[str, int] = {}

    def blocks(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Sequential, nn.ModuleList)):
                for leaf, child in module.named_children():
                    if any(True for _ in child.children()) and not isinstance(child, (nn.Sequential, nn.ModuleList)):
                        found[f"{name}.{leaf}".lstrip(".")] = child
        return {name: m for name, m in found.items() if not any(other.startswith(f"{name}.") for other in found)}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember the forward pass inside."""
        calls: Counter[str] = Counter()
        handles = []

        def start(name: str) -> None:
            self.started.setdefault(name, len(self.outputs))

        def end(name: str, output: Any) -> None:
            calls[name] += 1
            self.outputs[name] = _copy(output)

        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: start(name)))
        for name, block in self.blocks().items():
            handles.append(block.register_forward_hook(lambda m, a, out, name=name: end(name, out)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if any(count > 1 for count in calls.values()):
            self.outputs.clear()  # the order of a second run is not remembered

    def after_change(self, changed: Iterable[str]) -> AbstractContextManager[None]:
        """Inside, blocks that ended before any of the ``changed`` modules began give what they gave in the recording.

        Pass the same input. A changed module that did not run in the recording makes every block run.
        """
        first = min(self.started.get(name, 0) for name in changed)
        ended = list(self.outputs)[:first]

        def gives(output: Any) -> Callable[..., Any]:
            return lambda *args, **kwargs: _copy(output)

        return standing_in({self.model.get_submodule(name): gives(self.outputs[name]) for name in ended})


def _copy(value: Any) -> Any:
    """Copies of all tensors in a nest: later operations may work in place."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)
