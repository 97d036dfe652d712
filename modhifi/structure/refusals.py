"""The reasons why groups are refused, in as few lines as say them all, and what a pass does not show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from modhifi.structure.groups import Group, Structure

NOT_RUN = "the model does not run this layer, or not as a layer of its own"


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


def left_behind(dense: nn.Module, cut: nn.Module, structure: Structure) -> list[str]:
    """The layers that the pass which found ``structure`` did not run, as wide as something that ``cut`` has less of.

    Whether they read what was cut nobody can tell: a head for training, or a branch that other inputs take.
    """
    pairs = [zip(_widths(dense, name), _widths(cut, name), strict=False) for name, _ in cut.named_modules()]
    narrower = {before for layer in pairs for before, after in layer if before != after}
    idle = [group.name for group in structure.refused if group.refused == NOT_RUN]
    return [name for name in idle if _widths(dense, name)[:1] and _widths(dense, name)[0] in narrower]


def _widths(model: nn.Module, name: str) -> tuple[int, ...]:
    """The widths of what a convolution or linear map reads and writes; nothing of another module, or of none."""
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError:
        return ()
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return (layer.in_channels, layer.out_channels) if isinstance(layer, _ConvNd) else ()


def _names(groups: list[str]) -> list[str]:
    """A pattern for those that differ in numbers alone; a single one by its name."""
    alike: dict[str, list[str]] = {}
    for name in groups:
        alike.setdefault(pattern(name), []).append(name)
    return [shape if len(names) > 1 else names[0] for shape, names in alike.items()]
