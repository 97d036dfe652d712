"""Edit the classifier alone, without any moments: the frame of controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modhifi.structure.operators import weight_matrix
from modhifi.unlearning.closed_forms import Edit
from modhifi.unlearning.session import EditSession
from modhifi.unlearning.settings import Defaults
from modhifi.unlearning.sites import Site


@dataclass(frozen=True)
class ClassifierMethod:
    """``edit`` takes a classifier's weight ``(out, d)``, its bias ``(out,)`` or None, and the forgotten classes."""

    name: str
    summary: str
    usual: Defaults
    edit: Callable[[Tensor, Tensor | None, Sequence[int]], Edit]
    source: str = ""

    def defaults(self, straight: bool) -> Defaults:
        return self.usual

    def run(self, session: EditSession) -> None:
        """Edit every classifier of the model."""
        for name in session.sites.heads:
            head: Any = session.model.get_submodule(name)
            bias = None if head.bias is None else head.bias.detach().cpu()
            session.apply(Site(name, name, "bias"), [self.edit(weight_matrix(head)[0].cpu(), bias, session.classes)])
