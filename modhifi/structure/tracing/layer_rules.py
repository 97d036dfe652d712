"""Rules for the layers of a model: what reads and what makes components, and what runs along or across them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from modhifi.structure.library_layers import SAME_PADDED, TRANSPOSED, full_name, is_transposed
from modhifi.structure.tracing.operations import register_operation, rule_for
from modhifi.structure.tracing.placements import Axis, Placement, TracedCall
from modhifi.structure.tracing.stacks import LINEAR, StackView
from modhifi.structure.tracing.watcher import FrozenNorm, Watcher

# These prepare their input themselves (padding, a view) before they run their operator.
PREPARING = {*map(full_name, (nn.Conv1d, nn.Conv2d, nn.Conv3d)), SAME_PADDED, TRANSPOSED}
# Why an operation that reads an axis as a whole stops components along it.
ACROSS = {
    "layer_norm": "a LayerNorm normalises across these channels",
    "rms_norm": "an RMSNorm normalises across these channels",
    "group_norm": "a GroupNorm normalises across these channels",
    "softmax": "a softmax runs across these channels",
    "normalize": "a normalisation runs across these channels",
}

MULTIHEAD = "nn.MultiheadAttention holds its projections as one matrix that no layer runs: its heads stay"


# -- operators ---------------------------------------------------------------------------------------------------------
@rule_for("conv", "transposed conv")
def conv(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """A convolution reads axis 1 and writes it anew; a depthwise one passes its channels along."""
    x, weight = call.argument(0, "input"), _of_layer(watcher, call.argument(1, "weight"))
    groups = call.argument(6, "groups", 1)
    module, obstacle = _owner(watcher, x, weight)
    axis, depthwise = call.axis(x), groups > 1 and groups == x.shape[1]
    if depthwise and module and obstacle == _outside(module):
        obstacle = None  # nothing of what passes along has to be seen at the layer itself
    if obstacle:
        return _obstruct(watcher, module, axis, obstacle)
    if axis is not None and (axis.dim != 1 or x.ndim < weight.ndim):
        watcher.freeze(axis, "a convolution runs across these channels")
        axis = None
    out = call.outputs[0]
    watcher.claim(module, call)
    if axis is not None and depthwise:
        ids = axis.ids.repeat_interleave(out.shape[1] // groups)
        watcher.couplings.along(module, ids)
        return [Axis(1, ids)]
    return _product(watcher, module, axis, out, 1, groups, call.argument(2, "bias"))


@rule_for("grouped product")
def grouped_product(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Rows of several experts meet the matrix of each: see :func:`of_experts`."""
    return watcher.unknown(call)


def product_with_view(watcher: Watcher, call: TracedCall, x: Tensor, view: StackView) -> list[Placement | None]:
    """A product with experts' matrices, or with the weight of a linear layer as ``x @ weight.T``."""
    weight = watcher.model.get_parameter(view.name)
    if weight.ndim > 2:
        return of_experts(watcher, call, x, view)
    if call.kind == "linear":
        return list(linear(watcher, call))
    return _linear(watcher, call, x, weight, None, transposed=call.name not in LINEAR and not view.turned)


def product_from_left(watcher: Watcher, call: TracedCall, view: StackView) -> list[Placement | None]:
    """``weight @ x``: the layer's rows are new components on the last axis but one; what it reads must stay."""
    for _, placement in call.carriers:
        watcher.freeze(placement, "a linear map runs across another axis")
    if id(watcher.model.get_parameter(view.name)) in watcher.tied:
        return [None]
    out, module = call.outputs[0], view.name.rpartition(".")[0]
    watcher.claim(module, call)
    return [Axis(out.ndim - 2, watcher.couplings.produce(module, out.shape[-2], 1))]


def of_experts(watcher: Watcher, call: TracedCall, x: Tensor, view: StackView) -> list[Placement | None]:
    """Matrices of experts read the last axis and write it anew, each with channels of its own.

    They are traced as one matrix, which all experts share: `modhifi.structure.stacked.by_expert` tells them apart.
    """
    axis, out = call.axis(x), call.outputs[0]
    if axis is not None and axis.dim != x.ndim - 1:
        watcher.freeze(axis, "a linear map runs across another axis")
        axis = None
    name = watcher.stacks.operator(call.name, view)
    watcher.claim(name, call)
    return _product(watcher, name, axis, out, out.ndim - 1, 1, None)


@rule_for("linear")
def linear(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """A linear map reads the last axis and writes it anew."""
    return _linear(watcher, call, call.argument(0, "input"), call.argument(1, "weight"), call.argument(2, "bias"))


def addmm(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """How a Conv1D of transformers runs, whose weight is stored transposed."""
    if len(call.args) != 3:
        return watcher.unknown(call)
    bias, x, weight = call.args
    return _linear(watcher, call, x, weight, bias, transposed=True)


register_operation("addmm", addmm)


def multihead(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """torch's own attention, whose weights belong to no layer that could be cut."""
    return watcher.refuse(call, MULTIHEAD)


register_operation("multi_head_attention_forward", multihead)


def _linear(
    watcher: Watcher, call: TracedCall, x: Tensor, weight: Tensor, bias: Any, transposed: bool = False
) -> list[Placement | None]:
    module, obstacle = _owner(watcher, x, weight)
    axis = call.axis(x)
    if obstacle is None and transposed and not is_transposed(watcher.model.get_submodule(module)):
        obstacle = "a linear map stores its weight transposed"
    if obstacle:
        return _obstruct(watcher, module, axis, obstacle)
    if axis is not None and axis.dim != x.ndim - 1:
        watcher.freeze(axis, "a linear map runs across another axis")
        axis = None
    out = call.outputs[0]
    watcher.claim(module, call)
    return _product(watcher, module, axis, out, out.ndim - 1, 1, bias)


def _owner(watcher: Watcher, x: Tensor, weight: Tensor) -> tuple[str, str | None]:
    """The module that owns an operator's weight, and what stands against editing it there, if anything does."""
    name = watcher.names.get(id(weight), "")
    owner = name.rpartition(".")[0]
    if not name.endswith(".weight") or id(weight) not in watcher.parameters:
        return "", "an operator computes its weight"
    module = watcher.model.get_submodule(owner)
    known = isinstance(module, (_ConvNd, nn.Linear)) or is_transposed(module)
    if id(weight) in watcher.tied:
        return owner if known else "", "the weight is shared with another layer"
    if not known:
        return "", f"its layer, of the class {type(module).__name__}, is none that modhifi can edit"
    if not watcher.path or watcher.path[-1][0] != owner:
        return owner, _outside(owner)
    if full_name(type(module)) not in PREPARING and watcher.path[-1][1] != id(x):
        return owner, "the layer changes its input before its operator"
    return owner, None


def _outside(owner: str) -> str:
    return f"the weight of {owner} is used outside that layer"


def _of_layer(watcher: Watcher, weight: Tensor) -> Tensor:
    """The weight of a convolution of which this is a view of the same shape; any other tensor as it is.

    Code that calls kernels of its own hands them the weight without its axis of one.
    """
    if id(weight) in watcher.parameters or weight._base is None or id(weight._base) not in watcher.parameters:
        return weight
    same = weight.shape == weight._base.shape and weight.is_contiguous() and weight._base.is_contiguous()
    return weight._base if same else weight


def _obstruct(watcher: Watcher, module: str, axis: Axis | None, obstacle: str) -> list[Placement | None]:
    """An operator whose layer cannot be edited: what it reads must stay, and nothing is known of what it writes."""
    watcher.obstacles[module or watcher.path[-1][0]] = obstacle
    watcher.freeze(axis, obstacle)
    return [None]


def _product(
    watcher: Watcher, module: str, axis: Axis | None, out: Tensor, dim: int, groups: int, bias: Any
) -> list[Placement | None]:
    if axis is not None:
        watcher.couplings.read(module, axis.ids, groups)
    watcher.calls[module] += 1
    watcher.biased[module] = bias is not None
    watcher.written_by[id(out)] = module
    return [Axis(dim, watcher.couplings.produce(module, out.shape[dim], groups))]


def embedding(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """A table of relative positions, read at every pair of positions, has a column for each head.

    Such a table may serve several layers, whose heads then go together.
    """
    index, weight = call.argument(0, "input"), call.argument(1, "weight")
    of_pairs = index.ndim > 1 and index.shape[-1] == index.shape[-2]
    if not of_pairs or id(weight) not in watcher.parameters or id(weight) in watcher.tied:
        return [None]
    ids = watcher.couplings.parameter(watcher.names[id(weight)], weight.shape[1])
    return [Axis(call.outputs[0].ndim - 1, ids)]


register_operation("embedding", embedding)


# -- norms and slopes --------------------------------------------------------------------------------------------------
@rule_for("batch norm")
def batch_norm(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Statistics, scales and shifts of one module run along the channels."""
    x = call.argument(0, "input")
    axis = call.axis(x)
    tensors = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and v is not x]
    owners = {watcher.names.get(id(t), "").rpartition(".")[0] for t in tensors}
    if axis is None:
        return [None]
    if axis.dim == 1 and not tensors:  # an InstanceNorm without values of its own, or none that counts its channels
        owners = {watcher.path[-1][0]}
        if not isinstance(watcher.model.get_submodule(*owners), _InstanceNorm):
            return [axis]
    if axis.dim != 1 or len(owners) != 1 or watcher.tied & {id(t) for t in tensors}:
        watcher.freeze(axis, "a BatchNorm has no statistics of its own for these channels")
        return [None]
    owner = owners.pop()
    watcher.couplings.along(owner, axis.ids)
    watcher.calls[owner] += 1
    if id(x) in watcher.written_by:
        watcher.batchnorms[watcher.written_by[id(x)]].append((owner, id(x)))
    return [axis]


def frozen_norm(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """A BatchNorm of buffers: its module answers for the arithmetic inside."""
    x, owner = call.inputs[0], watcher.path[-1][0]
    axis = call.axis(x)
    if axis is None or axis.dim != 1:
        return watcher.unknown(call)
    watcher.couplings.along(owner, axis.ids)
    watcher.calls[owner] += 1
    if id(x) in watcher.written_by:
        watcher.batchnorms[watcher.written_by[id(x)]].append((owner, id(x)))
    return [axis]


register_operation(FrozenNorm, frozen_norm)


@rule_for("norm", "mixing")
def across(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """A norm of each sample, or a softmax: fine along other axes than the components'."""
    x, name = call.argument(0, "input"), call.name
    axis = call.axis(x)
    if axis is None:
        return [None]
    if name in ("layer_norm", "rms_norm"):
        mixed = axis.dim >= x.ndim - len(call.argument(1, "normalized_shape"))
    elif name == "group_norm":
        mixed = not _group_norm(watcher, call, axis)
    else:
        dim = call.argument(2, "dim", 1) if name == "normalize" else call.argument(1, "dim")
        mixed = not isinstance(dim, int) or dim % x.ndim == axis.dim
    if mixed:
        watcher.freeze(axis, ACROSS.get(name, f"'{name}' runs across these channels"))
    return [axis]


def _group_norm(watcher: Watcher, call: TracedCall, axis: Axis) -> bool:
    """Let the channels that are normalised together live as one component; False where that is all of them."""
    count, weight = int(call.argument(1, "num_groups")), call.argument(2, "weight")
    owner = watcher.path[-1][0] if weight is None else watcher.names.get(id(weight), "").rpartition(".")[0]
    if axis.dim != 1 or count == 1 or not isinstance(watcher.model.get_submodule(owner), nn.GroupNorm):
        return False
    together = axis.ids.view(count, -1)
    watcher.couplings.unite(together[:, :1].expand_as(together).flatten(), axis.ids)
    watcher.couplings.along(owner, axis.ids)
    return True


def prelu(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Slopes of the channels live and die with them; a single one belongs to none."""
    axis, weight = call.axis(call.argument(0, "input")), call.argument(1, "weight")
    if axis is not None and weight.numel() > 1:
        slopes = watcher.placement(weight)
        if not isinstance(slopes, Axis) or axis.dim != 1:
            watcher.freeze(axis, "a PReLU has no slopes of its own for these channels")
        else:
            watcher.couplings.unite(slopes.ids, axis.ids)
    return [axis]


register_operation("prelu", prelu)
