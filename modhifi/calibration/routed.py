"""What the matrices of a mixture's experts read: the rows of each expert, times the gate that weighs its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from modhifi.calibration.moments import Moments
from modhifi.structure.stacked import Stacked
from modhifi.structure.torch_ops import names_of, operation_name, tensors_in
from modhifi.structure.tracing.stacks import StackViews

PRODUCTS, SUMS = names_of("product"), names_of("sum")


class RoutedSums:
    """Sums of ``g² x xᵀ`` over the rows x of each expert and their gates g, float64 ``(E, d, d)``."""

    def __init__(self) -> None:
        self.n = 0
        self.seen: Tensor | None = None

    def add(self, rows: Tensor, experts: Tensor, count: int) -> None:
        """Add ``rows`` ``(r, d)``, which the ``experts`` int64 ``(r,)``, in rising order, of ``count`` read."""
        if self.seen is None:
            self.seen = torch.zeros(count, dtype=torch.int64, device=rows.device)
            self.second = rows.new_zeros((count, rows.shape[1], rows.shape[1]), dtype=torch.float64)
        counts = torch.bincount(experts, minlength=count)
        self.seen += counts
        for expert, piece in enumerate(rows.float().split(counts.tolist())):
            if len(piece):
                self.second[expert] += (piece.T @ piece).double()

    def finish(self) -> Moments:
        """The moments over all ``n`` tokens. No bias takes a mean here, so it is left inside."""
        assert self.seen is not None
        return Moments(self.n, self.second.new_zeros(self.second.shape[:2]), self.second / max(1, self.n), self.seen)


@dataclass(frozen=True)
class _Rows:
    """Rows ``(r, d)`` that stacked matrices have multiplied, with the expert of each, int64 ``(r,)``."""

    rows: Tensor
    experts: Tensor


class Routed(TorchFunctionMode):
    """While active, adds what the experts of ``stack`` read to ``sums``.

    A product behind theirs with one number a row is the gate's; without one, gates are 1.
    """

    def __init__(self, stack: Stacked, sums: RoutedSums) -> None:
        super().__init__()
        self.stack, self.sums = stack, sums
        self.views = StackViews({id(stack.weight): ""})
        self.waiting: dict[int, _Rows] = {}
        self.alive: list[Any] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._see(operation_name(func), args, kwargs, out)
        return out

    def _see(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        inputs = list(tensors_in((args, kwargs)))
        if self.views.note(name, args, inputs, out):
            self.alive.append(out)
        elif (product := self.views.product(name, args, kwargs, inputs)) is not None:
            x, view = product
            self.waiting[id(out)] = _Rows(*_routed(x, view.expert, kwargs, inputs, self.stack.experts))
            self.alive.append(out)
        elif (
            name in SUMS | PRODUCTS and (known := next((t for t in inputs if id(t) in self.waiting), None)) is not None
        ):
            rows = self.waiting.pop(id(known))
            gate = next((t for t in inputs if t is not known), None)
            if name in SUMS:  # of a bias
                self.waiting[id(out)] = rows
                self.alive.append(out)
            elif gate is not None and gate.numel() == len(rows.rows):
                self._add(rows, gate.reshape(-1, 1))
            else:
                self._add(rows)

    def _add(self, rows: _Rows, gate: Tensor | None = None) -> None:
        weighted = rows.rows if gate is None else rows.rows * gate.to(rows.rows.dtype)
        self.sums.add(weighted, rows.experts, self.stack.experts)

    def finish(self) -> None:
        """Add what no gate has met, and forget the pass."""
        for rows in self.waiting.values():
            self._add(rows)
        self.waiting.clear()
        self.alive.clear()
        self.views.forget()


def _routed(x: Tensor, expert: int | None, kwargs: Any, inputs: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The rows of a product with the matrix of one expert or of all, and the expert of each."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if expert is not None:
        return rows, torch.full((len(rows),), expert, device=x.device)
    numbers = torch.arange(count, device=x.device)
    if x.ndim == 3:  # a batch of experts; the rows of tokens that are not routed to one are zero
        experts = numbers.repeat_interleave(x.shape[1])
        used = rows.any(1)
        return rows[used], experts[used]
    ends = kwargs.get("offs", inputs[-1])
    counts = ends.diff(prepend=ends.new_zeros(1))
    return rows[: int(ends[-1])], numbers.repeat_interleave(counts.long())


def watched(stack: Stacked, sums: RoutedSums) -> Iterator[RemovableHandle]:
    """Hooks of the module that holds the matrices: while it runs, what they read is added to ``sums``."""
    owner, _ = stack.place
    routed = Routed(stack, sums)

    def begin(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = next(tensors_in((args, named)))
        sums.n += tokens.numel() // tokens.shape[-1]
        routed.__enter__()  # type: ignore[no-untyped-call]

    def end(*_: Any) -> None:
        routed.__exit__(None, None, None)
        routed.finish()

    yield owner.register_forward_pre_hook(begin, with_kwargs=True)
    yield owner.register_forward_hook(end, always_call=True)
