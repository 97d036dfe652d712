"""Watch one forward pass: every torch function is seen, and a record beside each tensor says what it carries."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi.structure.couplings import Couplings
from modhifi.structure.operators import last_wide
from modhifi.structure.torch_ops import CONVS, METADATA, Axis, Call, Grid, operation_name, tensors_in


class Watcher(TorchFunctionMode):
    """The records of one pass, and the couplings that the rules of `tracer` find in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.couplings = Couplings()
        self.records: dict[int, Axis | Grid | None] = {}
        self.alive: list[Tensor] = []
        self.uses: Counter[int] = Counter()
        self.written_by: dict[int, str] = {}
        self.norms: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.calls: Counter[str] = Counter()
        self.macs: Counter[str] = Counter()
        self.biased: dict[str, bool] = {}
        self.obstacles: dict[str, str] = {}
        self.path: list[tuple[str, int]] = []
        self.samples = 0
        self.names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.names.setdefault(id(tensor), name)
            self.remember(tensor, None)
        self.parameters = {id(p) for p in model.parameters()}
        holders: dict[int, set[int]] = defaultdict(set)
        for name, tensor in model.named_parameters(remove_duplicate=False):
            holders[id(tensor)].add(id(model.get_submodule(name.rpartition(".")[0])))
        self.tied = {key for key, modules in holders.items() if len(modules) > 1}

    # -- records ---------------------------------------------------------------------------------------------------
    def remember(self, tensor: Tensor, record: Axis | Grid | None) -> None:
        self.records[id(tensor)] = record
        self.alive.append(tensor)

    def record(self, tensor: Tensor) -> Axis | Grid | None:
        """What is known of a tensor; a free parameter gets components of its own, along its last wide axis.

        Free are parameters with one wide axis, and tables: those not called ``weight``, which layers multiply with.
        """
        if id(tensor) not in self.records:
            self.couplings.freeze_everything(f"an operation before {self.where} could not be observed")
            self.remember(tensor, None)
        found = self.records[id(tensor)]
        if found is None and id(tensor) in self.parameters and id(tensor) not in self.tied:
            wide, name = sum(size > 1 for size in tensor.shape), self.names[id(tensor)]
            if wide == 1 or (wide == 2 and tensor.ndim == 2 and name.rpartition(".")[2] != "weight"):
                dim = last_wide(tensor)
                found = Axis(dim, self.couplings.parameter(name, tensor.shape[dim]))
                self.records[id(tensor)] = found
        return found

    @property
    def where(self) -> str:
        return self.path[-1][0] if self.path and self.path[-1][0] else "the top level"

    def freeze(self, record: Axis | Grid | None, reason: str) -> None:
        if record is not None:
            self.couplings.freeze(record.ids.flatten(), f"{reason} ({self.where})")

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep ``path`` the stack of modules being run, each with the tensor it received."""

        def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            received = next(tensors_in((args, kwargs)), None)
            if not self.samples and received is not None and received.ndim:
                self.samples = len(received)
            self.path.append((name, id(received)))

        handles: list[Any] = []
        for name, module in self.model.named_modules():
            handles.append(
                module.register_forward_pre_hook(lambda m, a, k, name=name: enter(name, a, k), with_kwargs=True)
            )
            handles.append(module.register_forward_hook(lambda *_: (self.path.pop(), None)[1], always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.path.clear()

    # -- dispatch --------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if name in METADATA:
            return func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        # in-place operations overwrite the record of their input: read it before running
        axes = {id(tensor): self.record(tensor) for tensor in inputs}
        out = func(*args, **kwargs)
        outputs = list(tensors_in(out))
        call = Call(name, func, args, kwargs, inputs, outputs, axes)
        if not outputs:
            if getattr(func, "__name__", "") != "__get__":
                self.unknown(call)
            return out
        self.uses.update({id(t) for t in inputs})
        results: list[Axis | Grid | None] = [None] * len(outputs)
        if call.known or call.grids or name in CONVS or name in ("linear", "addmm"):
            with torch._C.DisableTorchFunction():
                results = self.rule(call)
        for tensor, record in zip(outputs, results, strict=True):
            self.remember(tensor, record)
        return out

    @abstractmethod
    def rule(self, call: Call) -> list[Axis | Grid | None]:
        """The records of a call's outputs."""

    def refuse(self, call: Call, reason: str) -> list[Axis | Grid | None]:
        for _, record in call.records:
            self.freeze(record, reason)
        return [None] * len(call.outputs)

    def unknown(self, call: Call) -> list[Axis | Grid | None]:
        return self.refuse(call, f"the operation '{call.name}' is not understood")
