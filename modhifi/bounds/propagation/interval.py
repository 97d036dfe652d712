"""What the ladder knows of one tensor, and how rearranging, adding and multiplying tensors changes it.

The *radius* bounds how far the modified network's value lies from the clean one. It has as many axes as the tensor: an
axis of full size has a radius for each index, an axis of size 1 shares one, which bounds the Euclidean norm over it.
Pure; all radii are float64 and every rule rounds up past its own rounding error. Source: docs/method.md, R1 and R2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

UP = 1 + 1e-9


@dataclass(frozen=True)
class Bound:
    """Bounds of one tensor of the network.

    ``radius``: R2, see above. ``reach``: R1 in theorem form: for each modified layer (its number) a constant ``C`` such
    that the tensor moves by at most ``sum_k C_k e_k``, e_k the layer's own error on the sample. ``lip``: the Lipschitz
    constant of the tensor with respect to the input, in the ORIGINAL network. Infinite where no rule is known.
    ``ceiling`` bounds the absolute value of every entry, whatever moves (1 behind a sigmoid).
    """

    radius: Tensor
    reach: Mapping[int, float] = field(default_factory=dict)
    lip: float = 0.0
    ceiling: float = math.inf

    @property
    def still(self) -> bool:
        """Whether the modified network has the clean value."""
        return not self.reach and not bool((self.radius > 0).any())

    @property
    def constant(self) -> bool:
        """Whether the tensor depends on nothing but parameters."""
        return self.still and self.lip == 0

    def scaled(self, radius: Tensor, constant: float, lip: float | None = None) -> Bound:
        """Behind an operation with a global Lipschitz constant (``lip`` that of the original's operation)."""
        lip = constant if lip is None else lip
        return Bound(settle_nan(radius), {k: times(c, constant) for k, c in self.reach.items()}, times(self.lip, lip))


def nothing(ndim: int) -> Bound:
    """The bound of a constant."""
    return Bound(torch.zeros([1] * ndim, dtype=torch.float64))


def times(a: float, b: float) -> float:
    """The product of two constants, rounded up; zero wins over infinity."""
    return 0.0 if a == 0 or b == 0 else a * b * (1 + 1e-12)


def settle_nan(radius: Tensor) -> Tensor:
    """Zero times infinity in a rule is an unknown: infinity."""
    return torch.nan_to_num(radius.double(), nan=math.inf, posinf=math.inf)


def slice_norm(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Euclidean norms of values over the axes on which ``shape`` has size 1: a radius of that shape."""
    dims = [d for d, size in enumerate(shape) if size == 1]
    norm: Tensor = torch.linalg.vector_norm(values.double(), dim=dims, keepdim=True) if dims else values.double().abs()
    return norm * UP


def coarsen(radius: Tensor, shape: Sequence[int]) -> Tensor:
    """The radius with every axis shared that ``shape`` shares: the root of the sum of squares over it."""
    dims = [d for d, size in enumerate(shape) if size == 1 and radius.shape[d] > 1]
    if not dims:
        return radius
    norm: Tensor = torch.linalg.vector_norm(radius, dim=dims, keepdim=True)
    return norm * UP


def meet(*radii: Tensor) -> tuple[int, ...]:
    """The finest shape all radii can be brought to; a zero radius fits every shape."""
    count = radii[0].ndim
    moving = [r for r in radii if bool((r > 0).any())]
    shape = []
    for d in range(count):
        sizes = [r.shape[d] for r in moving]
        shape.append(max(sizes) if sizes and min(sizes) == max(sizes) else 1)
    return tuple(shape)


def total(radius: Tensor) -> Tensor:
    """One radius for each sample: float64 (b,), or (1,) where all samples share it."""
    return coarsen(radius, [radius.shape[0], *[1] * (radius.ndim - 1)]).reshape(-1)


def add_rule(out: Tensor, parts: Sequence[tuple[Tensor, Bound]]) -> Bound:
    """A sum (or difference) of tensors that broadcast to ``out``."""
    parts = [(t, b) for t, b in parts if not b.constant]
    radii, reach, lip = [], dict[int, float](), 0.0
    for tensor, bound in parts:
        copies = out.numel() / max(1, tensor.numel())
        radii.append(_broadcast(bound.radius, tensor, out))
        for k, c in bound.reach.items():
            reach[k] = reach.get(k, 0.0) + times(c, math.sqrt(copies))
        lip += times(bound.lip, math.sqrt(copies))
    if not parts:
        return nothing(out.ndim)
    shape = meet(*radii)
    summed = _sum([coarsen(r, shape) for r in radii])
    return Bound(summed * UP, {k: c * (1 + 1e-12) for k, c in reach.items()}, lip * (1 + 1e-12))


def _sum(values: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, values)


def _broadcast(radius: Tensor, tensor: Tensor, out: Tensor) -> Tensor:
    """The radius of a tensor spread over ``out``: copies along an axis get a radius each."""
    lead = out.ndim - tensor.ndim
    radius = radius.reshape([1] * lead + list(radius.shape))
    shape = [1] * lead + list(tensor.shape)
    size = [out.shape[d] if shape[d] == 1 and out.shape[d] > 1 else radius.shape[d] for d in range(out.ndim)]
    # Copies along the last axis (a gate for a vector) or of a whole image share one radius again.
    spread = radius.expand(size)
    keep = [n if d < out.ndim - 1 and radius.shape[d] == n else (n if d == 0 else 1) for d, n in enumerate(size)]
    return coarsen(spread, keep)


def mul_rule(out: Tensor, a: tuple[Tensor, Bound], b: tuple[Tensor, Bound]) -> Bound:
    """An elementwise product of tensors that broadcast to ``out``: ``|a|' r_b + |b|' r_a + r_a r_b`` by slices.

    One operand alone moving has a global constant, the largest entry of the other if that is a parameter; two
    activations have none.
    """
    (x, bx), (y, by) = a, b
    rx, ry = _aligned(bx.radius, x, out), _aligned(by.radius, y, out)
    shape = meet(rx, ry)
    rx, ry = coarsen(rx, shape), coarsen(ry, shape)
    radius = torch.zeros([1] * out.ndim, dtype=torch.float64)
    if bool((rx > 0).any()):
        most = _gain(y, x, out, shape) + ry
        # A gate is bounded whatever moves; where x is spread over other entries the gain is a norm instead.
        radius = radius + settle_nan(rx * (most.clamp(max=by.ceiling) if x.shape == out.shape else most))
    if bool((ry > 0).any()):
        radius = radius + settle_nan(ry * _gain(x, y, out, shape))
    radius = settle_nan(radius) * UP
    if by.constant:
        return bx.scaled(radius, _top(y) * math.sqrt(out.numel() / max(1, x.numel())))
    if bx.constant:
        return by.scaled(radius, _top(x) * math.sqrt(out.numel() / max(1, y.numel())))
    return Bound(radius, {k: math.inf for k in {**bx.reach, **by.reach}}, math.inf)


def _aligned(radius: Tensor, tensor: Tensor, out: Tensor) -> Tensor:
    return radius.reshape([1] * (out.ndim - tensor.ndim) + list(radius.shape))


def _gain(fixed: Tensor, moving: Tensor, out: Tensor, shape: Sequence[int]) -> Tensor:
    """How much a change of ``moving`` grows when multiplied by ``fixed``, in each slice of a shape.

    An entry of ``moving`` that is spread over an axis meets all of ``fixed`` along it: the norm of that part counts.
    """
    squares = fixed.double().square().expand(out.shape)
    moving_shape = [1] * (out.ndim - moving.ndim) + list(moving.shape)
    spread = [d for d in range(out.ndim) if moving_shape[d] == 1 and out.shape[d] > 1 and shape[d] == 1]
    if spread:
        squares = squares.sum(spread, keepdim=True)
    rest = [d for d in range(out.ndim) if shape[d] == 1]
    return (squares.amax(rest, keepdim=True) if rest else squares).sqrt() * UP


def _top(values: Tensor) -> float:
    return float(values.double().abs().max()) * (1 + 1e-12) if values.numel() else 0.0


def mean_rule(out: Tensor, x: Tensor, bound: Bound, dims: Sequence[int], keepdim: bool, summed: bool) -> Bound:
    """A mean (or a sum) over axes."""
    count = math.prod(x.shape[d] for d in dims)
    shared = math.prod(x.shape[d] for d in dims if bound.radius.shape[d] == 1)
    scale = (count if summed else 1.0) / count
    own = [d for d in dims if bound.radius.shape[d] > 1]
    radius = bound.radius.sum(own, keepdim=True) if own else bound.radius
    radius = radius * (scale * math.sqrt(shared))
    if not keepdim:
        radius = radius.reshape([n for d, n in enumerate(radius.shape) if d not in dims])
    return bound.scaled(radius * UP, scale * math.sqrt(count))


def cat_rule(out: Tensor, parts: Sequence[tuple[Tensor, Bound]], dim: int) -> Bound:
    """A concatenation: radii side by side where the axis has its own, the root of the sum of squares elsewhere."""
    radii = [b.radius for _, b in parts]
    reach: dict[int, float] = {}
    for _, bound in parts:
        for k, c in bound.reach.items():
            reach[k] = math.hypot(reach.get(k, 0.0), c) * (1 + 1e-12)
    lip = math.hypot(*[b.lip for _, b in parts]) * (1 + 1e-12)
    own = [r.shape[dim] > 1 for r in radii if bool((r > 0).any())]
    lengths = [t.shape[dim] for t, _ in parts]
    if own and any(own) and dim != out.ndim - 1:
        free = meet(*[r.narrow(dim, 0, 1) for r in radii])
        ready = [
            coarsen(r, [n if d == dim else s for d, s in enumerate(free)]).expand(
                [n if d == dim else s for d, s in enumerate(free)]
            )
            for r, n in zip(radii, lengths, strict=True)
        ]
        return Bound(torch.cat(ready, dim), reach, lip)
    shape_ = list(meet(*radii))
    shape_[dim] = 1
    squares = [coarsen(r, shape_).square() for r in radii]
    return Bound(_sum(squares).sqrt() * UP, reach, lip)


def moved_rule(run: Callable[[Tensor], Tensor], x: Tensor, bound: Bound, duplicates: bool) -> Bound:
    """Elements only change places: ``run`` is applied to the numbers of the slices to see where each one went.

    With ``duplicates`` the operation may copy elements; the largest number of copies enters as its root.
    """
    # Numbers laid out in memory as x is: a view of x must be one of them.
    layout = torch.empty_like(x, dtype=torch.int64)
    where = run(layout.copy_(torch.arange(bound.radius.numel()).view(bound.radius.shape))).clone()
    copies = 1
    if duplicates and where.numel():
        elements = run(layout.copy_(torch.arange(x.numel()).view(x.shape))).reshape(-1)
        copies = int(elements.bincount().max())
    constant = math.sqrt(copies) * (1 + 1e-12 if copies > 1 else 1.0)
    if where.numel() == 0:
        return nothing(where.ndim)
    return bound.scaled(_gathered(where, bound.radius.reshape(-1)) * constant, constant)


def _gathered(where: Tensor, radius: Tensor) -> Tensor:
    """The radius of a tensor whose elements come from the numbered slices; the last axis is always shared."""
    if where.ndim == 0:
        return radius[where]
    last = where.ndim - 1
    own = [d for d, n in enumerate(where.shape) if n > 1 and bool((where != where.narrow(d, 0, 1)).any())]
    for d in range(where.ndim):
        if d not in own:
            where = where.narrow(d, 0, 1)
    if last in own and last > 0:
        ordered = where.sort(-1).values
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
        norm: Tensor = (radius[ordered].square() * first).sum(-1, keepdim=True).sqrt() * UP
        return norm
    return radius[where]
