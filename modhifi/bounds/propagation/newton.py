"""R2 around a prediction: a few Newton rounds from the clean activations, and a bound of what they leave out.

Round m replaces every operation ``g`` of the modified network by its tangent at round m - 1 (round 0: the clean
activations): ``p_m = g(p_{m-1}) + Dg(p_{m-1}) (p_m - p_{m-1})``. The first round is the exact first-order effect of the
edit. Around the last one a radius is carried by the local rules: ``r' = rule(g, p, r) + |g(p) - p'|``, where the second
term, what the tangent misses, is measured. Sound whatever the prediction is; sharp where it is good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modhifi.bounds.propagation.affine import Pending
from modhifi.bounds.propagation.interval import Bound, nothing, settle_nan, slice_norm, total
from modhifi.bounds.propagation.module_rules import as_function
from modhifi.bounds.propagation.walked_call import Record, Rule, WalkedCall
from modhifi.structure.torch_ops import swap, tensors_in

ROUNDS = 8
# A tangent that misses no more than this share of the largest entry is exact: what differs is rounding.
EXACT = 1e-13


@dataclass(frozen=True)
class Path:
    """One tensor in each round, and the record of its last: how far the modified network's value lies from it."""

    points: tuple[Tensor, ...]
    rest: Record

    def bound(self) -> Bound:
        """The bound around the last round's point."""
        return _settled(self.rest)


class Newton:
    """The paths of one walk, by ``id`` of the clean tensor; what has none is bounded around its clean value."""

    def __init__(self, twins: Mapping[int, Tensor], rounds: int) -> None:
        self.twins, self.rounds = twins, rounds
        self.paths: dict[int, Path] = {}

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Let a tensor with the same values have the same path."""
        if id(source) in self.paths:
            self.paths[id(target)] = self.paths[id(source)]

    def forget(self, tensors: Sequence[Tensor]) -> None:
        """End the paths of some tensors."""
        for tensor in tensors:
            self.paths.pop(id(tensor), None)

    def follow(self, rule: Rule, call: WalkedCall, outputs: list[Tensor]) -> None:
        """Take the paths through one operation. Where that fails they end, and the clean value's bound goes on."""
        paths: list[Path] = []
        if self.rounds and any(id(t) in self.paths or id(t) in self.twins for t in call.inputs):
            try:
                with sdpa_kernel(SDPBackend.MATH):
                    paths = self._advance(rule, call)
            except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                paths = []
        self.forget(outputs)
        if len(paths) == len(outputs):
            self.paths |= {id(out): path for out, path in zip(outputs, paths, strict=True)}

    def _advance(self, rule: Rule, call: WalkedCall) -> list[Path]:
        func = as_function(call.func) if isinstance(call.func, nn.Module) else call.func
        clean = {id(t): t for t in call.inputs if id(t) in self.paths}

        def edited(table: dict[int, Tensor]) -> list[Tensor]:
            table = {id(t): self.twins[id(t)] for t in call.inputs if id(t) in self.twins} | table
            return list(tensors_in(func(*swap(call.args, table), **swap(call.kwargs, table))))

        last = {i: self.paths[i].points[-1] for i in clean}
        values = edited(last)
        records = rule(self._around(call, last), values)
        if records is None:
            return []
        rounds = [{i: self.paths[i].points[m] for i in clean} for m in range(self.rounds)]
        if any(isinstance(record, Pending) for record in records):
            # Affine: every round is its own tangent.
            points = [values]
            for at, after in reversed(list(pairwise(rounds))):
                points.insert(0, points[0] if _same(at, after) else edited(at))
            return [Path(tuple(p), r) for p, r in zip(zip(*points, strict=True), records, strict=True)]
        points = []
        starts = [clean, *rounds]
        for m, at in enumerate(rounds):
            if m and _same(starts[m], starts[m - 1]) and _same(at, rounds[m - 1]):
                points.append(points[-1])
            else:
                tangent = _tangent(edited, starts[m], at)
                points.append(
                    [_unless_equal(*pair) for pair in zip(tangent, points[-1], strict=True)] if m else tangent
                )
        return [
            _path(tuple(p), value, _settled(record))
            for p, value, record in zip(zip(*points, strict=True), values, records, strict=True)
        ]

    def _around(self, call: WalkedCall, last: Mapping[int, Tensor]) -> WalkedCall:
        """The same operation of the modified network, at the last round's points."""
        twins = {id(t): self.twins[id(t)] for t in call.inputs if id(t) in self.twins}
        table = twins | dict(last)
        records: dict[int, Record] = {}
        for tensor in call.inputs:
            if id(tensor) in last:
                records[id(last[id(tensor)])] = self.paths[id(tensor)].rest
            elif id(tensor) in twins:
                records[id(twins[id(tensor)])] = nothing(tensor.ndim)
            else:
                records[id(tensor)] = _without_path(call, tensor)
        return replace(
            call,
            args=swap(call.args, table),
            kwargs=swap(call.kwargs, table),
            bound=lambda t: _settled(records[id(t)]),
            twins={},
            records=records,
            names={},
        )


def radius_of(path: Path, clean: Tensor) -> tuple[Tensor, Tensor]:
    """How far the modified network's value lies from the clean one at most, and the certified remainder: (b,) each."""
    rest = total(path.bound().radius).expand(len(clean))
    moved = slice_norm(path.points[-1] - clean, [len(clean), *[1] * (clean.ndim - 1)])
    return moved.reshape(-1) + rest, rest


def _without_path(call: WalkedCall, tensor: Tensor) -> Record:
    record = call.records.get(id(tensor))
    if isinstance(record, Pending):
        if record.modified or not record.x.still:
            raise ValueError("an affine operation that moves without a path")
        return record
    bound = call.bound(tensor)
    return bound if bound.still else Bound(bound.radius, {}, math.inf, bound.ceiling)


def _settled(record: Record) -> Bound:
    # Nothing is modified around a point, so no source is ever added.
    bound = record if isinstance(record, Bound) else record.settled(lambda pending, own: -1)
    return replace(bound, reach={}, lip=math.inf if bound.lip else 0.0)


def _tangent(
    run: Callable[[dict[int, Tensor]], list[Tensor]], before: Mapping[int, Tensor], at: Mapping[int, Tensor]
) -> list[Tensor]:
    with forward_ad.dual_level():
        outputs = run({i: forward_ad.make_dual(before[i], at[i] - before[i]) for i in at})
        parts: list[Any] = [forward_ad.unpack_dual(out) for out in outputs]
        return [p.primal if p.tangent is None else p.primal + p.tangent for p in parts]


def _same(first: Mapping[int, Tensor], second: Mapping[int, Tensor]) -> bool:
    """Whether two rounds are at the same points: the very same tensors, as rounds that have converged share them."""
    return all(first[i] is second[i] for i in first)


def _negligible(difference: Tensor, value: Tensor) -> bool:
    return not difference.numel() or bool(difference.abs().amax() <= EXACT * value.abs().amax())


def _unless_equal(point: Tensor, before: Tensor) -> Tensor:
    """The point of a round, or that of the round before where the two differ by rounding alone: it has converged."""
    return before if _negligible(point - before, point) else point


def _path(points: tuple[Tensor, ...], value: Tensor, record: Bound) -> Path:
    missed, last = value - points[-1], points[-1]
    if _negligible(missed, value):
        return Path(tuple(value if point is last else point for point in points), record)
    own = slice_norm(missed, [len(value), *record.radius.shape[1:]])
    return Path(points, replace(record, radius=settle_nan(record.radius + own)))
