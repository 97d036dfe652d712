"""The reasons why groups are refused, in as few lines as say them all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from modhifi.structure.groups import Group


def pattern(name: str) -> str:
    """The shell pattern of the names that differ from this one in numbers alone, as ``--only`` takes it."""
    return re.sub(r"\d+", "*", name)


def folded(refused: Iterable[Group], model: nn.Module | None = None) -> list[Mapping[str, Any]]:
    """The refusals of a model's groups, those as one that say the same but for numbers; most groups first.

    Those of a width that the ``model``'s configuration calls the hidden size say so. ``on_request`` says of each
    whether its groups are blocks, sublayers or ranks, which go where they are asked for.
    """
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    alike: dict[tuple[str, bool], list[Group]] = {}
    for g in refused:
        reason = re.sub(r" \([^()]*\)", "", str(g.refused))
        if g.n == hidden and "fixed or unknown tensor" in reason:
            reason = "their width is the hidden size"
        reason = "; ".join(dict.fromkeys(reason.split("; ")))
        alike.setdefault((pattern(reason), g.on_request), []).append(g)
    rows = [
        {
            "reason": reason,
            "groups": len(members),
            "on_request": on_request,
            "names": _names([g.name for g in members]),
        }
        for (reason, on_request), members in alike.items()
    ]
    return sorted(rows, key=lambda entry: -entry["groups"])


def _names(groups: list[str]) -> list[str]:
    """A pattern for those that differ in numbers alone; a single one by its name."""
    alike: dict[str, list[str]] = {}
    for name in groups:
        alike.setdefault(pattern(name), []).append(name)
    return [shape if len(names) > 1 else names[0] for shape, names in alike.items()]
