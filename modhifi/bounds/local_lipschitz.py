"""Local Lipschitz rules: bounds of an operation's change when its clean input changes by at most a radius.

A radius bounds the Euclidean norm of a change. It is a tensor whose shape is a prefix of the activations' shape: (b,)
bounds each sample as a whole, (b, t) each token's vector. The axes after the prefix share the radius. Every rule is
pure, computes in float64, rounds up past its own rounding error, and returns a float64 radius of the same prefix.
Source: docs/method.md, R2 (certified-local).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.errors import ModhifiError

# Sums of fewer than a million float64 terms are good to 1e-10.
_UP = 1 + 1e-9


def norm_rule(z: Tensor, radius: Tensor, gamma: Tensor | None, eps: float, *, centred: bool) -> Tensor:
    """The radius behind RMSNorm (`centred=False`) or LayerNorm (`centred=True`) over the last axis of z (..., d).

    With `s = sqrt(mean z^2 + eps)` the output moves by at most
    `max|gamma| * min(2 sqrt(d), 2 r / (s + max(sqrt(eps), s - r / sqrt(d))))`. Vectors that share a radius (a prefix
    shorter than (...)) are bounded by the worst among them. GroupNorm: reshape to (b, groups, rest) and `gamma=None`,
    then multiply by max|gamma|. Raises ModhifiError on z without a last axis to normalise.
    """
    if z.ndim <= radius.ndim:
        raise ModhifiError(f"a radius of shape {tuple(radius.shape)} leaves no axis of {tuple(z.shape)} to normalise")
    z, r = z.double(), radius.double()
    d, largest = z.shape[-1], z.abs()
    if centred:
        z = z - z.mean(-1, keepdim=True)
    # Taking the mean away cancels digits of the largest entries: what may be lost of s is taken off first.
    cancelled = 1e-14 * largest.amax(-1) if centred else 0.0
    vectors = _shared((z.pow(2).mean(-1) + eps).sqrt() * (1 - 1e-12) - cancelled, radius)
    s = vectors.amin(-1).clamp(min=math.sqrt(eps))
    moved = torch.clamp(s - r / math.sqrt(d), min=math.sqrt(eps))
    relative = torch.where(r > 0, 2 * r / (s + moved).clamp(min=1e-300), torch.zeros_like(r))
    ceiling = 2 * math.sqrt(d * vectors.shape[-1])
    top = 1.0 if gamma is None else float(gamma.detach().abs().double().max())
    return torch.clamp(relative, max=ceiling) * (top * _UP)


def scores_rule(
    q: Tensor, k: Tensor, radius_q: Tensor, radius_k: Tensor, scale: float, allowed: Tensor | None = None
) -> Tensor:
    """The largest change of each query's attention scores over the keys that it may attend to: (b, h, t).

    q (b, h, t, e), k (b, h, j, e) after rotary embedding (an isometry), radii (b, h, t) and (b, h, j), `allowed` a
    boolean mask broadcastable to (b, h, t, j). Grouped-query attention: repeat keys, values and radii for each head.
    """
    rq, rk = radius_q.double(), radius_k.double()
    nq, nk = _length(q.double(), -1), _length(k.double(), -1)
    each = nq[..., :, None] * rk[..., None, :] + rq[..., :, None] * (nk + rk)[..., None, :]
    if allowed is not None:
        each = each.masked_fill(~allowed, 0.0)
    return each.amax(-1) * abs(scale) * _UP


def attention_rule(
    scores: Tensor, v: Tensor, radius_scores: Tensor, radius_v: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """The radius (b, h, t) of softmax attention: of each head's output `o_i = sum_j p_ij v_j` for each query.

    scores (b, h, t, j) are the clean logits after scaling, position bias and mask; v (b, h, j, e); `radius_scores`
    (b, h, t) from `scores_rule`; `radius_v` (b, h, j); `allowed` is a boolean mask broadcastable to scores (True:
    attended), -inf scores count as masked as well (a key at a finite score counts as attended: looser, still sound).
    The rule is the smaller of `max_j r_j + 2 tanh(r/2) max_j |v_j - o_i|` and forms that weigh the keys by their
    clean probabilities.
    """
    attended = torch.isfinite(scores) if allowed is None else torch.isfinite(scores) & allowed
    s, values, rv, r = scores.double(), v.double(), radius_v.double()[..., None, :], radius_scores.double()
    # tanh is 1 there already, and exp stays finite.
    r = r.clamp(max=100.0)
    # A query without any key has the same output whatever moves.
    p = torch.softmax(s.masked_fill(~attended, -math.inf), -1).nan_to_num(0.0)
    # Distances from differences, not from squared norms: cancellation would break the bound.
    distance = torch.cdist(p @ values, values, compute_mode="donot_use_mm_for_euclid_dist")
    farthest = distance.masked_fill(~attended, 0.0).amax(-1)
    largest = rv.expand_as(s).masked_fill(~attended, 0.0).amax(-1)
    smallest = rv.expand_as(s).masked_fill(~attended, math.inf).amin(-1)
    shift = torch.tanh(r / 2)
    moved = torch.minimum(largest, (p * rv).sum(-1) + shift * (largest - smallest).clamp(min=0))
    # Each probability keeps within a factor exp(2r) of the clean one.
    turned = torch.minimum(2 * shift * farthest, torch.expm1(2 * r) * (p * distance).sum(-1))
    return (moved + turned) * _UP


def max_pool_rule(
    z: Tensor,
    radius: Tensor,
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """The radius (b,) behind two-dimensional max pooling of z (b, c, h, w).

    Only inputs that can become a maximum count. Two inputs change places only if they lie within sqrt(2) radius of each
    other; the factor is the root of the largest number of windows in which one input is a candidate. For ceil_mode or
    dilation use `max_pool_constant`.
    """
    ph, pw = (padding, padding) if isinstance(padding, int) else padding
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    stride = kernel if stride is None else stride
    padded = F.pad(z.double(), (pw, pw, ph, ph), value=-math.inf).flatten(0, 1)[:, None]
    size = (padded.shape[-2], padded.shape[-1])
    # unfold multiplies nothing, so the infinities survive it.
    windows = F.unfold(padded, kernel, stride=stride)
    reach = (radius.double() * math.sqrt(2) * _UP).repeat_interleave(z.shape[1])[:, None, None]
    candidates = (windows >= windows.amax(1, keepdim=True) - reach).double()
    count = F.fold(candidates, size, kernel, stride=stride).reshape(len(z), -1).amax(1)
    return radius.double() * count.sqrt() * _UP


def cannot_flip(logits: Tensor, radius: Tensor) -> Tensor:
    """The samples, bool (b,), whose top-1 class stays: the margin of their logits exceeds sqrt(2) times the radius.

    `logits` is (b, classes), `radius` (b,) bounds the Euclidean change of each sample's logits.
    """
    top = logits.double().topk(2, dim=-1).values
    return top[..., 0] - top[..., 1] > math.sqrt(2) * radius.double() * _UP


def _shared(values: Tensor, radius: Tensor) -> Tensor:
    """The values with every axis after the radius's prefix flattened into one."""
    return values.reshape(*radius.shape, -1)


def _length(values: Tensor, dim: int) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(values, dim=dim)
    return length
