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

from .attributes import described
from .coupling import Couplings
from .groups import Group, Operator, Structure, last_wide
from .operations import (
    BINARY,
    CONVS,
    CREATION,
    ELEMENTWISE,
    JOINS,
    METADATA,
    MIXING,
    MOVEMENT,
    NORMS,
    PLACED,
    POOLING,
    PRODUCTS,
    REDUCTION,
    RESHAPES,
    SUMS,
    Axis,
    Call,
    Grid,
    constant,
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

    def rule(self, call: Call) -> list[Axis | Grid | None]:
        """The records of a call's outputs."""
        name, known = call.name, call.known
        if name in CREATION:
            return [None] * len(call.outputs)
        if call.grids and name not in MOVEMENT:
            if name in ELEMENTWISE and len(call.inputs) == 1 and call.outputs[0].shape == call.inputs[0].shape:
                return [call.grids[0][1]]
            for _, grid in call.grids:
                self.freeze(grid, f"the operation '{name}' meets components on several axes")
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
        if name in PRODUCTS:
            return self.matrix_product(call)
        if name == "scaled_dot_product_attention":
            return self.attention(call)
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
    def refuse(self, call: Call, reason: str) -> list[Axis | Grid | None]:
        for _, record in call.records:
            self.freeze(record, reason)
        return [None] * len(call.outputs)

    def unknown(self, call: Call) -> list[Axis | Grid | None]:
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

    def obstruct(self, module: str, record: Axis | None, obstacle: str) -> None:
        """An operator whose layer cannot be edited: what it reads must stay, and nothing is known of what it writes."""
        self.obstacles[module or self.path[-1][0]] = obstacle
        self.freeze(record, obstacle)

    def conv(self, call: Call) -> Axis | None:
        x, weight = call.argument(0, "input"), call.argument(1, "weight")
        groups = call.argument(6, "groups", 1)
        module, obstacle = self.operator(x, weight)
        record = call.axis(x)
        if obstacle:
            self.obstruct(module, record, obstacle)
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
            self.obstruct(module, record, obstacle)
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
            if not isinstance(slopes, Axis) or record.dim != 1:
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
        place = 2 if call.name in NORMS else 1
        dims = call.argument(place, "dim")
        if not isinstance(dims, (int, tuple, list)):
            dims = tuple(range(x.ndim))
        reduced = {d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims)}
        if first.dim in reduced:
            self.freeze(first, "a mean, sum or norm runs across these channels")
            return None
        kept = call.argument(place + 1, "keepdim", False)
        return Axis(first.dim if kept else first.dim - sum(d < first.dim for d in reduced), first.ids)

    def binary(self, call: Call) -> list[Axis | Grid | None]:
        dims = call.outputs[0].ndim
        places = [(t, {d: d + dims - t.ndim for d in range(t.ndim)}) for t in call.inputs]
        return self.couple(call, places, "sum" if call.name in SUMS else None)

    def matrix_product(self, call: Call) -> list[Axis | Grid | None]:
        """Batch axes (heads) meet one another, rows and columns pass; what is summed over must stay."""
        if len(call.inputs) != 2 or min(t.ndim for t in call.inputs) < 2:
            return self.unknown(call)
        dims, places = call.outputs[0].ndim, []
        reverse = call.name == "__rmatmul__"
        for number, tensor in enumerate(reversed(call.inputs) if reverse else call.inputs):
            free = tensor.ndim - 2 + number  # the rows of the first, the columns of the second factor
            place = {d: d + dims - tensor.ndim for d in (*range(tensor.ndim - 2), free)}
            places.append((tensor, place))
        return self.couple(call, places, "heads")

    def attention(self, call: Call) -> list[Axis | Grid | None]:
        """Heads of queries, keys, values and mask meet; with grouped queries each key-value head meets several."""
        dims = call.outputs[0].ndim
        names = ("query", "key", "value", "attn_mask")
        tensors = [call.argument(number, name) for number, name in enumerate(names)]
        places = [(t, {d: d + dims - t.ndim for d in range(t.ndim - 2)}) for t in tensors if isinstance(t, Tensor)]
        return self.couple(call, places, "heads", grouped=bool(call.argument(7, "enable_gqa", False)))

    def couple(
        self, call: Call, places: list[tuple[Tensor, dict[int, int]]], mark: str | None, grouped: bool = False
    ) -> list[Axis | Grid | None]:
        """Unite the components that several tensors carry along one axis of the output.

        ``places`` maps each tensor's axes to the output's; an axis that is not there is summed over. ``grouped`` lets
        each component of a shorter axis meet several neighbours on the longer one.
        """
        out = call.outputs[0]
        met: list[tuple[int, Tensor]] = []
        for tensor, place in places:
            axis = call.axis(tensor)
            if axis is None:
                continue
            if axis.dim not in place:
                self.freeze(axis, f"'{call.name}' sums over these channels")
                continue
            dim, ids = place[axis.dim], axis.ids
            if grouped and out.shape[dim] % len(ids) == 0:
                ids = ids.repeat_interleave(out.shape[dim] // len(ids))
            if len(ids) == out.shape[dim]:
                met.append((dim, ids))
            else:
                self.freeze(axis, "a single channel multiplies all others")
        made = [(dim, ids) for dim, ids in met if not self.couplings.is_loose(ids)] or met
        if not made:
            return [None] * len(call.outputs)
        dim, first = made[0]
        if any(other != dim for other, _ in made):
            return self.refuse(call, "two tensors with channels on different axes are combined")
        for other, ids in met:
            if other != dim:  # a parameter along another axis, such as a norm's inside each head
                self.freeze(Axis(other, ids), "a parameter spans another axis")
        for tensor, place in places:
            here = next((d for d, o in place.items() if o == dim), None)
            if here is not None and call.axis(tensor) is None and tensor.shape[here] > 1:
                if id(tensor) in self.parameters or not constant(tensor, here):
                    return self.refuse(call, "a fixed or unknown tensor spans these channels")
        others = [ids for other, ids in met if other == dim and ids is not first]
        for ids in others:
            self.couplings.unite(first, ids)
        if mark == "sum" and any(not torch.equal(ids, first) for ids in others):
            self.couplings.mark(first, mark)
        if mark == "heads" and dim < out.ndim - 2:
            self.couplings.mark(first, mark)
        return [Axis(dim, first)] * len(call.outputs)

    def move(self, call: Call) -> list[Axis | Grid | None]:
        unknown = [t for t in call.inputs if t.ndim > 0 and self.is_unknown(call, t)]
        if unknown and call.name not in JOINS:
            return self.unknown(call)  # joined with something that carries no components
        moved = call.moved()
        results = [r for r in moved if r is not None and bool((r.ids >= 0).any())]
        split = any(isinstance(r, Grid) for r in results) and not call.grids
        if len(results) < sum(t.numel() > 0 for t in call.outputs) or (split and call.name not in RESHAPES):
            return self.refuse(call, f"'{call.name}' folds these channels into another shape")
        if call.name in PLACED and not self.placed(call, call.records[0][1].ids.flatten(), results):
            return self.refuse(call, f"'{call.name}' takes these channels from fixed places")
        return [self.collapse(r) if split and isinstance(r, Grid) else r for r in moved]

    @staticmethod
    def is_unknown(call: Call, tensor: Tensor) -> bool:
        """Whether a tensor carries no components, and is no index either, which takes elements off other axes."""
        return call.axes.get(id(tensor)) is None and (tensor.is_floating_point() or call.name != "__getitem__")

    def collapse(self, grid: Grid) -> Axis | Grid:
        """A reshape has spread components over several axes: let those that differ in the last one live as one.

        So the channels of an attention head become one component where ``(..., H * D)`` is seen as ``(..., H, D)``.
        """
        dim = last_wide(grid.ids)
        heads = grid.ids.narrow(dim, 0, 1)
        self.couplings.unite(heads.expand_as(grid.ids).flatten(), grid.ids.flatten())
        wide = [d for d, size in enumerate(heads.shape) if size > 1]
        return Axis(wide[0], heads.flatten()) if len(wide) == 1 else Grid(heads)

    def placed(self, call: Call, source: Tensor, results: list[Axis | Grid]) -> bool:
        """Allow an operation that names places on the components' axis: equal chunks, or as many of every component."""
        if all(torch.equal(r.ids.flatten(), source) for r in results):
            return True
        pieces = [r.ids.flatten() for r in results]
        if call.name == "chunk" and not call.grids and torch.equal(torch.cat(pieces), source):
            if len({len(piece) for piece in pieces}) == 1:
                self.couplings.chunk(source, len(pieces))
                return True
        for piece in pieces:
            taken = torch.isin(source, piece)
            if not torch.equal(source[taken], piece):
                return False
            if not bool(taken.all()):
                reason = f"'{call.name}' takes these channels from fixed places ({self.where})"
                self.couplings.take(source, taken, reason)
        return True


def _operators(tracer: ChannelTracer) -> Iterable[Operator]:
    for module, macs in tracer.macs.items():
        behind, norms = None, tracer.norms.get(module, [])
        if len(norms) == 1 and tracer.calls[module] == 1:
            norm, written = norms[0]
            has_mean = getattr(tracer.model.get_submodule(norm), "running_mean", None) is not None
            if has_mean and tracer.calls[norm] == 1 and tracer.uses[written] == 1:
                behind = norm
        sink = "bias" if tracer.biased.get(module) else behind
        yield Operator(module, macs // max(1, tracer.samples), sink, behind)


def _stacked(model: nn.Module) -> Iterator[Group]:
    """Refused groups for matrices stacked in one parameter, as a mixture of experts has them."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(owner, _ConvNd):
            yield Group(name, parameter.shape[1], (), refused="matrices stacked in one tensor (experts) cannot be cut")


def _unseen(model: nn.Module, seen: set[str], obstacles: dict[str, str]) -> Iterator[Group]:
    """Refused groups for layers that cannot be edited, or were not seen to run."""
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)) and name not in seen:
            reason = obstacles.get(name, "the model does not run this layer, or not as a layer of its own")
            yield Group(name, len(module.weight), (), refused=reason)


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
            tracer.couplings.freeze(record.ids.flatten(), "these channels are the model's output")
    groups = tuple(described(model, group) for group in tracer.couplings.groups())
    operators = {o.module: o for o in _operators(tracer)}
    seen = {s.module for g in groups for s in g.slices} | set(operators)
    return Structure((*groups, *_stacked(model), *_unseen(model, seen, tracer.obstacles)), operators)
