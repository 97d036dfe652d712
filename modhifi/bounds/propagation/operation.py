"""One operation of the walked network, as its rule sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modhifi.bounds.propagation.affine import Norms, Pending
from modhifi.bounds.propagation.interval import UP, Bound
from modhifi.structure.torch_ops import swap, tensors_in

Record = Bound | Pending
Rule = Callable[["Step", list[Tensor]], "list[Record] | None"]


@dataclass(frozen=True)
class Step:
    """One operation as it was run. ``twins`` holds the modified network's value of each parameter that differs."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bound: Callable[[Tensor], Bound]
    twins: Mapping[int, Tensor]
    records: Mapping[int, Record]
    names: Mapping[int, tuple[str, ...]]
    norms: Norms
    where: str

    @property
    def inputs(self) -> list[Tensor]:
        return list(tensors_in((self.args, self.kwargs)))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the modified parameters among the inputs."""
        return tuple(n for t in self.inputs for n in self.names.get(id(t), ()))

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def edited(self, tensor: Any) -> Any:
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
        record = self.records.get(id(tensor))
        return record if isinstance(record, Pending) else None

    def elementwise(
        self, func: Callable[[Tensor], Tensor], x: Tensor, out: Tensor, slope: float, ceiling: float = math.inf
    ) -> list[Record]:
        bound, pending = self.bound(x), self.pending(x)
        if pending is not None and pending.affine is not None:
            bound = pending.activated(func, out, slope, bound)
        else:
            bound = bound.scaled(bound.radius * slope * UP, slope)
        return [Bound(bound.radius, bound.reach, bound.lip, ceiling)]
