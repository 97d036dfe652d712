"""Run a model over the same samples again and again, from its first changed operator on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from modhifi.data.samples import Samples
from modhifi.models.hooks import standing_in
from modhifi.models.loaded import LoadedModel
from modhifi.structure.torch_ops import METADATA, operation_name, tensors_in
from modhifi.structure.tracing.branches import Calls

# What is remembered of all samples takes at most this many bytes, or nothing is.
MOST_BYTES = 2**30


class Reached(Exception):
    """Raised inside a pass by who needs nothing of what comes behind, and caught there."""


class Passes:
    """Forward passes of ``model`` over ``samples``, each time from the operators in ``changed`` on.

    The first time through, what every module that ended before them gave is remembered, as far as anything else than
    such modules reads it. Only ``changed`` and what runs behind may be edited meanwhile. With none, and where it would
    take more than ``most_bytes``, nothing is remembered.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: nn.Module,
        samples: Samples,
        batch_size: int,
        changed: Sequence[str] = (),
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.loaded, self.model, self.samples, self.batch_size = loaded, model, samples, batch_size
        self.before = _Before(loaded, model, changed) if changed else None
        self.most_bytes = most_bytes
        self.outputs: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[tuple[int, Callable[..., Tensor]]]:
        """For every batch the number of its first sample and a function that runs the model on it.

        Give that function the active :class:`Calls`, where there is one: its numbers go on behind what is not run.
        """
        first = 0
        for batch in self.samples.batches(self.batch_size):
            yield first, lambda calls=None, first=first, batch=batch: self._run(first, batch, calls)
            first += len(batch)

    @torch.no_grad()
    def _run(self, first: int, batch: Tensor, calls: Calls | None) -> Tensor:
        if self.before is None:
            return self.loaded.logits(batch, self.model)
        if first in self.outputs:
            with self.before.given(self.outputs[first], calls):
                return self.loaded.logits(batch, self.model)
        outputs: dict[str, Any] = {}
        try:
            with self.before.recording(outputs):
                return self.loaded.logits(batch, self.model)
        finally:
            self._remember(first, outputs, len(batch))

    def _remember(self, first: int, outputs: dict[str, Any], count: int) -> None:
        assert self.before is not None
        if self.before.size(outputs) / count * len(self.samples) > self.most_bytes:
            self.before = None
            self.outputs.clear()
        elif len(outputs) == len(self.before.calls):  # not those of a pass that broke off
            self.outputs[first] = outputs


@dataclass
class _Span:
    """When a module ran, in modules begun and calls made, and how often."""

    begin: int
    calls: int
    end: int = -1
    times: int = 1


@dataclass
class _Read(TorchFunctionMode):
    """The tensors that any function read, by identity."""

    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation_name(func) not in METADATA:
            self.seen |= {id(t) for t in tensors_in((args, kwargs or {}))}
        return func(*args, **(kwargs or {}))


class _Before:
    """The largest modules that end before any of ``changed`` begins, and which of their outputs are read elsewhere.

    ``calls`` is how many numbered calls each makes.
    """

    def __init__(self, loaded: LoadedModel, model: nn.Module, changed: Sequence[str]) -> None:
        self.model = model
        spans: dict[str, _Span] = {}
        begun = 0
        with Calls({}) as calls, self._hooks(dict(model.named_modules())) as seen:

            def begin(name: str) -> None:
                nonlocal begun
                begun += 1
                if name in spans:
                    spans[name].times += 1
                else:
                    spans[name] = _Span(begun, calls.time)

            def end(name: str, output: Any) -> None:
                spans[name].calls, spans[name].end = calls.time - spans[name].calls, begun

            seen["begin"], seen["end"] = begin, end
            loaded.logits(loaded.example, model)
        start = min((spans[name].begin for name in changed if name in spans), default=0)
        early = {name for name, span in spans.items() if span.times == 1 and 0 <= span.end < start}
        self.calls = {name: spans[name].calls for name in spans if name in early and not _inside(name, early)}
        self.read = set(self.calls)
        outputs: dict[str, Any] = {}
        with self.recording(outputs):
            loaded.logits(loaded.example, model)
        # The same objects go in everywhere, so that reading one shows.
        with _Read() as read, self.given(outputs, None, same=True):
            loaded.logits(loaded.example, model)
        self.read = {name for name in self.calls if any(id(t) in read.seen for t in tensors_in(outputs[name]))}

    def size(self, outputs: dict[str, Any]) -> int:
        """How many bytes a recording holds."""
        return sum(t.nbytes for name in self.read & outputs.keys() for t in tensors_in(outputs[name]))

    @contextmanager
    def _hooks(self, modules: dict[str, nn.Module]) -> Iterator[dict[str, Callable[..., None]]]:
        table: dict[str, Callable[..., None]] = {}
        handles: list[Any] = []
        for name, module in modules.items():
            if module is not self.model:
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: table["begin"](name)))
                handles.append(module.register_forward_hook(lambda m, a, out, name=name: table["end"](name, out)))
        try:
            yield table
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recording(self, outputs: dict[str, Any]) -> Iterator[None]:
        """Puts into ``outputs`` what the modules put out inside: copies of what is read elsewhere, of the rest the
        shape alone."""

        def end(name: str, output: Any) -> None:
            outputs[name] = _each(output, torch.clone if name in self.read else _shape)

        with self._hooks({name: self.model.get_submodule(name) for name in self.calls}) as table:
            table["begin"], table["end"] = lambda name: None, end
            yield

    def given(self, outputs: dict[str, Any], calls: Calls | None, same: bool = False) -> AbstractContextManager[None]:
        """Inside, the modules give what they gave in a recording, copied lest later operations work in place."""

        def gives(name: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if calls is not None:
                    calls.time += self.calls[name]
                if same or name not in self.read:
                    return outputs[name]
                return _each(outputs[name], torch.clone)

            return forward

        return standing_in({self.model.get_submodule(name): gives(name) for name in self.calls})


def _inside(name: str, others: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:n]) in others for n in range(1, len(parts)))


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with ``change`` of every tensor, which no mode sees."""
    with torch._C.DisableTorchFunction():
        return tree_map(lambda v: change(v.detach()) if isinstance(v, Tensor) else v, value)


def _shape(tensor: Tensor) -> Tensor:
    """A tensor of this shape that takes no memory."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
