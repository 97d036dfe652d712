"""One operation of the walked network, as its bound rule sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modhifi.bounds.propagation.affine import Norms, Pending
from modhifi.bounds.propagation.interval import UP, Bound
from modhifi.structure.torch_ops import Call, swap

Record = Bound | Pending
Rule = Callable[["WalkedCall", list[Tensor]], "list[Record] | None"]


@dataclass(frozen=True)
class WalkedCall(Call):
    """An operation as it was run on clean activations.

    ``bound`` gives the settled bound of an input. By ``id`` of an input: ``twins`` holds the modified network's value
    of each parameter that differs, ``names`` the parameters it was made of, ``records`` the bounds, settled or not.
    """

    bound: Callable[[Tensor], Bound]
    twins: Mapping[int, Tensor]
    records: Mapping[int, Record]
    names: Mapping[int, tuple[str, ...]]
    norms: Norms
    where: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the modified parameters among the inputs."""
        return tuple(n for t in self.inputs for n in self.names.get(id(t), ()))

    def edited(self, tensor: Any) -> Any:
        """The edited network's value of a parameter; anything else as it is."""
        return self.twins.get(id(tensor), tensor)

    def edited_call(self, first: Tensor | None = None) -> Any:
        """The operation with the modified network's parameters, on the clean input or on ``first``."""
        table = dict(self.twins)
        if first is not None:
            table[id(self.inputs[0])] = first
        return self.func(*swap(self.args, table), **swap(self.kwargs, table))

    def again(self, x: Tensor) -> Callable[[Tensor], Any]:
        """The operation as a function of one of its inputs."""
        return lambda y: self.func(*swap(self.args, {id(x): y}), **swap(self.kwargs, {id(x): y}))

    def pending(self, tensor: Tensor) -> Pending | None:
        """The record of an input whose bound is not settled yet, else None."""
        record = self.records.get(id(tensor))
        return record if isinstance(record, Pending) else None

    def elementwise(
        self, func: Callable[[Tensor], Tensor], x: Tensor, out: Tensor, slope: float, ceiling: float = math.inf
    ) -> list[Record]:
        """The record behind an elementwise ``func`` with a largest slope and a largest value."""
        bound, pending = self.bound(x), self.pending(x)
        if pending is not None and pending.affine is not None:
            bound = pending.activated(func, out, slope, bound)
        else:
            bound = bound.scaled(bound.radius * slope * UP, slope)
        return [Bound(bound.radius, bound.reach, bound.lip, ceiling)]
