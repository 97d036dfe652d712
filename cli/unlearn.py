"""`modhifi unlearn`: make a classifier forget classes, and show by attack how much is really gone."""

from __future__ import annotations

from pathlib import Path

from modhifi.runs.recipes.unlearn import UnlearnRecipe

from .common import ForceOption, JsonOption, PushOption, QuietOption
from .options import takes
from .run import run


@takes(UnlearnRecipe, without={"checks.max_perplexity_ratio": "a classifier has no perplexity"})
def unlearn(
    recipe: UnlearnRecipe,
    file: Path | None,
    push_to_hub: PushOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Make a classifier forget classes with forward passes only, then attack the result. No proof of data deletion."""
    run(recipe, quiet=quiet, as_json=as_json, force=force, push_to_hub=push_to_hub, file=file)
