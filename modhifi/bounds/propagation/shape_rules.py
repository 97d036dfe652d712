"""Rules for operations that pool, add up or only move elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.bounds.local_lipschitz import max_pool_rule
from modhifi.bounds.operator_norms import adaptive_avg_pool_norm, avg_pool_norm, max_pool_constant
from modhifi.bounds.propagation.interval import UP, cat_rule, coarsen, mean_rule, moved_rule, settle_nan, total
from modhifi.bounds.propagation.walked_call import Record, Rule, WalkedCall
from modhifi.structure.torch_ops import names_of, tensors_in

# Movements that may put one element into several places.
COPYING = frozenset("__getitem__ index_select gather repeat repeat_interleave tile unfold take_along_dim".split())
EXPANDING = frozenset("expand expand_as broadcast_to".split())


def _max_pool(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, kernel = call.args[0], call.argument(1, "kernel_size")
    stride, padding, dilation = (
        call.argument(2, "stride") or kernel,
        call.argument(3, "padding", 0),
        call.argument(4, "dilation", 1),
    )
    ceil_mode = call.argument(5, "ceil_mode", False)
    if len(outputs) != 1 or x.ndim != 4:
        return None
    bound, constant = call.bound(x), max_pool_constant(kernel, stride, dilation)
    radius = total(bound.radius).expand(len(x)) * constant * UP
    if dilation in (1, (1, 1), [1, 1]) and not ceil_mode and bool(radius.isfinite().all()) and bool((radius > 0).any()):
        pairs = [v if isinstance(v, int) else tuple(v) for v in (kernel, stride, padding)]
        radius = torch.minimum(radius, max_pool_rule(x, total(bound.radius).expand(len(x)), *pairs))
    return [bound.scaled(radius.reshape(-1, 1, 1, 1), constant)]


def _avg_pool(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x = call.args[0]
    if x.ndim != 4:
        return None
    if call.name.startswith("adaptive"):
        size = call.argument(1, "output_size")
        pair = [size, size] if isinstance(size, int) else list(size)
        constant = adaptive_avg_pool_norm(
            x.shape[2:], [n if m is None else m for m, n in zip(pair, x.shape[2:], strict=True)]
        )
    else:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        kernel, stride, padding, ceil, counted = (
            call.argument(p + 1, n, d) for p, (n, d) in enumerate(zip(names, (None, None, 0, False, True), strict=True))
        )
        if call.argument(6, "divisor_override") is not None:
            return None
        constant = avg_pool_norm(
            x.shape[2:], kernel, stride or None, padding, ceil_mode=ceil, count_include_pad=counted
        )
    bound = call.bound(x)
    radius = coarsen(bound.radius, [bound.radius.shape[0], 1, 1, 1])
    return [bound.scaled(radius * constant * UP, constant)]


def _reduce(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x = call.inputs[0]
    dims = call.argument(1, "dim")
    dims = list(range(x.ndim)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    keep = call.argument(2, "keepdim", False)
    return [mean_rule(outputs[0], x, call.bound(x), [d % x.ndim for d in dims], keep, call.name == "sum")]


def _cat(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    parts, dim = call.args[0], call.argument(1, "dim", call.kwargs.get("axis", 0))
    return [cat_rule(outputs[0], [(t, call.bound(t)) for t in parts], dim % outputs[0].ndim)]


def _move(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x = call.inputs[0]
    if any(not call.bound(t).constant for t in call.inputs[1:]):
        return None
    copying = call.name in COPYING
    results: list[Record] = []
    for place in range(len(outputs)):
        again = call.again(x)

        def run(ids: Tensor, place: int = place, again: Callable[[Tensor], Any] = again) -> Tensor:
            return list(tensors_in(again(ids)))[place]

        results.append(moved_rule(run, x, call.bound(x), copying))
    return results


def _expand(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, out = call.inputs[0], outputs[0]
    bound, lead = call.bound(x), outputs[0].ndim - call.inputs[0].ndim
    shape, radius = [1] * lead + list(x.shape), bound.radius.reshape([1] * lead + list(bound.radius.shape))
    size = [out.shape[d] if shape[d] == 1 and out.shape[d] > 1 else radius.shape[d] for d in range(out.ndim)]
    return [bound.scaled(radius.expand(size), math.sqrt(out.numel() / max(1, x.numel())))]


def _pad(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    x, pads = call.args[0], list(call.argument(1, "pad"))
    if call.argument(2, "mode", "constant") != "constant":
        return None
    bound = call.bound(x)
    own = [p if bound.radius.shape[-1 - i // 2] > 1 else 0 for i, p in enumerate(pads)]
    return [bound.scaled(settle_nan(F.pad(bound.radius, own)), 1.0)]


MOVING: dict[str, Rule] = {
    **dict.fromkeys(("max_pool2d", "_max_pool2d", "boolean_dispatch"), _max_pool),
    **dict.fromkeys(("avg_pool2d", "adaptive_avg_pool2d"), _avg_pool),
    **dict.fromkeys(("mean", "sum"), _reduce),
    **dict.fromkeys(names_of("join"), _cat),
    **dict.fromkeys(EXPANDING, _expand),
    "pad": _pad,
    **dict.fromkeys(names_of("reshape", "movement", "placed") - EXPANDING - {"stack"}, _move),
}
