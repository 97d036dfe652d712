"""Carry bounds through one forward pass of the original network: every torch function is seen, its rule looked up.

The pass runs on clean activations. Where a parameter differs in the modified network, the operation is repeated with
that parameter on the clean input: the difference is the layer's own error (form B: clean activations, modified tails).
What has no rule makes the bound infinite and is named; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi.bounds.propagation.affine import ErrorSource, Norms, Pending
from modhifi.bounds.propagation.float64 import CASTS, kept_double
from modhifi.bounds.propagation.interval import Bound, nothing, settle_nan, slice_norm, total
from modhifi.bounds.propagation.module_rules import module_rule
from modhifi.bounds.propagation.newton import Newton
from modhifi.bounds.propagation.rules import RULES
from modhifi.bounds.propagation.walked_call import WalkedCall
from modhifi.structure.torch_ops import METADATA, operation_name, swap, tensors_in, writes_in_place

# The number of whatever went through an operation without a rule.
LOST = -1


class Walker(TorchFunctionMode):
    """The records of one pass; use :func:`modhifi.bounds.propagation.propagate.walk`."""

    def __init__(self, dense: nn.Module, edited: nn.Module, batch: Tensor, norms: Norms, rounds: int) -> None:
        super().__init__()
        self.model, self.norms, self.samples = dense, norms, len(batch)
        self.records: dict[int, Bound | Pending] = {}
        self.alive: dict[int, Tensor] = {}
        self.storage: dict[int, list[int]] = {}
        self.twins: dict[int, Tensor] = {}
        self.newton = Newton(self.twins, rounds)
        self.names: dict[int, tuple[str, ...]] = {}
        self.sources: list[ErrorSource] = []
        self.missing: dict[str, str] = {}
        self.path: list[str] = []
        self.silent = 0
        self.tainted = self.branching = False
        theirs = {**dict(edited.named_parameters()), **dict(edited.named_buffers())}
        for name, tensor in [*dense.named_parameters(), *dense.named_buffers()]:
            self.remember(tensor, nothing(tensor.ndim))
            if not torch.equal(tensor, theirs[name]):
                self.twins[id(tensor)] = theirs[name]
                self.names[id(tensor)] = (name,)
        for module in dense.modules():
            for value in tensors_in(list(vars(module).values())):
                self.remember(value, nothing(value.ndim))
        moving = batch.is_floating_point()
        self.remember(
            batch, Bound(torch.zeros([1] * batch.ndim, dtype=torch.float64), {}, 1.0 if moving else torch.inf)
        )

    # -- records -------------------------------------------------------------------------------------------------------
    def remember(self, tensor: Tensor, record: Bound | Pending) -> None:
        """Set the record of a tensor, which is kept alive: an ``id`` must not be given twice."""
        if id(tensor) not in self.alive:
            self.alive[id(tensor)] = tensor
            self.storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(id(tensor))
        self.records[id(tensor)] = record

    def bound(self, tensor: Tensor) -> Bound:
        """The settled bound of a tensor; infinite, and named, for one that came from nowhere."""
        record = self.records.get(id(tensor))
        if record is None:
            self.lose("an operation that cannot be observed")
            record = self.unknown(tensor)
            self.remember(tensor, record)
        return record if isinstance(record, Bound) else record.settled(self.add_source)

    def unknown(self, out: Tensor) -> Bound:
        """The bound of a tensor that nothing is known of."""
        radius = torch.full([1] * out.ndim, torch.inf, dtype=torch.float64)
        return Bound(radius, dict.fromkeys((LOST, *range(len(self.sources))), torch.inf), torch.inf)

    def add_source(self, pending: Pending, own: Tensor) -> int:
        """Number the own error ``own``, a radius, of a modified layer."""
        squared = float((pending.moved - pending.clean).double().square().sum())
        errors = total(own)
        if len(errors) != self.samples:
            # The batch axis is not in front here: every sample gets the whole batch's error.
            errors = errors.square().sum().sqrt().expand(self.samples)
        centre = pending.gap * pending.x.lip if pending.x.lip and pending.gap else 0.0
        self.sources.append(ErrorSource(pending.where, pending.parameters, errors, squared, centre))
        return len(self.sources) - 1

    def lose(self, reason: str, rungs: tuple[str, ...] = ("R1", "R2", "every input")) -> None:
        """Note, for each rung, the first place where its bound was lost."""
        for rung in rungs:
            self.missing.setdefault(rung, f"{reason} at {self.where}")

    @property
    def where(self) -> str:
        """The innermost module being run, as a reason names it."""
        return self.path[-1] if self.path and self.path[-1] else "the top level"

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep ``path``, and let modules with a rule of their own (RMSNorm) answer for what runs inside them."""
        handles: list[Any] = []
        for name, module in self.model.named_modules():
            rule = module_rule(module)

            def enter(m: nn.Module, args: Any, name: str = name, rule: Any = rule) -> None:
                self.path.append(name)
                self.silent += rule is not None

            def leave(m: nn.Module, args: Any, out: Any, name: str = name, rule: Any = rule) -> None:
                if rule is not None:
                    self.silent -= 1
                    if not self.silent and isinstance(out, Tensor):
                        with torch._C.DisableTorchFunction():
                            self.finish(rule, self.call(type(m).__name__, m, args, {}), [out])
                self.path.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.path.clear()

    # -- dispatch ------------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if name in METADATA or self.silent:
            return kept_double(name, args, func(*args, **kwargs))
        inputs = list(tensors_in((args, kwargs)))
        overwritten = inputs[0] if inputs and writes_in_place(func, kwargs) else None
        if overwritten is None:
            call = self.call(name, func, args, kwargs)
        else:
            before = overwritten.clone()
            self.copy_record(overwritten, before)
            table = {id(overwritten): before}
            call = self.call(name, _on_a_copy(func), swap(args, table), swap(kwargs, table))
            inputs[0] = before
        out = func(*args, **kwargs)
        if name in CASTS and isinstance(out, Tensor) and inputs[0].dtype == torch.float64 and out.is_floating_point():
            uncast: Tensor = kept_double(name, args, out)
            if uncast is out:
                self.copy_record(inputs[0], out)
            return uncast
        if overwritten is not None:
            self.overwritten(overwritten)
        outputs = list(tensors_in(out))
        if not outputs:
            if getattr(func, "__name__", "") not in ("__get__", "__set__") and any(
                not self.bound(t).constant for t in inputs
            ):
                self.escaped(name, inputs)
            return out
        with torch._C.DisableTorchFunction():
            self.finish(RULES.get(name), call, outputs)
        return out

    def call(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> WalkedCall:
        """An operation as its rule sees it."""
        return WalkedCall(
            name, func, args, kwargs, self.bound, self.twins, self.records, self.names, self.norms, self.where
        )

    def copy_record(self, source: Tensor, target: Tensor) -> None:
        """Let a tensor with the same values have the same record, path and twin."""
        self.bound(source)
        self.remember(target, self.records[id(source)])
        self.newton.copy(source, target)
        if id(source) in self.twins:
            self.twins[id(target)], self.names[id(target)] = self.twins[id(source)], self.names[id(source)]

    def overwritten(self, tensor: Tensor) -> None:
        """Other tensors on the same memory have changed values: nothing is known of them any more."""
        for other in self.storage.get(tensor.untyped_storage().data_ptr(), []):
            if other != id(tensor) and not self.bound(self.alive[other]).constant:
                self.records[other] = self.unknown(self.alive[other])
                self.newton.forget([self.alive[other]])
                self.lose("a tensor changed in place")

    def escaped(self, name: str, inputs: list[Tensor]) -> None:
        """A value left the network (a Python number, a condition): what follows may depend on it."""
        if any(not self.bound(t).still for t in inputs):
            self.tainted = True
            self.lose(name)
        elif not any(t.is_floating_point() for t in inputs):
            # Token ids steer the same inputs the same way: other inputs alone may have other constants.
            self.lose(name, ("every input",))
        else:
            # Both networks go the same way for one input, but other inputs may go another, with other constants.
            self.branching = True
            self.lose(name, ("R1", "every input"))

    def finish(
        self, rule: Callable[[WalkedCall, list[Tensor]], Any] | None, call: WalkedCall, outputs: list[Tensor]
    ) -> None:
        """Set the records of the outputs of one operation."""
        inputs = call.inputs
        # A pending operation stays pending: the rule may fold it with what follows.
        if all(not isinstance(self.records.get(id(t)), Pending) and self.bound(t).constant for t in inputs):
            twins = self.twinned(call, inputs)
            for place, tensor in enumerate(outputs):
                self.remember(tensor, nothing(tensor.ndim))
                if twins is not None and not torch.equal(twins[place], tensor):
                    self.twins[id(tensor)], self.names[id(tensor)] = twins[place], call.parameters
            self.newton.forget(outputs)
            return
        exact = all(t.is_floating_point() for t in outputs)
        results = None
        if rule is not None and exact:
            try:
                results = rule(call, outputs)
            except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                # Called in a way its rule does not foresee: it has no rule.
                results = None
        if rule is None or results is None:
            still = all(self.bound(t).still for t in inputs) and not any(id(t) in self.twins for t in inputs)
            if not still:
                self.lose(call.name)
            else:
                self.lose(call.name, ("every input",))
            for tensor in outputs:
                zero = torch.zeros([1] * tensor.ndim, dtype=torch.float64)
                self.remember(tensor, Bound(zero, {}, torch.inf) if still else self.unknown(tensor))
            self.newton.forget(outputs)
            return
        self.newton.follow(rule, call, outputs)
        for tensor, record in zip(outputs, results, strict=True):
            if isinstance(record, Bound):
                record = self.own_error(call, tensor, record) if len(outputs) == 1 else record
                if any(c == torch.inf for c in record.reach.values()):
                    self.lose(call.name, ("R1", "every input"))
                elif record.lip == torch.inf:
                    self.lose(call.name, ("every input",))
                if not bool(torch.isfinite(record.radius).all()):
                    self.lose(call.name, ("R2",))
            self.remember(tensor, record)

    def twinned(self, call: WalkedCall, inputs: list[Tensor]) -> list[Tensor] | None:
        """The outputs of an operation with the modified network's parameters; None where they are the same."""
        if not any(id(t) in self.twins for t in inputs):
            return None
        return list(tensors_in(call.edited_call()))

    def own_error(self, call: WalkedCall, out: Tensor, bound: Bound) -> Bound:
        """Add the error that the operation makes itself where one of its parameters is modified."""
        twins = self.twinned(call, call.inputs)
        if twins is None:
            return bound
        shape = list(bound.radius.shape)
        shape[0] = out.shape[0]
        own = slice_norm(twins[0] - out, shape)
        pending = Pending(None, bound, out, twins[0], call.parameters, call.where, "plain")
        number = self.add_source(pending, own)
        return Bound(settle_nan(bound.radius + own), {**bound.reach, number: 1.0}, bound.lip)


def _on_a_copy(func: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that writes into its first argument, without doing so."""

    def run(*args: Any, **kwargs: Any) -> Any:
        first = next(tensors_in((args, kwargs)))
        table = {id(first): first.clone()}
        return func(*swap(args, table), **swap(kwargs, table))

    return run
