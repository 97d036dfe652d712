"""One rule for each torch function: from the bounds of its inputs to that of its output.

A rule gets the call and the clean outputs and returns one record each, or None where it does not apply: then the
operation counts as unknown. Source of the constants: docs/method.md, R1 and R2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.bounds.lipschitz import activation_constant, batchnorm_scale, norm_constant
from modhifi.bounds.local_lipschitz import norm_rule
from modhifi.bounds.propagation.affine import Affine, Pending, conv_options
from modhifi.bounds.propagation.attention_rules import ATTENTION
from modhifi.bounds.propagation.interval import UP, Bound, add_rule, coarsen, mul_rule, nothing, total
from modhifi.bounds.propagation.shape_rules import MOVING
from modhifi.bounds.propagation.walked_call import Record, Rule, WalkedCall
from modhifi.structure.torch_ops import names_of, spellings, tensors_in


# -- linear operators and norms ----------------------------------------------------------------------------------------
def _conv(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, weight = call.argument(0, "input"), call.argument(1, "weight")
    if not call.bound(weight).constant or x.ndim != weight.ndim:
        return None
    places = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))
    options = conv_options(x, *(call.argument(*place) for place in places))
    affine = Affine("conv", weight, call.edited(weight), options, call.norms)
    return [_affine(call, outputs[0], affine, call.bound(x), "whole")]


def _affine(call: WalkedCall, out: Tensor, affine: Affine, x: Bound, form: str) -> Pending:
    shared = range(1, x.radius.ndim) if form == "whole" else [x.radius.ndim - 1]
    radius = coarsen(x.radius, [1 if d in shared else n for d, n in enumerate(x.radius.shape)])
    names = call.parameters
    moved = next(tensors_in(call.edited_call())) if names else out
    return Pending(affine, Bound(radius, x.reach, x.lip), out, moved, names, call.where, form)


def _matrix(call: WalkedCall, out: Tensor, x: Tensor, weight: Tensor) -> list[Record] | None:
    if (
        weight.ndim != 2
        or not call.bound(weight).constant
        or not all(call.bound(t).constant for t in call.inputs if t is not x)
    ):
        return None
    edited = call.edited(weight)
    if call.name != "linear":
        weight, edited = weight.mT, edited.mT
    affine = Affine("matrix", weight, edited, {}, call.norms)
    return [_affine(call, out, affine, call.bound(x), "tokens" if x.ndim > 2 else "whole")]


def _linear(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    return _matrix(call, outputs[0], call.argument(0, "input"), call.argument(1, "weight"))


def _addmm(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    if len(call.args) != 3 or call.kwargs:
        return None
    return _matrix(call, outputs[0], call.args[1], call.args[2])


def _batch_norm(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, mean, variance = call.args[0], call.argument(1, "running_mean"), call.argument(2, "running_var")
    weight, eps = call.argument(3, "weight"), call.argument(7, "eps", 1e-5)
    if mean is None or call.argument(5, "training", False):
        return None
    dense = batchnorm_scale(weight, variance, eps)
    edited = batchnorm_scale(call.edited(weight), call.edited(variance), eps)
    before = call.pending(x)
    # Only channels on axis 1, which a Linear on tokens has not got, can be folded.
    foldable = before is not None and before.affine is not None and before.affine.kind != "scale"
    if before is None or before.affine is None or not foldable or (before.affine.kind == "matrix" and x.ndim != 2):
        affine = Affine("scale", dense, edited, {}, call.norms)
        return [_affine(call, outputs[0], affine, call.bound(x), "whole")]
    names = (*before.parameters, *call.parameters)
    moved = call.edited_call(before.moved) if names else outputs[0]
    folded = before.affine.folded(dense, edited)
    return [Pending(folded, before.x, outputs[0], moved, names, before.where, before.form)]


def normalised(
    x: Tensor, bound: Bound, dense: Tensor | None, edited: Tensor | None, eps: float, *, centred: bool
) -> Bound:
    """LayerNorm or RMSNorm over the last axis."""
    radius = bound.radius.expand([x.shape[0], *bound.radius.shape[1:]])
    lead = 0
    while lead < x.ndim - 1 and radius.shape[lead] == x.shape[lead]:
        lead += 1
    radius = coarsen(radius, [n if d < lead else 1 for d, n in enumerate(radius.shape)])
    moved = norm_rule(x, radius.reshape(radius.shape[:lead]), edited, eps, centred=centred)
    return bound.scaled(moved.reshape(radius.shape), norm_constant(edited, eps), norm_constant(dense, eps))


def _layer_norm(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, shape, weight = call.args[0], call.argument(1, "normalized_shape"), call.argument(2, "weight")
    centred = call.name == "layer_norm"
    eps = call.argument(4 if centred else 3, "eps", 1e-5 if centred else None)
    if len(shape) != 1 or eps is None or (weight is not None and not call.bound(weight).constant):
        return None
    return [normalised(x, call.bound(x), weight, call.edited(weight), eps, centred=centred)]


def _group_norm(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, groups, weight, eps = (
        call.args[0],
        call.argument(1, "num_groups"),
        call.argument(2, "weight"),
        call.argument(4, "eps", 1e-5),
    )
    bound = call.bound(x)
    radius = total(bound.radius).expand(len(x))
    moved = norm_rule(x.reshape(len(x), groups, -1), radius, None, eps, centred=True)
    top = 1.0 if weight is None else float(call.edited(weight).abs().max())
    constants = norm_constant(call.edited(weight), eps), norm_constant(weight, eps)
    return [bound.scaled((moved * top * UP).reshape(-1, *[1] * (x.ndim - 1)), *constants)]


def _matmul(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, weight = call.args[:2]
    return _matrix(call, outputs[0], x, weight) or ATTENTION["matmul"](call, outputs)


# -- elementwise -------------------------------------------------------------------------------------------------------
def _activation(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    name = call.name.rstrip("_")
    name = {"clamp": "hardtanh", "clip": "hardtanh", "log_sigmoid": "logsigmoid"}.get(name, name)
    parameter: Any = None
    if name == "gelu" and call.argument(1, "approximate", "none") == "tanh":
        name = "gelu_tanh"
    if name == "hardtanh" and any(isinstance(a, Tensor) for a in (*call.args[1:], *call.kwargs.values())):
        return None
    if name in ("leaky_relu", "elu", "celu"):
        parameter = call.argument(1, "negative_slope" if name == "leaky_relu" else "alpha")
    if name == "prelu":
        parameter = call.edited(call.args[1]).flatten().tolist()
    if name == "softplus" and call.argument(1, "beta", 1) <= 0:
        return None
    constant = activation_constant(name, parameter)
    if constant is None:
        return None
    ceiling = 1.0 if name in ("sigmoid", "hardsigmoid", "tanh") else math.inf
    func: Callable[[Tensor], Tensor] = F.relu if name == "relu" else call.again(call.inputs[0])
    if name == "prelu":
        bound = call.bound(call.args[0])
        lip = activation_constant(name, call.args[1].flatten().tolist())
        return [bound.scaled(bound.radius * constant * UP, constant, lip)]
    return call.elementwise(func, call.inputs[0], outputs[0], constant, ceiling)


def _same(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    """What changes no distance between two values of its input; a narrowing cast, which rounds, is not of them."""
    x = call.inputs[0]
    if x.is_floating_point() and torch.finfo(outputs[0].dtype).bits < torch.finfo(x.dtype).bits:
        return None
    if call.name.startswith(("dropout", "feature", "alpha")) and call.argument(2, "training", False):
        return None
    return [call.bound(x)]


def _add(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    alpha = call.kwargs.get("alpha", 1)
    if not isinstance(alpha, int | float) or abs(alpha) > 1:
        return None
    return [add_rule(outputs[0], [(t, call.bound(t)) for t in call.inputs])]


def _mul(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    tensors = [t for t in call.args if isinstance(t, Tensor)]
    numbers = [n for n in call.args if isinstance(n, int | float)]
    if len(tensors) == 1 and len(numbers) == 1 and len(call.args) == 2:
        bound = call.bound(tensors[0])
        return [bound.scaled(bound.radius * abs(numbers[0]) * UP, abs(numbers[0]))]
    if len(tensors) != 2 or len(call.args) != 2:
        return None
    x, y = tensors
    bound = mul_rule(outputs[0], (call.edited(x), call.bound(x)), (call.edited(y), call.bound(y)))
    # The original's factor is another one where the parameter is modified.
    return [replace(bound, lip=math.inf) if call.parameters else bound]


def _div(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, divisor = call.args[:2]
    if not isinstance(x, Tensor) or len(call.args) > 2 or call.kwargs:
        return None
    if isinstance(divisor, Tensor):
        if not call.bound(divisor).constant:
            return None
        bound = mul_rule(outputs[0], (x, call.bound(x)), (1 / call.edited(divisor).double(), nothing(divisor.ndim)))
        return [replace(bound, lip=math.inf) if call.parameters else bound]
    bound = call.bound(x)
    return [bound.scaled(bound.radius / abs(divisor) * UP, 1 / abs(divisor))] if divisor else None


def _masked_fill(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, mask = call.args[0], call.argument(1, "mask")
    return [call.bound(x)] if call.bound(mask).constant and not call.bound(x).constant else None


def _where(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    if len(call.args) != 3 or not call.bound(call.args[0]).constant:
        return None
    return [add_rule(outputs[0], [(t, call.bound(t)) for t in call.args[1:] if isinstance(t, Tensor)])]


RULES: dict[str, Rule] = {
    **MOVING,
    **ATTENTION,
    "matmul": _matmul,
    "__matmul__": _matmul,
    **dict.fromkeys(names_of("conv"), _conv),
    "linear": _linear,
    "addmm": _addmm,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    **dict.fromkeys(names_of("activation"), _activation),
    **dict.fromkeys((*spellings("neg"), *spellings("abs"), *names_of("unchanged", "cast")), _same),
    **dict.fromkeys(names_of("sum", "difference"), _add),
    **dict.fromkeys(names_of("product"), _mul),
    **dict.fromkeys(names_of("quotient"), _div),
    **dict.fromkeys(spellings("masked_fill"), _masked_fill),
    "where": _where,
}
