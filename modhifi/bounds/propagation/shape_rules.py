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
from modhifi.bounds.propagation.operation import Record, Rule, Step
from modhifi.structure.torch_ops import tensors_in

PLAIN_MOVES = frozenset(
    """view reshape flatten unflatten permute transpose swapaxes movedim unsqueeze squeeze chunk split tensor_split
    split_with_sizes narrow select unbind roll flip t T mT H mH view_as reshape_as pixel_shuffle
    pixel_unshuffle""".split()
)
COPYING_MOVES = frozenset("__getitem__ index_select gather repeat repeat_interleave tile unfold take_along_dim".split())


def _max_pool(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, kernel = step.args[0], step.argument(1, "kernel_size")
    stride, padding, dilation = (
        step.argument(2, "stride") or kernel,
        step.argument(3, "padding", 0),
        step.argument(4, "dilation", 1),
    )
    ceil_mode = step.argument(5, "ceil_mode", False)
    if len(outputs) != 1 or x.ndim != 4:
        return None
    bound, constant = step.bound(x), max_pool_constant(kernel, stride, dilation)
    radius = total(bound.radius).expand(len(x)) * constant * UP
    if dilation in (1, (1, 1), [1, 1]) and not ceil_mode and bool(radius.isfinite().all()) and bool((radius > 0).any()):
        pairs = [v if isinstance(v, int) else tuple(v) for v in (kernel, stride, padding)]
        radius = torch.minimum(radius, max_pool_rule(x, total(bound.radius).expand(len(x)), *pairs))
    return [bound.scaled(radius.reshape(-1, 1, 1, 1), constant)]


def _avg_pool(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x = step.args[0]
    if x.ndim != 4:
        return None
    if step.name.startswith("adaptive"):
        size = step.argument(1, "output_size")
        pair = [size, size] if isinstance(size, int) else list(size)
        constant = adaptive_avg_pool_norm(
            x.shape[2:], [n if m is None else m for m, n in zip(pair, x.shape[2:], strict=True)]
        )
    else:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        kernel, stride, padding, ceil, counted = (
            step.argument(p + 1, n, d) for p, (n, d) in enumerate(zip(names, (None, None, 0, False, True), strict=True))
        )
        if step.argument(6, "divisor_override") is not None:
            return None
        constant = avg_pool_norm(
            x.shape[2:], kernel, stride or None, padding, ceil_mode=ceil, count_include_pad=counted
        )
    bound = step.bound(x)
    radius = coarsen(bound.radius, [bound.radius.shape[0], 1, 1, 1])
    return [bound.scaled(radius * constant * UP, constant)]


def _reduce(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x = step.inputs[0]
    dims = step.argument(1, "dim")
    dims = list(range(x.ndim)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    keep = step.argument(2, "keepdim", False)
    return [mean_rule(outputs[0], x, step.bound(x), [d % x.ndim for d in dims], keep, step.name == "sum")]


def _cat(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    parts, dim = step.args[0], step.argument(1, "dim", step.kwargs.get("axis", 0))
    return [cat_rule(outputs[0], [(t, step.bound(t)) for t in parts], dim % outputs[0].ndim)]


def _move(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x = step.inputs[0]
    if any(not step.bound(t).constant for t in step.inputs[1:]):
        return None
    copying = step.name not in PLAIN_MOVES
    results: list[Record] = []
    for place in range(len(outputs)):
        again = step.again(x)

        def run(ids: Tensor, place: int = place, again: Callable[[Tensor], Any] = again) -> Tensor:
            return list(tensors_in(again(ids)))[place]

        results.append(moved_rule(run, x, step.bound(x), copying))
    return results


def _expand(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, out = step.inputs[0], outputs[0]
    bound, lead = step.bound(x), outputs[0].ndim - step.inputs[0].ndim
    shape, radius = [1] * lead + list(x.shape), bound.radius.reshape([1] * lead + list(bound.radius.shape))
    size = [out.shape[d] if shape[d] == 1 and out.shape[d] > 1 else radius.shape[d] for d in range(out.ndim)]
    return [bound.scaled(radius.expand(size), math.sqrt(out.numel() / max(1, x.numel())))]


def _pad(step: Step, outputs: list[Tensor]) -> list[Record] | None:
    x, pads = step.args[0], list(step.argument(1, "pad"))
    if step.argument(2, "mode", "constant") != "constant":
        return None
    bound = step.bound(x)
    own = [p if bound.radius.shape[-1 - i // 2] > 1 else 0 for i, p in enumerate(pads)]
    return [bound.scaled(settle_nan(F.pad(bound.radius, own)), 1.0)]


PLACES: dict[str, Rule] = {
    **dict.fromkeys(("max_pool2d", "_max_pool2d", "boolean_dispatch"), _max_pool),
    **dict.fromkeys(("avg_pool2d", "adaptive_avg_pool2d"), _avg_pool),
    **dict.fromkeys(("mean", "sum"), _reduce),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "pad": _pad,
    **dict.fromkeys(PLAIN_MOVES | COPYING_MOVES, _move),
}
