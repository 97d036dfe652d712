"""How the arguments of timm's factories say the widths that pruning changes.

What the configurations of transformers' models can say is found by trying (`modhifi.models.stock`).
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modhifi.structure.groups import Structure

# Classes of which every feed-forward width is that of the block times this argument.
RATIO = "mlp_ratio"
RATIOS = ("VisionTransformer", "VisionTransformerDistilled", "Beit", "SwinTransformer")


# The argument that holds the number of blocks, for each of the lists of blocks that follow, by class.
DEPTHS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("VisionTransformer", "VisionTransformerDistilled", "Beit"), ("depth", "blocks")),
    "ResNet": ("layers", *(f"layer{n}" for n in range(1, 5))),
    "ConvNeXt": ("depths", *(f"stages.{n}.blocks" for n in range(4))),
}


def says(model: nn.Module, kind: str) -> bool:
    """Whether the arguments of a timm model's factory can say another number of ``neurons``."""
    return kind == "neurons" and hasattr(model, "_model_args") and type(model).__name__ in RATIOS


def restate(model: nn.Module, structure: Structure) -> None:
    """Let the arguments of a timm model's factory say its new feed-forward width, where all agree; in place.

    Whether that is the whole truth is for whoever saves the model to check: what the arguments do not describe is
    recorded shape by shape.
    """
    if says(model, "neurons") and (ratio := _ratio(model, structure)) is not None:
        model._model_args = {**model._model_args, RATIO: ratio}  # type: ignore[dict-item,assignment]


def restate_depth(model: nn.Module, parts: Mapping[str, int]) -> None:
    """Let the model's configuration say that blocks are to go, as far as it can; in place, while they are there.

    ``parts`` are those of :func:`modhifi.structure.depth.removed_parts`.
    """
    gone: dict[str, set[str]] = defaultdict(set)
    for name, outputs in parts.items():
        if not outputs:
            owner, _, leaf = name.rpartition(".")
            gone[owner].add(leaf)
    stay = {
        owner: [
            number for number, (leaf, _) in enumerate(model.get_submodule(owner).named_children()) if leaf not in leaves
        ]
        for owner, leaves in gone.items()
    }
    if hasattr(model, "_model_args"):
        argument, *lists = DEPTHS.get(type(model).__name__, ("",))
        if gone.keys() & set(lists):
            counts = [len(stay[name]) if name in stay else len(model.get_submodule(name)) for name in lists]  # type: ignore[arg-type]
            model._model_args = {**model._model_args, argument: counts[0] if lists == ["blocks"] else counts}  # type: ignore[dict-item,assignment]
        return
    for owner, numbers in stay.items():
        count = len(numbers) + len(gone[owner])
        if getattr(getattr(model, "config", None), "num_hidden_layers", None) == count:
            _state_blocks(model, count, numbers)


def _state_blocks(model: nn.Module, count: int, stay: Sequence[int]) -> None:
    """Let the configuration say which of ``count`` blocks stay: their number, and what is listed for each of them."""
    old: Any = model.config
    new = copy.deepcopy(old)
    new.num_hidden_layers = len(stay)
    for name, value in list(vars(new).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(new, name, type(value)(value[number] for number in stay))
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _ratio(model: nn.Module, structure: Structure) -> float | None:
    """The number by which ``int(width * number)`` is every feed-forward layer's width, to the last neuron."""
    groups = [g for g in structure.groups if g.kind == "neurons" and g.readers]
    layers: list[Any] = [model.get_submodule(g.producers[0].module) for g in groups]
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    least = max((after / before for before, after in shapes), default=0.0)
    # A quotient of floats may fall short of its own product by the last digit.
    ratios = (least, math.nextafter(least, math.inf))
    return next((r for r in ratios if shapes and all(int(b * r) == a for b, a in shapes)), None)
