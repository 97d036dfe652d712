"""Find the groups of a model by watching one forward pass.

Every torch function of a real forward pass is seen through a ``TorchFunctionMode``; a record beside each tensor says
which components stand along which axis. Python control flow, timm's and transformers' own helpers, and any
``nn.Module`` are followed without a symbolic graph. What is not understood *freezes* the components it touches, with
a reason: no operation is ever guessed to be elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from modhifi.structure.groups import Group, Operator, Structure
from modhifi.structure.head_counts import described
from modhifi.structure.torch_ops import (
    BINARY,
    CONVS,
    CREATION,
    ELEMENTWISE,
    MIXING,
    MOVEMENT,
    POOLING,
    PRODUCTS,
    REDUCTION,
    Axis,
    Call,
    Grid,
    tensors_in,
)
from modhifi.structure.tracing.layer_rules import Layers


class ChannelTracer(Layers):
    """Watches one forward pass and fills :class:`Couplings`: which rule answers for which operation."""

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


def _operators(tracer: ChannelTracer) -> Iterable[Operator]:
    for module, macs in tracer.macs.items():
        sink, norms = ("bias" if tracer.biased.get(module) else None), tracer.norms.get(module, [])
        if sink is None and len(norms) == 1 and tracer.calls[module] == 1:
            norm, written = norms[0]
            has_mean = getattr(tracer.model.get_submodule(norm), "running_mean", None) is not None
            if has_mean and tracer.calls[norm] == 1 and tracer.uses[written] == 1:
                sink = norm
        yield Operator(module, macs // max(1, tracer.samples), sink)


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
