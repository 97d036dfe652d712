"""Attention on the local rung: fused, or written out as products and a softmax. It has no global constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modhifi.bounds.local_lipschitz import attention_rule, scores_rule
from modhifi.bounds.propagation.interval import UP, Bound, coarsen, settle_nan, slice_norm
from modhifi.bounds.propagation.walked_call import Record, Rule, WalkedCall


def _fused(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    """scaled_dot_product_attention of q, k, v (b, h, t, e): a radius for each head and query."""
    query, key, value = (call.argument(p, n) for p, n in enumerate(("query", "key", "value")))
    mask, dropout = call.argument(3, "attn_mask"), call.argument(4, "dropout_p", 0.0)
    causal, scale = call.argument(5, "is_causal", False), call.kwargs.get("scale")
    if query.ndim != 4 or dropout or (mask is not None and not call.bound(mask).constant):
        return None
    bounds = [call.bound(t) for t in (query, key, value)]
    radii = [
        coarsen(b.radius, [*b.radius.shape[:-1], 1]).expand(*t.shape[:-1], 1)[..., 0]
        for b, t in zip(bounds, (query, key, value), strict=True)
    ]
    if call.kwargs.get("enable_gqa"):
        times = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(times, 1) for t in (key, value))
        radii = [radii[0], *(r.repeat_interleave(times, 1) for r in radii[1:])]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.mT).double() * scale
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        # A mask in floats is large and negative, not infinite, in some models: those keys count as attended.
        scores = scores + mask
    moved = scores_rule(query, key, radii[0], radii[1], scale, allowed & torch.isfinite(scores))
    radius = attention_rule(scores, value, moved, radii[2], allowed.expand_as(scores))
    return [_local(radius[..., None], bounds)]


def _local(radius: Tensor, bounds: list[Bound]) -> Bound:
    """A bound without global constants."""
    reach = {k: math.inf for b in bounds for k in b.reach}
    return Bound(settle_nan(radius), reach, math.inf if any(b.lip for b in bounds) else 0.0)


def _softmax(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    """The Jacobian diag(p) - p p' has norm at most 1/2; every entry stays within [0, 1]."""
    x = call.args[0]
    if call.argument(1, "dim") not in (-1, x.ndim - 1):
        return None
    bound = call.bound(x)
    radius = coarsen(bound.radius, [*bound.radius.shape[:-1], 1])
    moved = bound.scaled(radius * 0.5 * UP, 0.5)
    # Two distributions are never further apart than sqrt(2); slices of several rows have as many of them.
    rows = math.prod(n for d, n in enumerate(x.shape[:-1]) if moved.radius.shape[d] == 1)
    return [Bound(moved.radius.clamp(max=math.sqrt(2 * rows) * UP), moved.reach, moved.lip, 1.0)]


def _matmul(call: WalkedCall, outputs: list[Tensor]) -> list[Record] | None:
    """A product of two activations, slice by slice: ``r_a |B| + |A| r_b + r_a r_b`` in Frobenius norms."""
    a, b = call.args[:2]
    if a.ndim != b.ndim or a.ndim < 3 or a.shape[:-2] != b.shape[:-2]:
        return None
    bounds = [call.bound(a), call.bound(b)]
    out = outputs[0]
    rows = list(coarsen(bounds[0].radius, [*bounds[0].radius.shape[:-1], 1]).expand(*a.shape[:-1], 1).shape)
    ra = coarsen(bounds[0].radius, [*bounds[0].radius.shape[:-1], 1]).expand(rows)
    rb = coarsen(bounds[1].radius, [*bounds[1].radius.shape[:-2], 1, 1]).expand(*b.shape[:-2], 1, 1)
    na, nb = slice_norm(a, rows), slice_norm(b, [*b.shape[:-2], 1, 1])
    # Each row of the product is a row of A times B.
    radius = settle_nan(torch.where(ra > 0, ra * nb, 0.0)) + settle_nan(torch.where(rb > 0, (na + ra) * rb, 0.0))
    return [_local((radius * UP).expand(*out.shape[:-1], 1), bounds)]


ATTENTION: dict[str, Rule] = {
    "scaled_dot_product_attention": _fused,
    "softmax": _softmax,
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), _matmul),
}
