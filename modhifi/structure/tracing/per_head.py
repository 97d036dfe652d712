"""What modules hold, or are given, for each head: noted where it meets heads, and known in the next pass."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from modhifi.structure.tracing.placements import of_one_item


@dataclass
class PerHead:
    """``arguments`` are the axis and the number of heads, by a module and an argument of its forward.

    ``tables`` are the numbers of heads on the middle one of three axes, by the name of a parameter.
    """

    arguments: dict[str, dict[str, tuple[int, int]]] = field(default_factory=lambda: defaultdict(dict))
    tables: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.arguments or self.tables)

    def note(
        self,
        name: str,
        module: nn.Module,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        ids: Tensor,
        dim: int,
        unknown: Callable[[Tensor], bool],
    ) -> None:
        """Note what a module has that could have made what meets the heads ``ids`` along its axis ``dim``.

        ``given`` are the module's arguments; ``unknown`` tells whether a tensor carries nothing that is known.
        """
        heads = len(of_one_item(ids))
        for argument, value in inspect.signature(module.forward).bind(*given[0], **given[1]).arguments.items():
            if isinstance(value, Tensor) and unknown(value):
                fits = [axis for axis, length in enumerate(value.shape) if length in (heads, len(ids))]
                if fits:
                    self.arguments[name][argument] = (dim if dim in fits else fits[0], heads)
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[1] == heads:
                self.tables[f"{name}.{leaf}"] = heads
