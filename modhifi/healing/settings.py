"""The settings of a distillation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HealSettings:
    """How to distil.

    ``steps`` or ``minutes``, whichever is used up first, end it; the learning rate rises over the first ``WARM_UP`` of
    that and falls as a cosine. ``optimizer`` is a name of `modhifi.healing.optimizers.OPTIMIZERS`.
    ``temperature`` T softens the logits of both models; ``blocks`` weighs the distance of the blocks' outputs against
    that of the model's, both of them times T² where there are logits. With ``augment`` images are flipped and shifted;
    with ``batch_statistics`` BatchNorm normalises by the batch and follows it, else its statistics stay. ``lora`` is
    the rank of the adapters that are trained in place of the weights, None for the weights.
    """

    learning_rate: float
    batch_size: int
    optimizer: str = "adamw"
    steps: int | None = None
    minutes: float | None = None
    temperature: float = 1.0
    blocks: float = 1.0
    augment: bool = False
    batch_statistics: bool = False
    lora: int | None = None
    precision: str = "auto"
    seed: int = 0
