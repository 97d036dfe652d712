"""One rule for each torch function: from the bounds of its inputs to that of its output.

A rule gets the step and the clean outputs and returns one record each, or None where it does not apply: then the
operation counts as unknown. Source of the constants: docs/method.md, R1 and R2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from modhifi.bounds.lipschitz import activation_constant, batchnorm_scale, norm_constant
from modhifi.bounds.local_lipschitz import norm_rule
from modhifi.bounds.propagation.affine import Affine, Pending, conv_options
from modhifi.bounds.propagation.attention_rules import ATTENTION
from modhifi.bounds.propagation.interval import UP, Bound, add_rule, coarsen, mul_rule, nothing, total
from modhifi.bounds.propagation.operation import Record, Rule, Step
from modhifi.bounds.propagation.shape_rules import PLACES
from modhifi.structure.torch_ops import tensors_in


# -- linear operators and norms ----------------------------------------------------------------------------------------
def _conv(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, weight = step.argument(0, "input"), step.argument(1, "weight")
    if not step.bound(weight).constant or x.ndim != weight.ndim:
        return None
    places = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))
    options = conv_options(x, *(step.argument(*place) for place in places))
    affine = Affine("conv", weight, step.edited(weight), options, step.norms)
    return [_affine(step, outputs[0], affine, step.bound(x), "whole")]


def _affine(step: Step, out: Tensor, affine: Affine, x: Bound, form: str) -> Pending:
    shared = range(1, x.radius.ndim) if form == "whole" else [x.radius.ndim - 1]
    radius = coarsen(x.radius, [1 if d in shared else n for d, n in enumerate(x.radius.shape)])
    names = step.parameters
    moved = next(tensors_in(step.edited_call())) if names else out
    return Pending(affine, Bound(radius, x.reach, x.lip), out, moved, names, step.where, form)


def _matrix(step: Step, out: Tensor, x: Tensor, weight: Tensor) -> list[Record] | None:
    if (
        weight.ndim != 2
        or not step.bound(weight).constant
        or not all(step.bound(t).constant for t in step.inputs if t is not x)
    ):
        return None
    edited = step.edited(weight)
    if step.name != "linear":
        weight, edited = weight.mT, edited.mT
    affine = Affine("matrix", weight, edited, {}, step.norms)
    return [_affine(step, out, affine, step.bound(x), "tokens" if x.ndim > 2 else "whole")]


def _linear(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    return _matrix(step, outputs[0], step.argument(0, "input"), step.argument(1, "weight"))


def _addmm(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    if len(step.args) != 3 or step.kwargs:
        return None
    return _matrix(step, outputs[0], step.args[1], step.args[2])


def _batch_norm(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, mean, variance = step.args[0], step.argument(1, "running_mean"), step.argument(2, "running_var")
    weight, eps = step.argument(3, "weight"), step.argument(7, "eps", 1e-5)
    if mean is None or step.argument(5, "training", False):
        return None
    dense = batchnorm_scale(weight, variance, eps)
    edited = batchnorm_scale(step.edited(weight), step.edited(variance), eps)
    before = step.pending(x)
    # Only channels on axis 1, which a Linear on tokens has not got, can be folded.
    foldable = before is not None and before.affine is not None and before.affine.kind != "scale"
    if before is None or before.affine is None or not foldable or (before.affine.kind == "matrix" and x.ndim != 2):
        affine = Affine("scale", dense, edited, {}, step.norms)
        return [_affine(step, outputs[0], affine, step.bound(x), "whole")]
    names = (*before.parameters, *step.parameters)
    moved = step.edited_call(before.moved) if names else outputs[0]
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


def _layer_norm(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, shape, weight = step.args[0], step.argument(1, "normalized_shape"), step.argument(2, "weight")
    centred = step.name == "layer_norm"
    eps = step.argument(4 if centred else 3, "eps", 1e-5 if centred else None)
    if len(shape) != 1 or eps is None or (weight is not None and not step.bound(weight).constant):
        return None
    return [normalised(x, step.bound(x), weight, step.edited(weight), eps, centred=centred)]


def _group_norm(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, groups, weight, eps = (
        step.args[0],
        step.argument(1, "num_groups"),
        step.argument(2, "weight"),
        step.argument(4, "eps", 1e-5),
    )
    bound = step.bound(x)
    radius = total(bound.radius).expand(len(x))
    moved = norm_rule(x.reshape(len(x), groups, -1), radius, None, eps, centred=True)
    top = 1.0 if weight is None else float(step.edited(weight).abs().max())
    constants = norm_constant(step.edited(weight), eps), norm_constant(weight, eps)
    return [bound.scaled((moved * top * UP).reshape(-1, *[1] * (x.ndim - 1)), *constants)]


def _matmul(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, weight = step.args[:2]
    return _matrix(step, outputs[0], x, weight) or ATTENTION["matmul"](step, outputs)


# -- elementwise -------------------------------------------------------------------------------------------------------
def _activation(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    name = {"clamp": "hardtanh", "clip": "hardtanh"}.get(step.name.rstrip("_"), step.name.rstrip("_"))
    parameter: Any = None
    if name == "gelu" and step.argument(1, "approximate", "none") == "tanh":
        name = "gelu_tanh"
    if name == "hardtanh" and any(isinstance(a, Tensor) for a in (*step.args[1:], *step.kwargs.values())):
        return None
    if name in ("leaky_relu", "elu", "celu"):
        parameter = step.argument(1, "negative_slope" if name == "leaky_relu" else "alpha")
    if name == "prelu":
        parameter = step.edited(step.args[1]).flatten().tolist()
    if name == "softplus" and step.argument(1, "beta", 1) <= 0:
        return None
    constant = activation_constant(name, parameter)
    if constant is None:
        return None
    ceiling = 1.0 if name in ("sigmoid", "hardsigmoid", "tanh") else math.inf
    func: Callable[[Tensor], Tensor] = F.relu if name == "relu" else step.again(step.inputs[0])
    if name == "prelu":
        bound = step.bound(step.args[0])
        lip = activation_constant(name, step.args[1].flatten().tolist())
        return [bound.scaled(bound.radius * constant * UP, constant, lip)]
    return step.elementwise(func, step.inputs[0], outputs[0], constant, ceiling)


def _same(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    if step.name.startswith(("dropout", "feature", "alpha")) and step.argument(2, "training", False):
        return None
    return [step.bound(step.inputs[0])]


def _add(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    alpha = step.kwargs.get("alpha", 1)
    if not isinstance(alpha, int | float) or abs(alpha) > 1:
        return None
    return [add_rule(outputs[0], [(t, step.bound(t)) for t in step.inputs])]


def _mul(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    tensors = [t for t in step.args if isinstance(t, Tensor)]
    numbers = [n for n in step.args if isinstance(n, int | float)]
    if len(tensors) == 1 and len(numbers) == 1 and len(step.args) == 2:
        bound = step.bound(tensors[0])
        return [bound.scaled(bound.radius * abs(numbers[0]) * UP, abs(numbers[0]))]
    if len(tensors) != 2 or len(step.args) != 2:
        return None
    x, y = tensors
    found = mul_rule(outputs[0], (step.edited(x), step.bound(x)), (step.edited(y), step.bound(y)))
    # The original's factor is another one where the parameter is modified.
    return [replace(found, lip=math.inf) if step.parameters else found]


def _div(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, divisor = step.args[:2]
    if not isinstance(x, Tensor) or len(step.args) > 2 or step.kwargs:
        return None
    if isinstance(divisor, Tensor):
        if not step.bound(divisor).constant:
            return None
        found = mul_rule(outputs[0], (x, step.bound(x)), (1 / step.edited(divisor).double(), nothing(divisor.ndim)))
        return [replace(found, lip=math.inf) if step.parameters else found]
    bound = step.bound(x)
    return [bound.scaled(bound.radius / abs(divisor) * UP, 1 / abs(divisor))] if divisor else None


def _masked_fill(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, mask = step.args[0], step.argument(1, "mask")
    return [step.bound(x)] if step.bound(mask).constant and not step.bound(x).constant else None


def _where(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    if len(step.args) != 3 or not step.bound(step.args[0]).constant:
        return None
    return [add_rule(outputs[0], [(t, step.bound(t)) for t in step.args[1:] if isinstance(t, Tensor)])]


RULES: dict[str, Rule] = {
    "where": _where,
    **PLACES,
    **ATTENTION,
    **dict.fromkeys(("matmul", "__matmul__"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("linear",), _linear),
    **dict.fromkeys(("addmm",), _addmm),
    **dict.fromkeys(("batch_norm",), _batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("group_norm",), _group_norm),
    **dict.fromkeys(
        """relu relu_ relu6 silu silu_ gelu sigmoid sigmoid_ tanh tanh_ hardswish hardswish_ hardsigmoid hardsigmoid_
        hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu celu mish mish_ softplus softsign logsigmoid clamp clip
        clamp_ prelu""".split(),
        _activation,
    ),
    **dict.fromkeys(
        """dropout dropout_ feature_dropout dropout1d dropout2d dropout3d alpha_dropout contiguous clone detach to float
        double type type_as requires_grad_ cpu cuda neg __neg__ data abs""".split(),
        _same,
    ),
    **dict.fromkeys("add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ rsub".split(), _add),
    **dict.fromkeys("mul mul_ __mul__ __rmul__ __imul__ multiply".split(), _mul),
    **dict.fromkeys("div div_ __truediv__ __itruediv__ true_divide".split(), _div),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked_fill),
}
