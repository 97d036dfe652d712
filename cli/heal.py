"""`modhifi heal`: from a smaller model back towards the original."""

from __future__ import annotations

from pathlib import Path

from modhifi.errors import ModhifiError
from modhifi.runs.recipes.heal import HealRecipe

from .common import ForceOption, JsonOption, PushOption, QuietOption
from .options import takes
from .run import run


@takes(HealRecipe)
def heal(
    recipe: HealRecipe,
    file: Path | None,
    push_to_hub: PushOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Distil the original into a pruned or unlearned model, without labels: the one verb with gradients to weights."""
    if recipe.out is None:
        raise ModhifiError("give --out DIR for the healed model")
    run(recipe, quiet=quiet, as_json=as_json, force=force, push_to_hub=push_to_hub, file=file)
