"""Rules for the layers of a model: what reads and what makes components, and what runs along or across them."""

from __future__ import annotations

from typing import Any

from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from modhifi.structure.torch_ops import MIXING, NORMS, Axis, Call
from modhifi.structure.tracing.elementwise_rules import Meetings

# these prepare their input themselves (padding, a view) before they run their operator
PREPARING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, Conv1D)


class Layers(Meetings):
    """A watcher that knows operators, norms and reductions."""

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
