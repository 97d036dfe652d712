"""When each module of a model runs in a forward pass, and which functions read what it puts out.

One watched pass on an example answers, for any set of modules that will change, what runs before all of them and what
of it anything else needs: see :class:`Prefix`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from modhifi.models.hooks import attached
from modhifi.structure.places import operator_at
from modhifi.structure.torch_ops import METADATA, operation_name, tensors_in
from modhifi.structure.tracing.branches import Calls


@dataclass
class Span:
    """When a module began for the first time and ended for the last, in events of the pass.

    ``calls`` is how many numbered calls (:class:`Calls`) one run makes, ``times`` how often the module runs.
    """

    begin: int
    end: int = -1
    calls: int = 0
    times: int = 1


@dataclass(frozen=True)
class Prefix:
    """The largest modules that end before a change begins, with how many numbered calls each makes.

    ``read`` names those whose outputs anything but a module of the prefix reads.
    """

    calls: Mapping[str, int]
    read: frozenset[str]


class Timeline:
    """The events of one forward pass, that of ``run()``: modules begin and end, functions read their outputs.

    Tells of every copy of ``model`` that computes in the same order.
    """

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        self.model = model
        self.spans: dict[str, Span] = {}
        # Bytes of what each module puts out, for the batch of this pass.
        self.nbytes: dict[str, int] = {}
        self._events = 0
        self._names = {module: name for name, module in model.named_modules()}
        # Of each module the memory of its outputs, and of those inputs that it returns or changes in place.
        self._outputs: dict[str, set[int]] = {}
        self._passed: dict[str, set[int]] = {}
        # When each memory is read.
        self._reads: dict[int, list[int]] = {}
        self._alive: list[Any] = []  # so that no other tensor takes the place of one of them
        with torch.no_grad(), Calls({}) as calls, _Reads(self._read), attached(self._hooks(calls)):
            run()
        self._read(self._alive[-1])  # the model's own output, which the caller reads
        self._alive.clear()
        self._begins: dict[int, int] = {}
        for module, name in self._names.items():
            for tensor in _tensors(module, recurse=False):
                self._begins[id(tensor)] = min(self._begin(name), self._begins.get(id(tensor), self._events))

    def begin(self, changed: Iterable[str]) -> float:
        """The event with which the first of the ``changed`` modules begins, infinity if there are none.

        Counts every module with which a changed one shares a tensor, and for one that is never called itself, as its
        parent reads its weights, the nearest one around it that is.
        """
        begins = [math.inf]
        for name in changed:
            module = operator_at(self.model, name)
            begins.append(self._begin(self._names.get(module, name)))
            begins += [self._begins[id(tensor)] for tensor in _tensors(module)]
        return min(begins)

    def before(self, changed: Iterable[str], among: Collection[str] | None = None) -> Prefix:
        """The modules, ``among`` the given ones if there are any, that end before any of the ``changed`` begins.

        Left out, but for their parts, are modules that run more than once, and those whose input itself, returned or
        changed in place, is read elsewhere afterwards: for a copy the two would no longer be one.
        """
        start = self.begin(changed)
        early = {
            name
            for name, span in self.spans.items()
            if name and span.times == 1 and 0 <= span.end < start and (among is None or name in among)
        }
        while True:
            largest = self._largest(early)
            passing = {name for name in largest if self._read_elsewhere(self._passed[name], name, largest)}
            if not passing:
                break
            early -= passing
        read = {name for name in largest if self._read_elsewhere(self._outputs[name], name, largest)}
        return Prefix({name: self.spans[name].calls for name in largest}, frozenset(read))

    def most_before(self, changed: Iterable[str]) -> int:
        """The bytes that the outputs read behind a prefix take, at that of the ``changed`` modules where it is most."""
        return max((sum(map(self.nbytes.__getitem__, self.before([name]).read)) for name in changed), default=0)

    def _largest(self, names: Collection[str]) -> list[str]:
        """Those of the modules that do not run inside another of them, in order."""
        largest: list[str] = []
        for name in sorted(names, key=lambda n: self.spans[n].begin):
            if not largest or self.spans[name].begin > self.spans[largest[-1]].end:
                largest.append(name)
        return largest

    def _read_elsewhere(self, keys: Iterable[int], name: str, others: Sequence[str]) -> bool:
        """Whether tensors are read behind a module and inside none of the ``others``, which are in order."""

        def elsewhere(event: int) -> bool:
            number = bisect_right(others, event, key=lambda n: self.spans[n].begin) - 1
            return number < 0 or event > self.spans[others[number]].end

        end = self.spans[name].end
        return any(event > end and elsewhere(event) for key in keys for event in self._reads[key])

    def _begin(self, name: str) -> int:
        while name and name not in self.spans:
            name = name.rpartition(".")[0]
        return self.spans[name].begin

    def _read(self, value: Any) -> None:
        self._events += 1
        for tensor in tensors_in(value):
            if (key := _key(tensor)) in self._reads:
                self._reads[key].append(self._events)

    def _hooks(self, calls: Calls) -> Iterator[RemovableHandle]:
        inputs: dict[str, list[tuple[Tensor, int]]] = {}

        def begin(name: str, given: Any) -> None:
            self._events += 1
            if name in self.spans:
                self.spans[name].times += 1
            else:
                self.spans[name] = Span(self._events, calls=-calls.time)
            inputs[name] = [(tensor, _version(tensor)) for tensor in tensors_in(given)]

        def end(name: str, output: Any) -> None:
            self._events += 1
            span = self.spans[name]
            span.end = self._events
            if span.times == 1:
                span.calls += calls.time
            given = inputs.pop(name)
            self._alive += [given, output]
            self.nbytes[name] = sum(map(_nbytes, tensors_in(output)))
            self._outputs[name] = {_key(tensor) for tensor in tensors_in(output)}
            changed = {_key(tensor) for tensor, version in given if _version(tensor) != version}
            self._passed[name] = changed | self._outputs[name] & {_key(tensor) for tensor, _ in given}
            for key in self._outputs[name] | changed:
                self._reads.setdefault(key, [])

        for module, name in self._names.items():
            yield module.register_forward_pre_hook(lambda _, *given, name=name: begin(name, given), with_kwargs=True)
            yield module.register_forward_hook(lambda _, args, output, name=name: end(name, output))


class _Reads(TorchFunctionMode):
    """Hands the tensors that any function reads to ``see``."""

    def __init__(self, see: Callable[[Any], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation_name(func) not in METADATA:
            self.see((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _key(tensor: Tensor) -> int:
    """The same for all views of one memory, as long as that lives."""
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata)


def _nbytes(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.nbytes)


def _version(tensor: Tensor) -> int:
    """Grows with every change in place."""
    with torch._C.DisableTorchFunction():
        return 0 if tensor.is_inference() else tensor._version


def _tensors(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]
