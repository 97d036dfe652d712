"""What the matrices of a mixture's experts read: the rows of each expert, times the gate that weighs its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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

    def __init__(self, experts: int) -> None:
        self.n, self.experts = 0, experts
        self.seen: Tensor | None = None
        self.keep: Tensor | None = None

    def begin(self, tokens: int, keep: Tensor | None = None) -> None:
        """A pass begins with so many tokens; ``keep`` bool, one for each of them, masks padding out."""
        self.keep = None if keep is None or keep.numel() != tokens else keep.flatten()
        self.n += tokens if self.keep is None else int(self.keep.sum())

    def add(self, read: Rows) -> None:
        """Add rows that some of the experts read."""
        if self.keep is not None and read.tokens is not None:
            read = read.where(self.keep.to(read.tokens.device)[read.tokens])
        rows = read.weighted
        if self.seen is None:
            self.seen = torch.zeros(self.experts, dtype=torch.int64, device=rows.device)
            self.second = rows.new_zeros((self.experts, rows.shape[1], rows.shape[1]), dtype=torch.float64)
        counts = torch.bincount(read.experts, minlength=self.experts)
        self.seen += counts
        for expert, piece in enumerate(rows.float().split(counts.tolist())):
            if len(piece):
                self.second[expert] += (piece.T @ piece).double()

    def finish(self) -> Moments:
        """The moments over all ``n`` tokens. No bias takes a mean here, so it is left inside."""
        assert self.seen is not None
        return Moments(self.n, self.second.new_zeros(self.second.shape[:2]), self.second / max(1, self.n), self.seen)


@dataclass(frozen=True)
class Rows:
    """Rows ``(r, d)`` that experts' matrices have multiplied, and the ``products`` ``(r, out)``, with biases.

    ``experts`` int64 ``(r,)`` says whose each is, in rising order, ``tokens`` of which token, None where that cannot be
    told; ``gates`` ``(r, 1)`` weigh the products.
    """

    rows: Tensor
    products: Tensor
    experts: Tensor
    tokens: Tensor | None
    gates: Tensor | None = None

    def where(self, stay: Tensor) -> Rows:
        """Those rows that stay, bool ``(r,)``."""
        tokens, gates = (None if t is None else t[stay] for t in (self.tokens, self.gates))
        return Rows(self.rows[stay], self.products[stay], self.experts[stay], tokens, gates)

    @property
    def weighted(self) -> Tensor:
        """The rows times their gates."""
        return self.rows if self.gates is None else self.rows * self.gates


class Routed(TorchFunctionMode):
    """While active, hands what the experts of ``stack`` read to ``receive``.

    A product behind theirs with one number a row is the gate's; without one, gates are 1.
    """

    def __init__(self, stack: Stacked, receive: Callable[[Rows], None]) -> None:
        super().__init__()
        self.stack, self.receive = stack, receive
        self.views = StackViews({id(stack.weight): ""})
        self.waiting: dict[int, Rows] = {}
        self.tokens: dict[int, Tensor] = {}
        self.alive: list[Any] = []

    def begin(self, tokens: Tensor) -> None:
        """Say that a pass begins with these tokens, the first axes of what the module is given."""
        count = tokens.numel() // tokens.shape[-1]
        self.alive.append(tokens)
        self.tokens[id(tokens)] = torch.arange(count, device=tokens.device)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._see(operation_name(func), args, kwargs, out)
        return out

    def _see(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        inputs = list(tensors_in((args, kwargs)))
        self._follow(name, args, inputs, out)
        if self.views.note(name, args, inputs, out):
            self.alive.append(out)
        elif (product := self.views.product(name, args, kwargs, inputs)) is not None:
            x, view = product
            self.waiting[id(out)] = self._rows(x, view.expert, kwargs.get("offs", inputs[-1]), out)
            self.alive.append(out)
        elif (
            name in SUMS | PRODUCTS and (known := next((t for t in inputs if id(t) in self.waiting), None)) is not None
        ):
            rows = self.waiting.pop(id(known))
            gate = next((t for t in inputs if t is not known), None)
            if name in SUMS:  # of a bias
                self.waiting[id(out)] = replace(rows, products=out)
                self.alive.append(out)
            else:
                if gate is not None and gate.numel() == len(rows.rows):
                    rows = replace(rows, gates=gate.reshape(-1, 1).to(rows.rows.dtype))
                self.receive(rows)

    def _follow(self, name: str, args: Any, inputs: list[Tensor], out: Any) -> None:
        """Which token each row of an operation's outputs belongs to, where its input's rows are known."""
        known = next((t for t in inputs if id(t) in self.tokens), None)
        if known is None:
            return
        tokens = self.tokens[id(known)]
        if name == "__getitem__" and inputs[-1] is not known and not inputs[-1].is_floating_point():
            tokens = tokens[inputs[-1]]
        for tensor in tensors_in(out):
            if tensor.ndim and len(tensor) == len(tokens):
                self.tokens[id(tensor)] = tokens
                self.alive.append(tensor)

    def _rows(self, x: Tensor, expert: int | None, ends: Tensor, out: Tensor) -> Rows:
        """What a product with the matrix of one expert, or of all, has multiplied."""
        count, tokens = self.stack.experts, self.tokens.get(id(x))
        rows, products = x.detach().reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        numbers = torch.arange(count, device=x.device)
        if expert is not None:
            return Rows(rows, products, torch.full((len(rows),), expert, device=x.device), tokens)
        if x.ndim == 3:  # every token stands at every expert, as zeros where it is not routed there
            used = rows.any(1)
            every = torch.arange(x.shape[1], device=x.device).repeat(count)
            return Rows(rows[used], products[used], numbers.repeat_interleave(x.shape[1])[used], every[used])
        counts, total = ends.diff(prepend=ends.new_zeros(1)).long(), int(ends[-1])
        tokens = None if tokens is None else tokens[:total]
        return Rows(rows[:total], products[:total], numbers.repeat_interleave(counts), tokens)

    def finish(self) -> None:
        """Add what no gate has met, and forget the pass."""
        for rows in self.waiting.values():
            self.receive(rows)
        self.waiting.clear()
        self.tokens.clear()
        self.alive.clear()
        self.views.forget()


def watched(stack: Stacked, receive: Callable[[Rows], None], begin: Callable[[int], None]) -> Iterator[RemovableHandle]:
    """Hooks of the module that holds the matrices: while it runs, what they read is handed to ``receive``.

    ``begin`` is told the number of tokens of each pass.
    """
    owner, _ = stack.place
    routed = Routed(stack, receive)

    def enter(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = next(tensors_in((args, named)))
        begin(tokens.numel() // tokens.shape[-1])
        routed.begin(tokens)
        routed.__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: Any) -> None:
        routed.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        routed.finish()

    yield owner.register_forward_pre_hook(enter, with_kwargs=True)
    yield owner.register_forward_hook(leave, always_call=True)
