"""How the arguments of timm's factories say the widths that pruning changes.

What the configurations of transformers' models can say is found by trying (`modhifi.models.stock`).
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from modhifi.structure.groups import Structure

# Classes of which every feed-forward width is that of the block times this argument.
RATIO = "mlp_ratio"
RATIOS = ("VisionTransformer", "VisionTransformerDistilled", "Beit", "SwinTransformer")


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


def _ratio(model: nn.Module, structure: Structure) -> float | None:
    """The number by which ``int(width * number)`` is every feed-forward layer's width, to the last neuron."""
    groups = [g for g in structure.groups if g.kind == "neurons" and g.readers]
    layers: list[Any] = [model.get_submodule(g.producers[0].module) for g in groups]
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    least = max((after / before for before, after in shapes), default=0.0)
    # A quotient of floats may fall short of its own product by the last digit.
    ratios = (least, math.nextafter(least, math.inf))
    return next((r for r in ratios if shapes and all(int(b * r) == a for b, a in shapes)), None)
