"""Find the groups of a model by watching one forward pass.

Every torch function of a real forward pass is seen through a ``TorchFunctionMode``; a record beside each tensor says
which components stand along which axis. Python control flow, timm's and transformers' own helpers, and any
``nn.Module`` are followed without a symbolic graph. What is not understood *freezes* the components it touches, with
a reason: no operation is ever guessed to be elementwise.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from .coupling import Couplings
from .groups import Operator, Structure
from .operations import (
    BINARY,
    CONVS,
    ELEMENTWISE,
    JOINS,
    METADATA,
    MIXING,
    MOVEMENT,
    PLACED,
    POOLING,
    REDUCTION,
    Axis,
    Call,
    operation_name,
    tensors_in,
)

# these prepare their input themselves (padding, a view) before they run their operator
PREPARING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, Conv1D)


class ChannelTracer(TorchFunctionMode):
    """Watches one forward pass and fills :class:`Couplings`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.couplings = Couplings()
        self.records: dict[int, Axis | None] = {}
        self.alive: list[Tensor] = []
        self.uses: Counter[int] = Counter()
        self.written_by: dict[int, str] = {}
        self.norms: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.calls: Counter[str] = Counter()
        self.macs: Counter[str] = Counter()
        self.biased: dict[str, bool] = {}
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
    def remember(self, tensor: Tensor, record: Axis | None) -> None:
        self.records[id(tensor)] = record
        self.alive.append(tensor)

    def record(self, tensor: Tensor) -> Axis | None:
        """What is known of a tensor; a parameter with one wide axis gets components of its own at first sight."""
        if id(tensor) not in self.records:
            self.couplings.freeze_everything(f"an operation before {self.where} could not be observed")
            self.remember(tensor, None)
        found = self.records[id(tensor)]
        if found is None and id(tensor) in self.parameters and id(tensor) not in self.tied:
            wide = [d for d, size in enumerate(tensor.shape) if size > 1]
            if len(wide) == 1:
                found = Axis(wide[0], self.couplings.parameter(self.names[id(tensor)], tensor.shape[wide[0]]))
                self.records[id(tensor)] = found
        return found

    @property
    def where(self) -> str:
        return self.path[-1][0] if self.path and self.path[-1][0] else "the top level"

    def freeze(self, record: Axis | None, reason: str) -> None:
        if record is not None:
            self.couplings.freeze(record.ids, f"{reason} ({self.where})")

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
        results: list[Axis | None] = [None] * len(outputs)
        if call.known or name in CONVS or name in ("linear", "addmm"):
            with torch._C.DisableTorchFunction():
                results = self.rule(call)
        for tensor, record in zip(outputs, results, strict=True):
            self.remember(tensor, record)
        return out

    def rule(self, call: Call) -> list[Axis | None]:
        """The records of a call's outputs."""
        name, known = call.name, call.known
        if name in CONVS:
            return [self.conv(call)]
        if name == "linear":
            return [self.linear(call, call.argument(0, "input"), call.argument(1, "weight"), call.argument(2, "bias"))]
        if name == "addmm" and len(call.args) == 3:
            bias, x, weight = call.args
            return [self.linear(call, x, weight, bias, transposed=True)]
        if name in ("batch_norm", "instance_norm"):
            return [self.batch_norm(call)]
        if name == "prelu":
            return [self.prelu(call.args[1], call.axis(call.args[0]))]
        first = call.axis(call.inputs[0]) if call.inputs else None
        if name in MIXING:
            return [self.mixing(call, first)]
        if name in ("type_as", "data"):
            return [first]
        if name in ELEMENTWISE and len(known) == 1 and call.outputs[0].shape == known[0][0].shape:
            if all(t.numel() == 1 for t in call.inputs if t is not known[0][0]):
                return [known[0][1]]
        if name in BINARY:
            return self.binary(call)
        if name in POOLING and first is not None and first.dim == 1:
            return [first] * len(call.outputs)
        if name == "pad" and first is not None:
            pads = call.argument(1, "pad")
            if call.inputs[0].ndim - len(pads) // 2 > first.dim:
                return [first]
        if name in REDUCTION and first is not None:
            return [self.reduce(call, first)]
        if name in MOVEMENT:
            return self.move(call)
        return self.unknown(call)

    # -- rules -----------------------------------------------------------------------------------------------------
    def refuse(self, call: Call, reason: str) -> list[Axis | None]:
        for _, axis in call.known:
            self.freeze(axis, reason)
        return [None] * len(call.outputs)

    def unknown(self, call: Call) -> list[Axis | None]:
        return self.refuse(call, f"the operation '{call.name}' is not understood")

    def operator(self, x: Tensor, weight: Tensor) -> tuple[str, str | None]:
        """The module that owns an operator's weight, and what stands against editing it there, if anything does."""
        name = self.names.get(id(weight), "")
        owner = name.rpartition(".")[0]
        if not name.endswith(".weight") or id(weight) not in self.parameters:
            return "", "an operator computes its weight"
        module = self.model.get_submodule(owner)
        if not isinstance(module, (_ConvNd, nn.Linear, Conv1D)):
            return "", f"a {type(module).__name__} is no layer that modhifi can edit"
        if id(weight) in self.tied:
            return owner, "the weight is shared with another layer"
        if not self.path or self.path[-1][0] != owner:
            return owner, f"the weight of {owner} is used outside that layer"
        if type(module) not in PREPARING and self.path[-1][1] != id(x):
            return owner, "the layer changes its input before its operator"
        return owner, None

    def conv(self, call: Call) -> Axis | None:
        x, weight = call.argument(0, "input"), call.argument(1, "weight")
        groups = call.argument(6, "groups", 1)
        module, obstacle = self.operator(x, weight)
        record = call.axis(x)
        if obstacle:
            self.freeze(record, obstacle)
            return None
        if record is not None and (record.dim != 1 or x.ndim < weight.ndim):
            self.freeze(record, "a convolution runs across these channels")
            record = None
        out = call.outputs[0]
        self.macs[module] += out.numel() * weight[0].numel()
        if record is not None and groups > 1 and groups == x.shape[1]:
            ids = record.ids.repeat_interleave(weight.shape[0] // groups)
            self.couplings.along(module, ids)
            return Axis(1, ids)
        return self.product(module, record, out, 1, groups, call.argument(2, "bias"))

    def linear(self, call: Call, x: Tensor, weight: Tensor, bias: Any, transposed: bool = False) -> Axis | None:
        module, obstacle = self.operator(x, weight)
        record = call.axis(x)
        if obstacle is None and transposed and not isinstance(self.model.get_submodule(module), Conv1D):
            obstacle = "a linear map stores its weight transposed"
        if obstacle:
            self.freeze(record, obstacle)
            return None
        if record is not None and record.dim != x.ndim - 1:
            self.freeze(record, "a linear map runs across another axis")
            record = None
        out = call.outputs[0]
        self.macs[module] += out.numel() * x.shape[-1]
        return self.product(module, record, out, out.ndim - 1, 1, bias)

    def product(self, module: str, record: Axis | None, out: Tensor, dim: int, groups: int, bias: Any) -> Axis:
        if record is not None:
            self.couplings.read(module, record.ids, groups)
        self.calls[module] += 1
        self.biased[module] = bias is not None
        self.written_by[id(out)] = module
        return Axis(dim, self.couplings.produce(module, out.shape[dim], groups))

    def batch_norm(self, call: Call) -> Axis | None:
        x = call.args[0]
        record = call.axis(x)
        tensors = [v for v in (*call.args[1:], *call.kwargs.values()) if isinstance(v, Tensor)]
        owners = {self.names.get(id(t), "").rpartition(".")[0] for t in tensors}
        if record is None:
            return None
        if record.dim != 1 or len(owners) != 1 or self.tied & {id(t) for t in tensors}:
            self.freeze(record, "a BatchNorm has no statistics of its own for these channels")
            return None
        owner = owners.pop()
        self.couplings.along(owner, record.ids)
        self.calls[owner] += 1
        if id(x) in self.written_by:
            self.norms[self.written_by[id(x)]].append((owner, id(x)))
        return record

    def prelu(self, weight: Tensor, record: Axis | None) -> Axis | None:
        if record is not None and weight.numel() > 1:
            slopes = self.record(weight)
            if slopes is None or record.dim != 1:
                self.freeze(record, "a PReLU has no slopes of its own for these channels")
            else:
                self.couplings.unite(slopes.ids, record.ids)
        return record

    def mixing(self, call: Call, first: Axis | None) -> Axis | None:
        x, name = call.args[0], call.name
        if first is None:
            return None
        if name in ("layer_norm", "rms_norm"):
            mixed = first.dim >= x.ndim - len(call.argument(1, "normalized_shape"))
        elif name == "group_norm":
            weight = call.argument(2, "weight")
            owner = self.names.get(id(weight), "").rpartition(".")[0]
            mixed = first.dim != 1 or call.argument(1, "num_groups") != x.shape[1] or not owner
            if not mixed:
                self.couplings.along(owner, first.ids)
        else:
            dim = call.argument(2, "dim", 1) if name == "normalize" else call.argument(1, "dim")
            mixed = not isinstance(dim, int) or dim % x.ndim == first.dim
        if mixed:
            self.freeze(first, MIXING[name])
        return first

    def reduce(self, call: Call, first: Axis) -> Axis | None:
        x = call.inputs[0]
        dims = call.argument(1, "dim")
        if not isinstance(dims, (int, tuple, list)):
            dims = tuple(range(x.ndim))
        reduced = {d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims)}
        if first.dim in reduced:
            self.freeze(first, "a mean or sum runs across these channels")
            return None
        kept = call.argument(2, "keepdim", False)
        return Axis(first.dim if kept else first.dim - sum(d < first.dim for d in reduced), first.ids)

    def binary(self, call: Call) -> list[Axis | None]:
        out = call.outputs[0]
        axes = [(t, Axis(a.dim + out.ndim - t.ndim, a.ids)) for t, a in call.known]
        wide = []
        for _, axis in axes:
            if len(axis.ids) == out.shape[axis.dim]:
                wide.append(axis)
            else:
                self.freeze(axis, "a single channel multiplies all others")
        if not wide:
            return [None] * len(call.outputs)
        first, *others = wide
        if any(axis.dim != first.dim for axis in others):
            return self.refuse(call, "two tensors with channels on different axes are combined")
        for tensor in call.inputs:
            dim = first.dim - (out.ndim - tensor.ndim)
            if call.axis(tensor) is None and dim >= 0 and tensor.shape[dim] > 1:
                return self.refuse(call, "a fixed or unknown tensor spans these channels")
        for axis in others:
            self.couplings.unite(first.ids, axis.ids)
        return [first] * len(call.outputs)

    def move(self, call: Call) -> list[Axis | None]:
        known = call.known
        if len(known) < sum(t.ndim > 0 for t in call.inputs) and call.name not in JOINS:
            return self.unknown(call)  # joined with something that carries no components, or indexed by a tensor
        results = [axis for axis in call.moved() if axis is not None and bool((axis.ids >= 0).any())]
        if len(results) < len(call.outputs):
            return self.refuse(call, f"'{call.name}' folds these channels into another shape")
        source = known[0][1].ids
        if call.name in PLACED and not all(torch.equal(axis.ids, source) for axis in results):
            pieces = torch.cat([axis.ids for axis in results])
            equal = len({len(axis.ids) for axis in results}) == 1
            if call.name != "chunk" or not equal or not torch.equal(pieces, source):
                return self.refuse(call, f"'{call.name}' takes these channels from fixed places")
            self.couplings.chunk(source, len(results))
        return list(results)


def _operators(tracer: ChannelTracer) -> Iterable[Operator]:
    for module, macs in tracer.macs.items():
        sink = "bias" if tracer.biased.get(module) else None
        norms = tracer.norms.get(module, [])
        if sink is None and len(norms) == 1 and tracer.calls[module] == 1:
            norm, written = norms[0]
            has_mean = getattr(tracer.model.get_submodule(norm), "running_mean", None) is not None
            if has_mean and tracer.calls[norm] == 1 and tracer.uses[written] == 1:
                sink = norm
        yield Operator(module, macs // max(1, tracer.samples), sink)


def trace(model: nn.Module, run: Callable[[nn.Module], Any]) -> Structure:
    """Watch ``run(model)``, one forward pass on a batch of at least two samples, and return the groups found.

    The model must be in eval mode. Costs one forward pass; nothing of the model is changed.
    """
    tracer = ChannelTracer(model)
    with torch.no_grad(), tracer.following(), tracer:
        outputs = run(model)
    for tensor in tensors_in(outputs if isinstance(outputs, (Tensor, list, tuple, dict)) else vars(outputs)):
        tracer.uses[id(tensor)] += 1
        record = tracer.records.get(id(tensor))
        if record is not None:
            tracer.couplings.freeze(record.ids, "these channels are the model's output")
    return Structure(tracer.couplings.groups(), {o.module: o for o in _operators(tracer)})
