"""Find the groups of a model by watching one forward pass.

Every torch function of a real forward pass is seen through a ``TorchFunctionMode``; a record beside each tensor says
which components stand along which axis. Python control flow, timm's and transformers' own helpers, and any
``nn.Module`` are followed without a symbolic graph. What is not understood *freezes* the components it touches, with
a reason: no operation is ever guessed to be elementwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .coupling import Couplings
from .groups import Operator, Structure

ELEMENTWISE = frozenset(
    """relu relu_ relu6 silu silu_ gelu sigmoid sigmoid_ tanh tanh_ hardswish hardswish_ hardsigmoid hardsigmoid_
    hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu celu mish mish_ softplus softsign logsigmoid clamp clamp_
    clip exp sqrt rsqrt abs neg square pow __pow__ __neg__ erf dropout dropout_ feature_dropout dropout1d dropout2d
    dropout3d alpha_dropout contiguous clone detach to float half bfloat16 double type type_as requires_grad_
    quick_gelu cpu cuda""".split()
)
MOVEMENT = frozenset(
    """view reshape flatten unflatten permute transpose swapaxes movedim unsqueeze squeeze expand expand_as repeat
    chunk split tensor_split split_with_sizes __getitem__ narrow select unbind roll flip t mT T view_as reshape_as
    cat concat concatenate stack""".split()
)
BINARY = frozenset(
    """add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ rsub mul mul_ __mul__ __rmul__ __imul__ div
    div_ __truediv__ __rtruediv__ __div__ true_divide maximum minimum multiply addcmul""".split()
)
POOLING = frozenset(
    """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d interpolate upsample
    boolean_dispatch _max_pool2d max_pool2d_with_indices""".split()
)
REDUCTION = frozenset("mean sum amax amin".split())
CONVS = frozenset("conv1d conv2d conv3d".split())
METADATA = frozenset("size dim numel __len__ stride is_floating_point item tolist data_ptr is_contiguous".split())
# operations that read the channel axis as a whole: named so that the refusal says what it is
MIXING = {
    "layer_norm": "a LayerNorm normalises across these channels",
    "rms_norm": "an RMSNorm normalises across these channels",
    "group_norm": "a GroupNorm normalises across these channels",
    "softmax": "a softmax runs across these channels",
    "normalize": "a normalisation runs across these channels",
}


@dataclass(frozen=True)
class Axis:
    """Components along one axis of a tensor: ``ids`` int64 ``(size of that axis,)``."""

    dim: int
    ids: Tensor


class Unobserved(Exception):
    pass


class ChannelTracer(TorchFunctionMode):
    """Watches one forward pass and fills :class:`Couplings`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.couplings = Couplings()
        self.records: dict[int, Axis | None] = {}
        self.alive: list[Any] = []
        self.uses: Counter[int] = Counter()
        self.written_by: dict[int, str] = {}
        self.norm_of: dict[str, tuple[str, int]] = {}
        self.macs: Counter[str] = Counter()
        self.biased: dict[str, bool] = {}
        self.path: list[str] = []
        self.names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.names.setdefault(id(tensor), name)
            self.remember(tensor, None)
        self.parameters = {id(p) for p in model.parameters()}

    # -- records ---------------------------------------------------------------------------------------------------
    def remember(self, tensor: Tensor, record: Axis | None) -> None:
        self.records[id(tensor)] = record
        self.alive.append(tensor)

    def record(self, value: Any) -> Axis | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self.records:
            raise Unobserved
        found = self.records[id(value)]
        if found is None and id(value) in self.parameters:
            wide = [d for d, size in enumerate(value.shape) if size > 1]
            if len(wide) == 1:
                found = Axis(wide[0], self.couplings.parameter(self.names[id(value)], value.shape[wide[0]]))
                self.records[id(value)] = found
        return found

    @property
    def where(self) -> str:
        return self.path[-1] if self.path else "the top level"

    def freeze(self, record: Axis | None, reason: str) -> None:
        if record is not None:
            self.couplings.freeze(record.ids, f"{reason} ({self.where})")

    # -- dispatch --------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors_in((args, kwargs)))
        # in-place operations overwrite the record of their input: read it before running
        before: dict[int, Axis | None] = {}
        name = getattr(func, "__name__", str(func))
        interesting = name not in METADATA
        if interesting:
            for tensor in inputs:
                try:
                    before[id(tensor)] = self.record(tensor)
                except Unobserved:
                    self.couplings.freeze_everything(f"an operation before {self.where} could not be observed")
                    self.remember(tensor, None)
                    before[id(tensor)] = None
        out = func(*args, **kwargs)
        if not interesting:
            return out
        outputs = list(tensors_in(out))
        if not outputs:
            return out
        self.uses.update({id(t) for t in inputs})
        tracked = [t for t in inputs if before.get(id(t)) is not None]
        if name == "__get__":
            name = "T" if any(o.shape != i.shape for o, i in zip(outputs, inputs, strict=False)) else "to"
        elif name == "__set__":
            self.unknown(tracked, before, "assignment")
            return out
        if not tracked and name not in CONVS and name not in ("linear", "addmm", "batch_norm"):
            for tensor in outputs:
                self.remember(tensor, None)
            return out
        with torch._C.DisableTorchFunction():
            results = self.rule(name, func, args, kwargs, inputs, outputs, before)
        for tensor, record in zip(outputs, results, strict=True):
            self.remember(tensor, record)
        return out

    def rule(self, name, func, args, kwargs, inputs, outputs, before) -> list[Axis | None]:  # type: ignore[no-untyped-def]
        tracked = [t for t in inputs if before.get(id(t)) is not None]
        get = lambda t: before.get(id(t)) if isinstance(t, Tensor) else None  # noqa: E731
        if name in CONVS:
            return [self.conv(args, kwargs, outputs[0], get)]
        if name == "linear":
            return [self.linear(args, kwargs, outputs[0], get, transposed=False)]
        if name == "addmm" and len(args) == 3:
            swapped = (args[1], args[2], args[0])
            return [self.linear(swapped, kwargs, outputs[0], get, transposed=True)]
        if name in ("batch_norm", "instance_norm"):
            return [self.batch_norm(args, kwargs, outputs[0], get)]
        if name == "prelu":
            return [self.prelu(args[1], get(args[0]))]
        first = get(inputs[0]) if inputs else None
        if name in MIXING:
            return [self.mixing(name, args, kwargs, first)]
        if name in ELEMENTWISE and len(tracked) == 1 and outputs[0].shape == tracked[0].shape:
            return [get(tracked[0])]
        if name in BINARY:
            return self.binary(inputs, outputs, before)
        if name in POOLING and first is not None and first.dim == 1:
            return [first] * len(outputs)
        if name == "pad" and first is not None and outputs[0].shape[first.dim] == inputs[0].shape[first.dim]:
            pads = args[1] if len(args) > 1 else kwargs["pad"]
            if inputs[0].ndim - len(pads) // 2 > first.dim:
                return [first]
        if name in REDUCTION and first is not None:
            return [self.reduce(args, kwargs, inputs[0], outputs[0], first)]
        if name in MOVEMENT:
            return self.move(name, func, args, kwargs, inputs, outputs, before)
        return self.unknown(tracked, before, name, len(outputs))

    # -- rules -----------------------------------------------------------------------------------------------------
    def unknown(self, tracked, before, name, count: int = 0) -> list[Axis | None]:  # type: ignore[no-untyped-def]
        for tensor in tracked:
            self.freeze(before[id(tensor)], f"the operation '{name}' is not understood")
        return [None] * count

    def owner(self, weight: Any) -> str | None:
        name = self.names.get(id(weight))
        return name.rpartition(".")[0] if name and name.endswith((".weight", ".running_mean")) else None

    def conv(self, args, kwargs, out, get) -> Axis | None:  # type: ignore[no-untyped-def]
        x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        module, record = self.owner(weight), get(x)
        if module is None:
            self.freeze(record, "a convolution computes its weight")
            return None
        if record is not None and (record.dim != 1 or x.ndim == weight.ndim - 1):
            self.freeze(record, "a convolution runs across these channels")
            record = None
        self.macs[module] += out[0].numel() * weight[0].numel()
        if groups > 1 and groups == x.shape[1]:
            if record is None:
                return Axis(1, self.couplings.produce(module, weight.shape[0], groups))
            ids = record.ids.repeat_interleave(weight.shape[0] // groups)
            self.couplings.along(module, ids)
            return Axis(1, ids)
        if record is not None:
            self.couplings.read(module, record.ids, groups)
        self.biased[module] = bias is not None
        self.written_by[id(out)] = module
        return Axis(1, self.couplings.produce(module, weight.shape[0], groups))

    def linear(self, args, kwargs, out, get, transposed) -> Axis | None:  # type: ignore[no-untyped-def]
        x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        module, record = self.owner(weight), get(x)
        if module is None or (transposed and type(weight) is not nn.Parameter):
            self.freeze(record, "a linear map computes its weight")
            return None
        last = x.ndim - 1
        if record is not None and record.dim != last:
            self.freeze(record, "a linear map runs across another axis")
            record = None
        self.macs[module] += out[0].numel() * x.shape[-1] if x.ndim > 1 else out.numel() * x.shape[-1]
        if record is not None:
            self.couplings.read(module, record.ids, 1)
        self.biased[module] = bias is not None
        self.written_by[id(out)] = module
        return Axis(out.ndim - 1, self.couplings.produce(module, out.shape[-1], 1))

    def batch_norm(self, args, kwargs, out, get) -> Axis | None:  # type: ignore[no-untyped-def]
        x = args[0]
        values = [*args[1:5], *kwargs.values()]
        owners = [o for o in (self.owner(v) for v in values if isinstance(v, Tensor)) if o]
        record = get(x)
        if record is None:
            return None
        if record.dim != 1 or not owners:
            self.freeze(record, "a BatchNorm runs across another axis")
            return None
        self.couplings.along(owners[0], record.ids)
        if id(x) in self.written_by:
            self.norm_of[self.written_by[id(x)]] = (owners[0], id(x))
        return record

    def prelu(self, weight: Tensor, record: Axis | None) -> Axis | None:
        if record is not None and weight.numel() > 1:
            self.couplings.unite(self.couplings.parameter(self.names[id(weight)], weight.numel()), record.ids)
        return record

    def mixing(self, name, args, kwargs, first) -> Axis | None:  # type: ignore[no-untyped-def]
        x = args[0]
        if first is None:
            return None
        if name in ("layer_norm", "rms_norm"):
            shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            mixed = first.dim >= x.ndim - len(shape)
        elif name == "group_norm":
            count = args[1] if len(args) > 1 else kwargs["num_groups"]
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            mixed = first.dim != 1 or count != x.shape[1]
            if not mixed and self.owner(weight):
                self.couplings.along(self.owner(weight), first.ids)
        else:
            dim = args[1] if len(args) > 1 and args[1] is not None else kwargs.get("dim", 1 if name == "normalize" else -1)
            mixed = dim is None or dim % x.ndim == first.dim
        if mixed:
            self.freeze(first, MIXING[name])
        return first

    def reduce(self, args, kwargs, x, out, first) -> Axis | None:  # type: ignore[no-untyped-def]
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        if dims is None:
            dims = tuple(range(x.ndim))
        dims = {d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims)}
        if first.dim in dims:
            self.freeze(first, "a mean or sum runs across these channels")
            return None
        return Axis(first.dim if keep else first.dim - sum(d < first.dim for d in dims), first.ids)

    def binary(self, inputs, outputs, before) -> list[Axis | None]:  # type: ignore[no-untyped-def]
        out = outputs[0]
        kept: Axis | None = None
        for tensor in inputs:
            record = before.get(id(tensor))
            if record is None:
                continue
            moved = Axis(record.dim + out.ndim - tensor.ndim, record.ids)
            if len(moved.ids) != out.shape[moved.dim]:
                self.freeze(moved, "a single channel multiplies all others")
            elif kept is None:
                kept = moved
            elif kept.dim != moved.dim:
                self.freeze(kept, "two tensors with channels on different axes are combined")
                self.freeze(moved, "two tensors with channels on different axes are combined")
                kept = None
            else:
                self.couplings.unite(kept.ids, moved.ids)
        for tensor in inputs:
            if kept is not None and before.get(id(tensor)) is None and tensor.ndim:
                dim = kept.dim - (out.ndim - tensor.ndim)
                if dim >= 0 and tensor.shape[dim] > 1:
                    self.freeze(kept, "a fixed or unknown tensor spans these channels")
                    return [None] * len(outputs)
        return [kept] * len(outputs)

    def move(self, name, func, args, kwargs, inputs, outputs, before) -> list[Axis | None]:  # type: ignore[no-untyped-def]
        tracked = [t for t in inputs if before.get(id(t)) is not None]
        if any(t.ndim and before.get(id(t)) is None for t in inputs):
            # joined with something that carries no components, or indexed by a tensor
            if name not in ("cat", "concat", "concatenate"):
                return self.unknown(tracked, before, name, len(outputs))
        full = {id(t): spread(before[id(t)], t) for t in tracked}
        fixed = {id(t): torch.full_like(t, -1, dtype=torch.int64) for t in inputs if id(t) not in full}
        ids = list(tensors_in(func(*swap(args, full | fixed), **swap(kwargs, full | fixed))))
        results = [detect(i) for i in ids]
        if any(r is None or bool((r.ids < 0).all()) for r in results):
            for tensor in tracked:
                self.freeze(before[id(tensor)], f"'{name}' folds these channels into another shape")
            return [None] * len(outputs)
        source = before[id(tracked[0])]
        if name in ("chunk", "tensor_split", "split", "split_with_sizes", "__getitem__", "narrow", "select", "unbind"):
            cut = sum(len(r.ids) for r in results) if len(results) > 1 else len(results[0].ids)
            parted = any(len(r.ids) != len(source.ids) for r in results)
            if parted and name in ("chunk",) and cut == len(source.ids) and len({len(r.ids) for r in results}) == 1:
                self.couplings.chunk(source.ids, len(results))
            elif parted:
                self.freeze(source, f"'{name}' cuts these channels at fixed places")
                return [None] * len(outputs)
        return list(results)


# -- helpers -------------------------------------------------------------------------------------------------------
def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def swap(value: Any, table: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return table.get(id(value), value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(swap(v, table) for v in value)
    if isinstance(value, dict):
        return {k: swap(v, table) for k, v in value.items()}
    return value


def spread(record: Axis, like: Tensor) -> Tensor:
    shape = [1] * like.ndim
    shape[record.dim] = len(record.ids)
    return record.ids.view(shape).expand(like.shape)


def detect(ids: Tensor) -> Axis | None:
    """The one axis along which component numbers vary, or None."""
    for dim, size in enumerate(ids.shape):
        if size < 2:
            continue
        vector = ids.movedim(dim, 0).reshape(size, -1)[:, 0]
        shape = [1] * ids.ndim
        shape[dim] = size
        if bool((ids == vector.view(shape)).all()):
            return Axis(dim, vector.clone()) if bool((vector != vector[0]).any()) else None
    return None


@contextmanager
def follow_modules(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep ``path`` the stack of module names being run."""

    def leave(*_: Any) -> None:
        path.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: path.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(model: nn.Module, run: Callable[[nn.Module], Any]) -> Structure:
    """Watch ``run(model)``, one forward pass on a batch of at least two samples, and return the groups found.

    The model must be in eval mode. Costs one forward pass; nothing of the model is changed.
    """
    tracer = ChannelTracer(model)
    with torch.no_grad(), follow_modules(model, tracer.path), tracer:
        outputs = run(model)
    tracer.path.clear()
    for tensor in tensors_in(outputs if isinstance(outputs, (Tensor, list, tuple, dict)) else vars(outputs)):
        record = tracer.records.get(id(tensor))
        if record is not None:
            tracer.couplings.freeze(record.ids, "these channels are the model's output")
    operators = {}
    for module, macs in tracer.macs.items():
        sink = "bias" if tracer.biased.get(module) else None
        if sink is None and module in tracer.norm_of:
            norm, tensor_id = tracer.norm_of[module]
            behind = model.get_submodule(norm)
            if tracer.uses[tensor_id] == 1 and getattr(behind, "running_mean", None) is not None:
                sink = norm
        operators[module] = Operator(module, macs, sink)
    return Structure(tracer.couplings.groups(), operators)
