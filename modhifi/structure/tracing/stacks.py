"""Which tensors of a pass are matrices of a mixture's experts, or a layer's weight turned, and what multiplies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from modhifi.structure.stacked import TURNED
from modhifi.structure.torch_ops import names_of

LINEAR, PRODUCTS = frozenset({"linear"}), names_of("matrix product", "grouped product")
LEFT = names_of("matrix product") - {"__rmatmul__"}
TURNS = frozenset({"transpose", "swapaxes", "swapdims", "t", "T", "mT"})
CASTS = names_of("cast", "unchanged")


@dataclass(frozen=True)
class StackView:
    """The matrices of the parameter ``name``, of all experts or of one; ``turned`` against how they are stored."""

    name: str
    turned: bool = False
    expert: int | None = None


class StackViews:
    """The views of some stacked parameters in one pass, by the ``id`` of the tensor."""

    def __init__(self, parameters: Mapping[int, str]) -> None:
        self.parameters = {key: StackView(name) for key, name in parameters.items()}
        self.forget()

    def forget(self) -> None:
        """Only the parameters themselves are known again."""
        self.views = dict(self.parameters)

    def note(self, name: str, args: Any, inputs: list[Tensor], out: Any) -> bool:
        """Whether an operation makes a view of a view; it is known from then on, as long as the tensor lives."""
        view = self.views.get(id(inputs[0])) if inputs else None
        if view is None or not isinstance(out, Tensor):
            return False
        if name in ("__getitem__", "select") and out.ndim == 2 and view.expert is None:
            number = args[1] if name == "__getitem__" else args[2]
            if not isinstance(number, int | Tensor) or (isinstance(number, Tensor) and number.numel() > 1):
                return False  # other axes than the experts'
            view = replace(view, expert=int(number))
        elif name in TURNS and out.shape == inputs[0].mT.shape:
            view = replace(view, turned=not view.turned)
        elif name not in CASTS:
            return False
        self.views[id(out)] = view
        return True

    def product(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor]) -> tuple[Tensor, StackView] | None:
        """What a product multiplies with experts' matrices from the left, and their view; None for other operations."""
        if name not in LINEAR | PRODUCTS or len(inputs) < 2:
            return None
        view = self.views.get(id(inputs[1]))
        return None if view is None or id(inputs[0]) in self.views else (inputs[0], view)

    def from_left(self, name: str, inputs: list[Tensor]) -> StackView | None:
        """The weight of a linear layer as it is stored that a product multiplies with from the left: ``weight @ x``."""
        if name not in LEFT or len(inputs) != 2 or inputs[0].ndim != 2 or id(inputs[1]) in self.views:
            return None
        view = self.views.get(id(inputs[0]))
        return None if view is None or view.turned or view.expert is not None else view

    @staticmethod
    def operator(name: str, view: StackView) -> str:
        """The name of the operator that a product ``name`` with a view is: F.linear takes matrices ``(out, in)``."""
        stored_turned = view.turned if name in LINEAR else not view.turned
        return view.name + TURNED if stored_turned else view.name
